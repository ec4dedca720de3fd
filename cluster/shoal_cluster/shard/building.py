"""Builds one segment from WAL slots and older segments. Bucket in, bucket out.

Runs outside the serving actors (actors/builder.py) or in process (tests, simulation). The result is
an entry for the manifest; only the shard's primary may commit it. A build that dies leaves objects
under a name that no manifest lists; garbage collection removes them.

Memory: at most BUILD_MEMORY_BYTES_MAX above an idle process, which planners estimate and builders
enforce (build_memory.py).
"""

import functools
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shoal_cluster.bucket.create import create_file_once
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Conflict, InvalidRequest, NotFound, Unavailable
from shoal_cluster.domain.ids import CollectionId, SegmentId, Seq, ShardNumber, Slot
from shoal_cluster.domain.keys import LoadKeys, ShardKeys
from shoal_cluster.domain.point import Vector, Vectors
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.manifest.manifest import FileEntry, SegmentEntry
from shoal_cluster.segment.build import SegmentInput, build_segment
from shoal_cluster.shard.compute import Compute
from shoal_cluster.shard.load_objects import read_rows
from shoal_cluster.shard.memtable import MemtableView
from shoal_cluster.shard.segment_files import SegmentFiles
from shoal_cluster.wal.log import Wal

_NO_SLOT = Slot(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    """What to build. wal_first..wal_last: slots whose surviving upserts go in (none if last is 0).

    sources: segments whose live rows go in (compaction). load, chunks: `rows` staged ones go in,
    with sequence numbers from first_seq on (docs/design/bulk-load.md). seed: for calibration and
    training.
    """

    schema: CollectionSchema
    shard: ShardNumber
    cluster_uuid: bytes
    segment: SegmentId
    wal_first: Slot = _NO_SLOT
    wal_last: Slot = _NO_SLOT
    sources: tuple[SegmentEntry, ...] = ()
    load: str = ""
    chunks: tuple[str, ...] = ()
    rows: int = 0
    first_seq: int = 1
    seed: int = 0

    @property
    def collection(self) -> CollectionId:
        return self.schema.id

    def to_wire(self) -> dict[str, Any]:
        return {
            "schema": self.schema.to_wire(),
            "shard": self.shard,
            "cluster_uuid": self.cluster_uuid,
            "segment": self.segment,
            "wal_first": self.wal_first,
            "wal_last": self.wal_last,
            "sources": [source.to_wire() for source in self.sources],
            "load": self.load,
            "chunks": self.chunks,
            "rows": self.rows,
            "first_seq": self.first_seq,
            "seed": self.seed,
        }

    @staticmethod
    def from_wire(fields: Mapping[str, Any]) -> "BuildOrder":
        return BuildOrder(
            schema=CollectionSchema.from_wire(fields["schema"]),
            shard=fields["shard"],
            cluster_uuid=fields["cluster_uuid"],
            segment=fields["segment"],
            wal_first=fields["wal_first"],
            wal_last=fields["wal_last"],
            sources=tuple(SegmentEntry.from_wire(source) for source in fields["sources"]),
            load=fields["load"],
            chunks=tuple(fields["chunks"]),
            rows=fields["rows"],
            first_seq=fields["first_seq"],
            seed=fields["seed"],
        )


class Builds(Protocol):
    """Port: carries out build orders somewhere."""

    async def build(
        self, order: BuildOrder, rows: SegmentInput | None = None
    ) -> SegmentEntry | None:
        """Returns the finished segment's entry, or None when no row survived.

        rows: what to build it from where the ordered slots cannot be read any more.

        Raises: Unavailable when the bucket did not answer, Internal when the builder died or met a
        bug (nothing committed; order again under a new segment id); Corrupt naming a source.
        """
        ...

    def expect_load(self) -> None:
        """Says that rows of a bulk load are being staged: what builds them may be started."""
        ...


class LocalBuilds:
    """Builds in this process."""

    def __init__(self, store: Store, scratch: Path, clock: Clock, compute: Compute) -> None:
        self._store = store
        self._scratch = scratch
        self._clock = clock
        self._compute = compute

    async def build(
        self, order: BuildOrder, rows: SegmentInput | None = None
    ) -> SegmentEntry | None:
        return await execute_build(
            order, self._store, self._scratch, self._clock, self._compute, rows
        )

    def expect_load(self) -> None:
        pass


async def execute_build(
    order: BuildOrder,
    store: Store,
    scratch: Path,
    clock: Clock,
    compute: Compute,
    rows: SegmentInput | None = None,
    threads: int = 1,
) -> SegmentEntry | None:
    """Carries out an order; see `Builds.build`. scratch: an existing directory.

    threads: that a segment of a bulk load is built on.

    Raises: Unavailable when the bucket does not answer or `scratch` is full; Corrupt naming a
    source that is damaged.
    """
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="build-") as folder:
            return await _build_in(Path(folder), order, store, clock, compute, rows, threads)
    except OSError as error:
        raise Unavailable(f"build {order.segment} cannot use {scratch}: {error}") from error


async def _build_in(
    directory: Path,
    order: BuildOrder,
    store: Store,
    clock: Clock,
    compute: Compute,
    rows: SegmentInput | None,
    threads: int,
) -> SegmentEntry | None:
    if rows is None:
        rows = await _collect_rows(order, store, directory, clock, compute)
    if not rows.ids:
        return None
    if not order.chunks:
        rows = _sort_by_id(rows)  # by this name, so that the unsorted ones are let go
    target = directory / "segment"
    target.mkdir()
    build = functools.partial(build_segment, rows, order.schema, target, seed=order.seed)
    if order.chunks:
        build = functools.partial(build, threads=threads)
    built = await compute.run(build)
    keys = ShardKeys(order.collection, order.shard)
    files = []
    for file in built.files:
        entry = FileEntry(
            name=file.name,
            key=keys.segment(order.segment) + file.name,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
        )
        await create_file_once(
            store,
            entry.key,
            file.path,
            sha256=file.sha256,
            size_bytes=file.size_bytes,
            clock=clock,
            deadline_s=None,
        )
        files.append(entry)
    return SegmentEntry(
        id=order.segment,
        files=tuple(files),
        rows=built.rows,
        min_seq=Seq(built.min_seq),
        max_seq=Seq(built.max_seq),
        tombstones=None,
        dead=0,
        sum=built.sum,
    )


async def _collect_rows(
    order: BuildOrder, store: Store, directory: Path, clock: Clock, compute: Compute
) -> SegmentInput:
    parts: list[SegmentInput] = []
    files = SegmentFiles(store, directory / "sources", compute)
    for source in order.sources:
        parts.append(await files.rows(source))
    if order.wal_last:
        parts.append(await _rows_of_wal(order, store, clock))
    if order.chunks:
        return await _rows_of_load(order, store)
    return SegmentInput(
        ids=[point_id for part in parts for point_id in part.ids],
        seqs=np.concatenate([part.seqs for part in parts]),
        vectors=np.concatenate([part.vectors for part in parts]),
        tails=[tail for part in parts for tail in part.tails],
    )


async def _rows_of_load(order: BuildOrder, store: Store) -> SegmentInput:
    """Returns staged rows in byte order of ids, numbered in the order of the chunks.

    Each vector is copied once, from its chunk to its place.

    Raises: NotFound naming a chunk that is gone; InvalidRequest naming an id that is there twice.
    """
    keys = LoadKeys(order.collection, order.shard, order.load)
    ids: list[bytes] = []
    tails: list[bytes] = []
    parts: deque[Vectors] = deque()
    for chunk in order.chunks:
        part = await read_rows(store, keys, chunk)
        if part is None:
            raise NotFound(f"chunk {chunk} of load {order.load} is gone: the load was aborted")
        ids.extend(part.ids)
        tails.extend(map(bytes, part.tails))
        parts.append(part.vectors)
    by_id = sorted(range(len(ids)), key=ids.__getitem__)
    sorted_ids = [ids[row] for row in by_id]
    for one, following in pairwise(sorted_ids):
        if one == following:
            raise there_twice(one)
    places = np.empty(len(ids), dtype=np.int64)
    places[by_id] = np.arange(len(ids))
    vectors = np.empty((order.rows, order.schema.dimension), dtype=np.float32)
    start = 0
    while parts:
        its_vectors = parts.popleft()  # and lets go of it
        stop = start + len(its_vectors)
        vectors[places[start:stop]] = its_vectors
        start = stop
    return SegmentInput(
        ids=sorted_ids,
        seqs=np.array(by_id, dtype=np.uint64) + np.uint64(order.first_seq),
        vectors=vectors,
        tails=[tails[row] for row in by_id],
    )


def there_twice(point_id: bytes) -> InvalidRequest:
    return InvalidRequest(
        f"the id {point_id.decode(errors='replace')!r} is in the load twice; which of the two to "
        "keep is not defined. Nothing was changed; abort the load and give it distinct ids",
        field="ids",
        limit="distinct ids in one load",
    )


async def _rows_of_wal(order: BuildOrder, store: Store, clock: Clock) -> SegmentInput:
    """Returns the rows that live after the ordered slots, by those slots alone."""
    wal = Wal(store, ShardKeys(order.collection, order.shard), order.cluster_uuid, clock)
    survivors: dict[bytes, tuple[int, Vector, bytes]] = {}
    expected = order.wal_first
    async for record in wal.replay(order.wal_first, order.wal_last):
        expected = Slot(record.slot + 1)
        batch = record.batch
        row = 0
        for i, point_id in enumerate(batch.ids):
            if batch.upserts[i]:
                survivors[point_id] = (record.first_seq + i, batch.vectors[row], batch.tails[row])
                row += 1
            else:
                survivors.pop(point_id, None)
    if expected != order.wal_last + 1:
        raise Conflict(
            f"slots up to {order.wal_last} were ordered but the log ends at {expected - 1}; "
            "another primary has moved on"
        )
    vectors = np.empty((len(survivors), order.schema.dimension), dtype=np.float32)
    for place, (_, vector, _) in enumerate(survivors.values()):
        vectors[place] = vector
    return SegmentInput(
        ids=list(survivors),
        seqs=np.array([seq for seq, _, _ in survivors.values()], dtype=np.uint64),
        vectors=vectors,
        tails=[tail for _, _, tail in survivors.values()],
    )


def rows_of_memtables(views: Sequence[MemtableView]) -> SegmentInput:
    """Returns the live rows of memtables: what a seal of their slots builds, without the log."""
    parts = [(view, view.live_rows()) for view in views]
    return SegmentInput(
        ids=[view.memtable.ids[row] for view, rows in parts for row in rows.tolist()],
        seqs=np.array(
            [view.memtable.seqs[row] for view, rows in parts for row in rows.tolist()],
            dtype=np.uint64,
        ),
        vectors=np.concatenate([view.vectors[rows] for view, rows in parts]),
        tails=[view.memtable.tails[row] for view, rows in parts for row in rows.tolist()],
    )


def _sort_by_id(rows: SegmentInput) -> SegmentInput:
    """Segments keep rows in byte order of ids, so that scroll is a merge."""
    order = sorted(range(len(rows.ids)), key=rows.ids.__getitem__)
    return SegmentInput(
        ids=[rows.ids[i] for i in order],
        seqs=rows.seqs[order],
        vectors=rows.vectors[order],
        tails=[rows.tails[i] for i in order],
    )
