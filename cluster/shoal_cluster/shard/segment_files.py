"""Brings a segment's files to where they can be memory-mapped, verified, and opens them.

On a local directory the bucket's own files are mapped in place. Elsewhere each file is fetched once
into the cache directory, under a temporary name until its checksum holds.
"""

import asyncio
import hashlib
from pathlib import Path

from pyroaring import BitMap

from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.errors import Corrupt, NotFound
from shoal_cluster.domain.ids import SegmentId
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.manifest.manifest import FileEntry, SegmentEntry
from shoal_cluster.segment.deletes import decode_tombstones
from shoal_cluster.segment.reader import SegmentReader, verify_files
from shoal_cluster.shard.compute import Compute
from shoal_cluster.shard.state import SegmentView, open_view

FETCH_PIECE_BYTES = 8 * 1024 * 1024


class SegmentFiles:
    """Opens segments of any shard. cache: where fetched files go; may be deleted when stopped."""

    def __init__(self, store: Store, cache: Path, compute: Compute) -> None:
        self._store = store
        self._cache = cache
        self._compute = compute

    async def open_view(
        self, entry: SegmentEntry, schema: CollectionSchema, opened: SegmentReader | None
    ) -> SegmentView:
        """Opens a segment as its manifest entry describes it; `opened` is reused if given.

        Raises: NotFound when an object is gone (a newer manifest exists: read it and try again);
        Corrupt naming the object whose bytes fail their checksum.
        """
        reader = opened or await self.open_reader(entry, schema)
        dead = await self.tombstones(entry)
        return open_view(entry, reader, dead)

    async def open_reader(self, entry: SegmentEntry, schema: CollectionSchema) -> SegmentReader:
        paths = {file.name: await self._local(file) for file in entry.files}

        def verify_and_open() -> SegmentReader:
            verify_files(paths, entry.files)
            return SegmentReader.open(entry.id, paths, schema)

        try:
            return await self._compute.run(verify_and_open)
        except FileNotFoundError as error:
            raise NotFound(f"segment {entry.id} was collected while being opened") from error

    async def tombstones(self, entry: SegmentEntry) -> BitMap:
        """Returns the rows that the manifest marks dead."""
        if entry.tombstones is None:
            return BitMap()
        body = await self._store.get(entry.tombstones.key)
        if body is None:
            raise NotFound(f"{entry.tombstones.key} is gone")
        check_digest(body, entry.tombstones)
        dead = decode_tombstones(body, entry.rows, key=entry.tombstones.key)
        if len(dead) != entry.dead:
            raise Corrupt(
                f"{entry.tombstones.key} marks {len(dead)} rows dead, the manifest says {entry.dead}"
            )
        return dead

    def forget(self, segment: SegmentId) -> None:
        """Removes the fetched files of a segment; mapped ones stay readable until closed."""
        folder = self._cache / segment
        if folder.is_dir():
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()

    async def _local(self, file: FileEntry) -> Path:
        in_place = self._store.local_path(file.key)
        if in_place is not None:
            return in_place
        path = self._cache / file.key.rsplit("/", 2)[1] / file.name
        if path.exists() and path.stat().st_size == file.size_bytes:
            return path
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as out:
            for start in range(0, file.size_bytes, FETCH_PIECE_BYTES):
                length = min(FETCH_PIECE_BYTES, file.size_bytes - start)
                piece = await self._store.get_range(file.key, start, length)
                if piece is None:
                    raise NotFound(f"{file.key} is gone")
                await self._compute.run(lambda piece=piece: out.write(piece))
        partial.rename(path)
        return path


def check_digest(body: bytes, file: FileEntry) -> None:
    """Raises Corrupt naming the object unless its bytes have the listed size and sha256."""
    digest = hashlib.sha256(body).hexdigest()
    if len(body) != file.size_bytes or digest != file.sha256:
        raise Corrupt(
            f"{file.key} has {len(body)} bytes with sha256 {digest}; "
            f"the manifest lists {file.size_bytes} with {file.sha256}"
        )
