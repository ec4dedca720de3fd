"""Brings a segment's files to where they can be memory-mapped, verified, and opens them.

On a local directory the bucket's own files are mapped in place. Elsewhere each file is fetched once
into the cache directory, under a temporary name until it is whole. Every opening reads and checks
every byte (1 GB/s); a fetched copy that fails its checksum is fetched once more before the object
itself is believed damaged.

A segment whose rows are sound but whose derived files are damaged (segment/salvage.py) is built
again in the cache and served from there, until the primary has replaced it (shard/scrubbing.py).
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy.typing as npt
import structlog
from numpy import int64
from pyroaring import BitMap

from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.errors import Corrupt, NotFound, Unavailable
from shoal_cluster.domain.ids import SegmentId
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.index.row_bits import rows_of_bits
from shoal_cluster.manifest.manifest import FileEntry, SegmentEntry
from shoal_cluster.segment.build import SegmentInput, build_segment
from shoal_cluster.segment.deletes import alive_bits, decode_tombstones
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.segment.salvage import ROW_FILES, read_rows, take_rows
from shoal_cluster.segment.verification import verify_files
from shoal_cluster.shard.compute import Compute
from shoal_cluster.shard.state import SegmentView, open_view

FETCH_PIECE_BYTES = 8 * 1024 * 1024
"""Large enough that a request's latency does not count, small enough to hold a few."""

_log = structlog.get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """One file that an opened segment was read from. entry: what its bytes must be.

    fetched: a copy of ours that can be fetched again; otherwise the bucket's own file.
    """

    entry: FileEntry
    path: Path
    fetched: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """A segment that is served from files built again. reason: names the damaged object."""

    reason: str
    files: tuple[LocalFile, ...]


class SegmentFiles:
    """Opens segments of any shard. cache: where fetched files go; may be deleted when stopped."""

    def __init__(self, store: Store, cache: Path, compute: Compute) -> None:
        self._store = store
        self._cache = cache
        self._compute = compute
        self._fetches = 0
        self._salvaged: dict[SegmentId, Salvage] = {}

    async def open_view(
        self, entry: SegmentEntry, schema: CollectionSchema, opened: SegmentView | None
    ) -> SegmentView:
        """Opens a segment as its manifest entry describes it.

        opened: a view of the same segment, whose reader, and tombstones if they are the same, are
        used again.

        Raises: NotFound when an object is gone (a newer manifest exists: read it and try again);
        Corrupt naming the object whose bytes fail their checksum.
        """
        if opened is None:
            reader = await self.open_reader(entry, schema)
            return open_view(entry, reader, await self.tombstones(entry))
        if opened.entry.tombstones == entry.tombstones:
            return open_view(entry, opened.reader, opened.sealed_dead)
        return open_view(entry, opened.reader, await self.tombstones(entry))

    async def open_reader(self, entry: SegmentEntry, schema: CollectionSchema) -> SegmentReader:
        """Fetches, verifies and opens a segment.

        Raises: as `open_view`, naming a damaged file that holds rows; Unavailable when the cache
        directory cannot be written.
        """
        open_them = functools.partial(_verify_and_open, entry, schema)
        try:
            reader = await self._opened(entry, entry.files, open_them)
        except Corrupt as error:
            return await self._salvage(entry, schema, error)
        self._salvaged.pop(entry.id, None)
        return reader

    async def rows(self, entry: SegmentEntry) -> SegmentInput:
        """Returns the live rows of a segment, from the files that hold rows alone.

        Raises: as `open_view`; Unavailable when the cache directory cannot be written.
        """
        dead = await self.tombstones(entry)
        live = rows_of_bits(alive_bits(entry.rows, dead), entry.rows)
        needed = tuple(file for file in entry.files if file.name in ROW_FILES)
        return await self._opened(entry, needed, lambda paths: _verify_and_read(entry, paths, live))

    async def _opened(
        self,
        entry: SegmentEntry,
        needed: tuple[FileEntry, ...],
        read: Callable[[Mapping[str, Path]], T],
    ) -> T:
        """Brings the files here and reads them; damaged copies are fetched once more."""
        paths = {file.name: await self._local(file) for file in needed}
        try:
            return await self._compute.run(lambda: read(paths))
        except Corrupt:
            await self._require_present(entry)
            if not any(self._is_fetched(path) for path in paths.values()):
                raise
        # The object may be sound and our copy damaged, on the way or on the cache's disk.
        self.forget(entry.id)
        paths = {file.name: await self._local(file) for file in needed}
        return await self._compute.run(lambda: read(paths))

    async def _salvage(
        self, entry: SegmentEntry, schema: CollectionSchema, cause: Corrupt
    ) -> SegmentReader:
        """Builds the segment again in the cache from its sound rows and opens that.

        Raises: Corrupt naming the damaged file when it holds rows: they are lost.
        """
        sources = {file.name: await self._local(file) for file in entry.files}
        folder = self._cache / entry.id / "rebuilt"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise Unavailable(f"cannot write to the cache {self._cache}: {error}") from error
        build = functools.partial(_verify_and_rebuild, entry, sources, schema, folder, cause)
        rebuilt = await self._compute.run(build)
        files = tuple(
            LocalFile(entry=file, path=folder / file.name, fetched=True) for file in rebuilt.files
        )
        self._salvaged[entry.id] = Salvage(reason=cause.message, files=files)
        _log.error("segment_salvaged", segment=entry.id, rows=rebuilt.rows, reason=cause.message)
        paths = {file.entry.name: file.path for file in files}
        opening = functools.partial(_verify_and_open, rebuilt, schema, paths)
        return await self._compute.run(opening)

    def salvage_of(self, segment: SegmentId) -> Salvage | None:
        """Returns what an opened segment was built again for, or None when it is as listed."""
        return self._salvaged.get(segment)

    def local_files(self, entry: SegmentEntry) -> tuple[LocalFile, ...]:
        """Returns the files that a segment opened here is served from."""
        salvage = self._salvaged.get(entry.id)
        if salvage is not None:
            return salvage.files
        return tuple(
            LocalFile(
                entry=file,
                path=(path := self._place_of(file)),
                fetched=self._is_fetched(path),
            )
            for file in entry.files
        )

    def copies(self, entry: SegmentEntry) -> tuple[LocalFile, ...]:
        """Returns the cached copies of a segment's objects, whether they are there or not.

        None where the bucket's own files are used.
        """
        files = (
            LocalFile(entry=file, path=self._place_of(file), fetched=True) for file in entry.files
        )
        return tuple(file for file in files if self._is_fetched(file.path))

    def compared_s(self, segment: SegmentId) -> float:
        """Returns when (wall clock) the objects of a segment were last read; -inf: unknown.

        That is the modification time of its folder in the cache: fetching a copy sets it too.
        """
        try:
            return (self._cache / segment).stat().st_mtime
        except OSError:
            return float("-inf")

    def mark_compared(self, segment: SegmentId, now_s: float) -> None:
        """Notes that the objects of a segment were read just now. Raises: Unavailable."""
        folder = self._cache / segment
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder, (now_s, now_s))
        except OSError as error:
            raise Unavailable(f"cannot write to the cache {self._cache}: {error}") from error

    async def tombstones(self, entry: SegmentEntry) -> BitMap:
        """Returns the rows that the manifest marks dead.

        Raises: NotFound when the object is gone; Corrupt naming it.
        """
        if entry.tombstones is None:
            return BitMap()
        body = await self._store.get(entry.tombstones.key)
        if body is None:
            raise NotFound(f"{entry.tombstones.key} is gone")
        check_digest(body, entry.tombstones)
        dead = decode_tombstones(body, entry.rows, key=entry.tombstones.key)
        if len(dead) != entry.dead:
            raise Corrupt(
                f"object {entry.tombstones.key} marks {len(dead)} rows dead, "
                f"the manifest says {entry.dead}"
            )
        return dead

    def forget(self, segment: SegmentId) -> None:
        """Removes the fetched files of a segment; mapped ones stay readable until closed."""
        self._salvaged.pop(segment, None)
        # What cannot be removed is only in the way: an opening compares every byte anyhow.
        shutil.rmtree(self._cache / segment, ignore_errors=True)

    async def _require_present(self, entry: SegmentEntry) -> None:
        """Raises NotFound when a file of the segment was collected: then nothing is corrupt."""
        for file in entry.files:
            if await self._store.get_range(file.key, 0, 1) is None:
                raise NotFound(f"{file.key} is gone")

    def _is_fetched(self, path: Path) -> bool:
        return self._cache in path.parents

    def _place_of(self, file: FileEntry) -> Path:
        in_place = self._store.local_path(file.key)
        if in_place is not None:
            return in_place
        return self._cache / file.key.rsplit("/", 2)[1] / file.name

    async def _local(self, file: FileEntry) -> Path:
        path = self._place_of(file)
        if not self._is_fetched(path):
            return path
        if path.exists() and path.stat().st_size == file.size_bytes:
            return path
        self._fetches += 1
        partial = path.with_name(f".{file.name}-{self._fetches}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            await self._fetch(file, partial)
            partial.rename(path)
        except OSError as error:
            raise Unavailable(f"cannot write to the cache {self._cache}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return path

    async def _fetch(self, file: FileEntry, path: Path) -> None:
        with path.open("wb") as out:
            for start in range(0, file.size_bytes, FETCH_PIECE_BYTES):
                length = min(FETCH_PIECE_BYTES, file.size_bytes - start)
                piece = await self._store.get_range(file.key, start, length)
                if piece is None:
                    raise NotFound(f"{file.key} is gone")
                await self._compute.run(functools.partial(out.write, piece))


def _verify_and_open(
    entry: SegmentEntry, schema: CollectionSchema, paths: Mapping[str, Path]
) -> SegmentReader:
    verify_files(paths, entry.files)
    return SegmentReader.open(entry.id, paths, schema, entry.seq_base)


def _verify_and_read(
    entry: SegmentEntry, paths: Mapping[str, Path], rows: npt.NDArray[int64]
) -> SegmentInput:
    verify_files(paths, [file for file in entry.files if file.name in ROW_FILES])
    return take_rows(read_rows(entry.id, paths, entry.seq_base), rows)


def _verify_and_rebuild(
    entry: SegmentEntry,
    paths: Mapping[str, Path],
    schema: CollectionSchema,
    folder: Path,
    cause: Corrupt,
) -> SegmentEntry:
    """Returns the entry with the files of a build from the segment's own rows, all of them.

    Raises: Corrupt naming a damaged file of rows; `cause` when no file is damaged at all.
    """
    verify_files(paths, [file for file in entry.files if file.name in ROW_FILES])
    try:
        verify_files(paths, entry.files)
    except Corrupt:
        _log.info("segment_rebuilding", segment=entry.id, rows=entry.rows)
    else:
        raise cause
    built = build_segment(read_rows(entry.id, paths), schema, folder, seed=0)
    files = tuple(
        FileEntry(
            name=file.name,
            key=f"{entry.id}/rebuilt/{file.name}",
            size_bytes=file.size_bytes,
            sha256=file.sha256,
        )
        for file in built.files
    )
    return replace(entry, files=files)


def check_digest(body: bytes, file: FileEntry) -> None:
    """Raises Corrupt naming the object unless its bytes have the listed size and sha256."""
    digest = hashlib.sha256(body).hexdigest()
    if len(body) != file.size_bytes or digest != file.sha256:
        raise Corrupt(
            f"object {file.key} has {len(body)} bytes with sha256 {digest}; "
            f"the manifest lists {file.size_bytes} with {file.sha256}"
        )
