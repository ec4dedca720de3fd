"""Brings a segment's files to where they can be memory-mapped, verified, and opens them.

On a local directory the bucket's own files are mapped in place. Elsewhere each file is fetched once
into the cache directory, under a temporary name until it is whole. Every opening reads and checks
every byte (1 GB/s); a fetched copy that fails its checksum is fetched once more before the object
itself is believed damaged.
"""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from pyroaring import BitMap

from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.errors import Corrupt, NotFound, Unavailable
from shoal_cluster.domain.ids import SegmentId
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.manifest.manifest import FileEntry, SegmentEntry
from shoal_cluster.segment.deletes import decode_tombstones
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.segment.verification import verify_files
from shoal_cluster.shard.compute import Compute
from shoal_cluster.shard.state import SegmentView, open_view

FETCH_PIECE_BYTES = 8 * 1024 * 1024
"""Large enough that a request's latency does not count, small enough to hold a few."""


class SegmentFiles:
    """Opens segments of any shard. cache: where fetched files go; may be deleted when stopped."""

    def __init__(self, store: Store, cache: Path, compute: Compute) -> None:
        self._store = store
        self._cache = cache
        self._compute = compute
        self._fetches = 0

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

        Raises: as `open_view`; Unavailable when the cache directory cannot be written.
        """
        paths = {file.name: await self._local(file) for file in entry.files}
        open_them = functools.partial(_verify_and_open, entry, paths, schema)
        try:
            return await self._compute.run(open_them)
        except Corrupt:
            await self._require_present(entry)
            if not any(self._is_fetched(path) for path in paths.values()):
                raise
        # The object may be sound and our copy damaged, on the way or on the cache's disk.
        self.forget(entry.id)
        paths = {file.name: await self._local(file) for file in entry.files}
        return await self._compute.run(functools.partial(_verify_and_open, entry, paths, schema))

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
        folder = self._cache / segment
        if folder.is_dir():
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()

    async def _require_present(self, entry: SegmentEntry) -> None:
        """Raises NotFound when a file of the segment was collected: then nothing is corrupt."""
        for file in entry.files:
            if await self._store.get_range(file.key, 0, 1) is None:
                raise NotFound(f"{file.key} is gone")

    def _is_fetched(self, path: Path) -> bool:
        return self._cache in path.parents

    async def _local(self, file: FileEntry) -> Path:
        in_place = self._store.local_path(file.key)
        if in_place is not None:
            return in_place
        path = self._cache / file.key.rsplit("/", 2)[1] / file.name
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
    entry: SegmentEntry, paths: Mapping[str, Path], schema: CollectionSchema
) -> SegmentReader:
    verify_files(paths, entry.files)
    return SegmentReader.open(entry.id, paths, schema)


def check_digest(body: bytes, file: FileEntry) -> None:
    """Raises Corrupt naming the object unless its bytes have the listed size and sha256."""
    digest = hashlib.sha256(body).hexdigest()
    if len(body) != file.size_bytes or digest != file.sha256:
        raise Corrupt(
            f"object {file.key} has {len(body)} bytes with sha256 {digest}; "
            f"the manifest lists {file.size_bytes} with {file.sha256}"
        )
