"""The readable state of one replica: segments, memtables and a position in the shard's order.

Every replica of a shard holds a ShardState and feeds it the same records in the same order, so two
states at one position are equal; `sum` (the set checksum of live rows) tells when they are not.
Pure: no I/O, no clock. Written only by the shard's event loop; readers take a `Snapshot`.

Invariants:
R-1 a record is applied only at slot `slot + 1`.
R-2 at most one live row an id over all segments and memtables.
R-3 installing a manifest does not change `sum` at an unchanged position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import Epoch, SegmentId, Seq, Slot
from shoal_cluster.domain.point import SUM_MODULUS
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Position
from shoal_cluster.manifest.manifest import Manifest, SegmentEntry
from shoal_cluster.segment.deletes import alive_bits
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.dedup import Answer, Dedup
from shoal_cluster.shard.memtable import Memtable, MemtableView
from shoal_cluster.wal.record import OperationBatch, RecordKind, WalRecord

_LOOKUP_ONE_MAX = 4
"""Up to here single lookups are cheaper than the vectorised one (numpy's fixed cost a call)."""


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A segment at one moment.

    sealed_dead: rows dead in the manifest. alive: packed little-endian bits of the rows that live
    now, memtable operations included; None when every row lives.
    """

    entry: SegmentEntry
    reader: SegmentReader
    sealed_dead: BitMap
    alive: npt.NDArray[np.uint8] | None
    live: int

    def is_alive(self, row: int) -> bool:
        return self.alive is None or bool(self.alive[row >> 3] >> (row & 7) & 1)

    def alive_among(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns those of `rows` that live."""
        if self.alive is None:
            return rows
        kept: npt.NDArray[np.int64] = rows[(self.alive[rows >> 3] >> (rows & 7)) & 1 == 1]
        return kept

    def without(self, rows: npt.NDArray[np.int64]) -> "SegmentView":
        """Returns the view with live, distinct rows marked dead; the old view is untouched."""
        count = self.reader.rows
        alive = alive_bits(count, BitMap()) if self.alive is None else self.alive.copy()
        np.bitwise_and.at(alive, rows >> 3, (~(1 << (rows & 7)) & 0xFF).astype(np.uint8))
        return replace(self, alive=alive, live=self.live - len(rows))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a read sees: immutable, cheap to take, consistent with one position."""

    position: Position
    slot: Slot
    segments: tuple[SegmentView, ...]
    memtables: tuple[MemtableView, ...]
    live: int
    sum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SealPoint:
    """The state at the end of a frozen memtable: what its manifest will say of the position."""

    memtable: Memtable
    floor_slot: Slot
    floor_epoch: Epoch
    floor_seq: Seq
    dedup: list[Any]
    sum: int


def open_view(entry: SegmentEntry, reader: SegmentReader, dead: BitMap) -> SegmentView:
    """Returns the view of a segment as its manifest describes it."""
    return SegmentView(
        entry=entry,
        reader=reader,
        sealed_dead=dead,
        alive=alive_bits(reader.rows, dead) if dead else None,
        live=reader.rows - len(dead),
    )


class ShardState:
    """Starts empty before the first slot; `install` loads a manifest, `apply` adds a record."""

    def __init__(self, schema: CollectionSchema) -> None:
        self.schema = schema
        self.slot = Slot(0)
        self.epoch = Epoch(0)
        self.seq = Seq(0)
        self.sum = 0
        self.live = 0
        self.dedup = Dedup()
        self.last_put_id = bytes(16)
        self.segments: dict[SegmentId, SegmentView] = {}
        self.memtables: list[Memtable] = [Memtable(schema, Slot(1))]
        self._snapshot: Snapshot | None = None

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.seq)

    @property
    def active(self) -> Memtable:
        """The memtable that takes the next operation."""
        return self.memtables[-1]

    @property
    def unsealed_rows(self) -> int:
        return sum(memtable.live for memtable in self.memtables)

    def snapshot(self) -> Snapshot:
        """Returns the present state; the same object until something changes."""
        if self._snapshot is None:
            self._snapshot = Snapshot(
                position=self.position,
                slot=self.slot,
                segments=tuple(self.segments.values()),
                memtables=tuple(memtable.view() for memtable in self.memtables if memtable.rows),
                live=self.live,
                sum=self.sum,
            )
        return self._snapshot

    def apply(self, record: WalRecord) -> None:
        """Applies the next record. Total: any record that was appended can be applied.

        Raises: Corrupt when the record does not follow (R-1): the log or the caller is broken.
        """
        if record.slot != self.slot + 1 or record.first_seq != self.seq + 1:
            raise Corrupt(
                f"record of slot {record.slot}, seq {record.first_seq} does not follow slot "
                f"{self.slot}, seq {self.seq} (R-1)"
            )
        if record.memtable_start == record.slot and self.active.start_slot != record.slot:
            self._start_memtable(record.slot)
        if record.kind is RecordKind.DATA:
            self._apply_operations(record)
        self.slot = record.slot
        self.epoch = record.epoch
        self.last_put_id = record.put_id
        self._snapshot = None

    def rotate(self) -> SealPoint:
        """Freezes the active memtable at the current slot and returns what sealing it needs."""
        frozen = self.active
        point = SealPoint(
            memtable=frozen,
            floor_slot=self.slot,
            floor_epoch=self.epoch,
            floor_seq=self.seq,
            dedup=self.dedup.snapshot(),
            sum=self.sum,
        )
        self._start_memtable(Slot(self.slot + 1))
        return point

    def can_install(self, manifest: Manifest) -> bool:
        """Says whether the memtables can be cut at the manifest's floor without splitting one."""
        floor = manifest.floor_slot
        if floor >= self.slot:
            return True
        return any(memtable.start_slot == floor + 1 for memtable in self.memtables)

    def install(self, manifest: Manifest, views: Sequence[SegmentView]) -> None:
        """Replaces the sealed part of the state by a manifest's.

        views: `open_view` of each of its segments. Requires can_install(manifest). Operations after
        the floor are kept and their kills worked out again on the new segments.

        Raises: Corrupt when the live rows' checksum changed though the position did not (R-3).
        """
        before = (self.slot, self.sum)
        self.segments = {view.entry.id: view for view in views}
        kept = [
            memtable for memtable in self.memtables if memtable.start_slot > manifest.floor_slot
        ]
        if manifest.floor_slot > self.slot:
            self.slot = manifest.floor_slot
            self.epoch = manifest.floor_epoch
            self.seq = manifest.floor_seq
            self.dedup = Dedup.restore(manifest.dedup)
            self.last_put_id = bytes(16)
        self.memtables = kept or [Memtable(self.schema, Slot(self.slot + 1))]
        self.sum = manifest.sum
        self.live = sum(segment.live for segment in manifest.segments)
        for memtable in self.memtables:
            memtable.kills.clear()
            self._kill_in_segments(memtable.touched(), memtable)
            self.live += memtable.live
            self.sum += sum(memtable.hashes[row] for row in memtable.view().live_rows())
        self.sum %= SUM_MODULUS
        self._snapshot = None
        if before[0] == self.slot and before[1] != self.sum:
            raise Corrupt(
                f"manifest {manifest.version} changed the live rows at slot {self.slot}: checksum "
                f"{before[1]:016x} became {self.sum:016x} (R-3)"
            )

    def alter(self, schema: CollectionSchema) -> None:
        """Takes newly declared attributes: the memtables' columns are built again."""
        self.schema = schema
        for memtable in self.memtables:
            memtable.redeclare(schema)
        self._snapshot = None

    def exists(self, point_id: bytes) -> bool:
        return self.locate(point_id) is not None

    def locate(self, point_id: bytes) -> "RowPlace | None":
        """Returns where the live row of an id is, or None."""
        for memtable in reversed(self.memtables):
            row = memtable.find(point_id)
            if row is not None:
                return RowPlace(memtable=memtable, segment=None, row=row)
        for view in self.segments.values():
            row = view.reader.lookup_one(point_id)
            if row >= 0 and view.is_alive(row):
                return RowPlace(memtable=None, segment=view, row=row)
        return None

    def _start_memtable(self, start: Slot) -> None:
        if self.active.operations == 0:
            self.memtables.pop()
        self.memtables.append(Memtable(self.schema, start))
        self._snapshot = None

    def _apply_operations(self, record: WalRecord) -> None:
        batch = record.batch
        memtable = self.active
        self._kill_in_segments(batch.ids, memtable)
        last_of: dict[bytes, int] = {point_id: i for i, point_id in enumerate(batch.ids)}
        self._kill_in_memtables(last_of)
        deleted = [point_id for point_id, i in last_of.items() if not batch.upserts[i]]
        memtable.note_deleted(deleted)
        kept = sorted(i for i in last_of.values() if batch.upserts[i])
        self._append_rows(memtable, record, kept)
        memtable.operations += len(batch)
        for mark in batch.requests:
            first = Seq(record.first_seq + mark.first)
            self.dedup.remember(
                mark.client_id,
                mark.request_no,
                Answer(
                    epoch=record.epoch,
                    last_seq=Seq(first + mark.operations - 1),
                    first_seq=first,
                    affected=mark.affected,
                    more=mark.more,
                ),
            )
        self.seq = record.last_seq

    def _append_rows(self, memtable: Memtable, record: WalRecord, kept: Sequence[int]) -> None:
        """Appends the surviving upserts of a batch (the last of each id)."""
        if not kept:
            return
        batch = record.batch
        ids, tails, vectors = batch.ids, batch.tails, batch.vectors
        if len(kept) != len(batch):
            # Row of the vectors for operation i: how many upserts came before it.
            rank = np.cumsum(np.frombuffer(batch.upserts, dtype=np.uint8)) - 1
            rows = rank[kept]
            ids = [batch.ids[i] for i in kept]
            tails = [batch.tails[row] for row in rows]
            vectors = batch.vectors[rows]
        added = memtable.append(ids, vectors, tails, [record.first_seq + i for i in kept])
        self.live += len(ids)
        self.sum = (self.sum + added) % SUM_MODULUS

    def _kill_in_memtables(self, ids: dict[bytes, int]) -> None:
        for memtable in self.memtables:
            if not memtable.live:
                continue
            rows = [row for row in map(memtable.find, ids) if row is not None]
            if rows:
                self.sum = (self.sum - memtable.kill(rows)) % SUM_MODULUS
                self.live -= len(rows)

    def _kill_in_segments(self, ids: Sequence[bytes], memtable: Memtable) -> None:
        """Marks the segments' live rows of `ids` dead and notes them as the memtable's doing."""
        for segment_id, view in self.segments.items():
            rows = _lookup(view.reader, ids)
            rows = view.alive_among(np.unique(rows[rows >= 0]))
            if not len(rows):
                continue
            self.segments[segment_id] = view.without(rows)
            memtable.note_segment_kills(segment_id, rows)
            self.live -= len(rows)
            removed = int(view.reader.row_hashes[rows].sum(dtype=np.uint64))
            self.sum = (self.sum - removed) % SUM_MODULUS


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlace:
    """Where a live row is: in a memtable or in a segment."""

    memtable: Memtable | None
    segment: SegmentView | None
    row: int

    @property
    def seq(self) -> int:
        if self.memtable is not None:
            return self.memtable.seqs[self.row]
        assert self.segment is not None
        return int(self.segment.reader.seqs[self.row])

    @property
    def tail(self) -> bytes:
        if self.memtable is not None:
            return self.memtable.tails[self.row]
        assert self.segment is not None
        return self.segment.reader.tail(self.row)

    @property
    def vector(self) -> npt.NDArray[np.float32]:
        if self.memtable is not None:
            row: npt.NDArray[np.float32] = self.memtable.vectors[self.row]
            return row
        assert self.segment is not None
        return self.segment.reader.vector(self.row)


def _lookup(reader: SegmentReader, ids: Sequence[bytes]) -> npt.NDArray[np.int64]:
    if len(ids) <= _LOOKUP_ONE_MAX:
        return np.array([reader.lookup_one(point_id) for point_id in ids], dtype=np.int64)
    return reader.lookup(ids)


def empty_batch(dimension: int) -> OperationBatch:
    """Returns a batch without operations."""
    return OperationBatch(
        requests=(),
        ids=(),
        upserts=b"",
        vectors=np.empty((0, dimension), dtype=np.float32),
        tails=(),
    )
