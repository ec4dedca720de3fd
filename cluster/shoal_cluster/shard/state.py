"""The readable state of one replica: segments, memtables and a position in the shard's order.

Every replica of a shard holds a ShardState and feeds it the same records in the same order, so two
states at one position are equal; `sum` (the set checksum of live rows) tells when they are not.
Pure: no I/O, no clock. Written only by the shard's event loop; readers take a `Snapshot`.

Invariants:
R-1 a record is applied only if it follows the one before: slot, sequence number, epoch, chain.
R-2 at most one live row an id over all segments and memtables.
R-3 installing a manifest does not change `sum` at an unchanged position.
R-4 the first memtable starts right behind the newest installed manifest's floor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import Epoch, SegmentId, Seq, Slot
from shoal_cluster.domain.point import SUM_MODULUS, row_hash
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Position
from shoal_cluster.manifest.manifest import Manifest, SegmentEntry
from shoal_cluster.segment.deletes import alive_bits
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.dedup import Answer, Dedup
from shoal_cluster.shard.memtable import Memtable, MemtableView
from shoal_cluster.wal.record import FIRST_PUT_ID, RecordKind, WalRecord

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
        # `at`, because several rows may share a byte.
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
    """The state at the end of the frozen memtables: what their manifest will say of the position.

    first_slot: where the first of them starts; together they cover first_slot..floor_slot.
    views: the memtables as they were then; later operations go on killing their rows.
    """

    memtables: tuple[Memtable, ...]
    views: tuple[MemtableView, ...]
    first_slot: Slot
    floor_slot: Slot
    floor_epoch: Epoch
    floor_seq: Seq
    floor_put_id: bytes
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
        self.last_put_id = FIRST_PUT_ID
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

        Raises: Corrupt when the record does not follow (R-1): the log or the caller is broken;
        nothing was applied.
        """
        found = (record.slot, record.first_seq, record.prev_put_id)
        if found != (self.slot + 1, self.seq + 1, self.last_put_id) or record.epoch < self.epoch:
            raise Corrupt(
                f"record of slot {record.slot}, seq {record.first_seq}, epoch {record.epoch}, "
                f"after put {record.prev_put_id.hex()} does not follow slot {self.slot}, "
                f"seq {self.seq}, epoch {self.epoch}, put {self.last_put_id.hex()} (R-1)"
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
        """Freezes all memtables at the current slot and returns what sealing them needs.

        More than one is there when a primary died after it froze one and before it sealed it.
        """
        point = SealPoint(
            memtables=tuple(self.memtables),
            views=tuple(memtable.view() for memtable in self.memtables),
            first_slot=self.memtables[0].start_slot,
            floor_slot=self.slot,
            floor_epoch=self.epoch,
            floor_seq=self.seq,
            floor_put_id=self.last_put_id,
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
        return any(
            memtable.empty_from <= floor + 1 <= memtable.start_slot for memtable in self.memtables
        )

    def install(self, manifest: Manifest, views: Sequence[SegmentView]) -> None:
        """Replaces the sealed part of the state by a manifest's.

        views: `open_view` of each of its segments. Requires can_install(manifest). Operations after
        the floor are kept and their kills worked out again on the new segments.

        Raises: Corrupt when the live rows' checksum would change though the position does not
        (R-3); nothing was changed.
        """
        assert self.can_install(manifest), f"floor {manifest.floor_slot} would split a memtable"
        # A bulk load raises the sequence number of the slot it is committed at.
        ahead = (manifest.floor_slot, manifest.floor_seq) > (self.slot, self.seq)
        kept = [
            memtable for memtable in self.memtables if memtable.start_slot > manifest.floor_slot
        ]
        segments = {view.entry.id: view for view in views}
        live = sum(segment.live for segment in manifest.segments)
        total = manifest.sum
        kills: list[_Kills] = []
        for memtable in kept:
            found = _find_live(segments, memtable.touched())
            for segment, rows in found.items():
                segments[segment] = segments[segment].without(rows)
            kills.append(found)
            total += memtable.live_sum() - _sum_of(segments, found)
            live += memtable.live - sum(map(len, found.values()))
        total %= SUM_MODULUS
        if not ahead and total != self.sum:
            raise Corrupt(
                f"manifest {manifest.version} would change the live rows at slot {self.slot}: "
                f"checksum {self.sum:016x} would become {total:016x} (R-3)"
            )
        if ahead:
            self.slot = manifest.floor_slot
            self.epoch = manifest.floor_epoch
            self.seq = manifest.floor_seq
            self.last_put_id = manifest.floor_put_id
            self.dedup = Dedup.restore(manifest.dedup)
        self.segments = segments
        self.memtables = kept or [Memtable(self.schema, Slot(self.slot + 1))]
        for memtable, found in zip(kept, kills, strict=True):
            memtable.replace_segment_kills(found)
        self.sum = total
        self.live = live
        self._snapshot = None

    def alter(self, schema: CollectionSchema) -> None:
        """Takes newly declared attributes: the memtables' columns are built again."""
        self.schema = schema
        for memtable in self.memtables:
            memtable.redeclare(schema)
        self._snapshot = None

    def replace_reader(self, segment: SegmentId, old: SegmentReader, new: SegmentReader) -> None:
        """Lets another reader of the same files serve a segment, if it still is served by `old`."""
        view = self.segments.get(segment)
        if view is not None and view.reader is old:
            self.segments[segment] = replace(view, reader=new)
            self._snapshot = None

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
        empty_from = None
        if self.active.operations == 0:
            empty_from = self.memtables.pop().empty_from
        self.memtables.append(Memtable(self.schema, start, empty_from))
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
                    slot=record.slot,
                ),
            )
        self.dedup.make_room()
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
        found = _find_live(self.segments, ids)
        for segment, rows in found.items():
            self.segments[segment] = self.segments[segment].without(rows)
            memtable.note_segment_kills(segment, rows)
            self.live -= len(rows)
        self.sum = (self.sum - _sum_of(self.segments, found)) % SUM_MODULUS


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
        return self.segment.reader.seq_of(self.row)

    @property
    def tail(self) -> bytes:
        if self.memtable is not None:
            return self.memtable.tails[self.row]
        assert self.segment is not None
        return self.segment.reader.tail(self.row)

    def check(self, point_id: bytes) -> None:
        """Compares a row of a segment with its hash; memtables hold what was just checked.

        Raises: Corrupt naming segment and row (S-4).
        """
        if self.segment is None:
            return
        reader = self.segment.reader
        vector = reader.vector(self.row).tobytes()
        found = row_hash(point_id, self.seq, vector, reader.tail(self.row))
        if found != int(reader.hashes_of(np.array([self.row]))[0]):
            raise Corrupt(
                f"row {self.row} of segment {reader.segment_id} does not match its hash (S-4)"
            )

    @property
    def vector(self) -> npt.NDArray[np.float32]:
        if self.memtable is not None:
            row: npt.NDArray[np.float32] = self.memtable.vectors[self.row]
            return row
        assert self.segment is not None
        return self.segment.reader.vector(self.row)


_Kills = Mapping[SegmentId, npt.NDArray[np.int64]]
"""Distinct rows by segment."""


def _find_live(segments: Mapping[SegmentId, SegmentView], ids: Sequence[bytes]) -> _Kills:
    """Returns where the live rows of `ids` are; segments without any are left out."""
    found = {}
    for segment, view in segments.items():
        rows = _lookup(view.reader, ids)
        rows = view.alive_among(np.unique(rows[rows >= 0]))
        if len(rows):
            found[segment] = rows
    return found


def _sum_of(segments: Mapping[SegmentId, SegmentView], rows_of: _Kills) -> int:
    """Returns the sum of the rows' hashes."""
    return sum(
        int(segments[segment].reader.hashes_of(rows).sum(dtype=np.uint64))
        for segment, rows in rows_of.items()
    )


def _lookup(reader: SegmentReader, ids: Sequence[bytes]) -> npt.NDArray[np.int64]:
    if len(ids) <= _LOOKUP_ONE_MAX:
        return np.array([reader.lookup_one(point_id) for point_id in ids], dtype=np.int64)
    return reader.lookup(ids)
