"""Rows that are durable in the WAL but not yet in a segment; searched exactly.

A memtable covers a contiguous range of WAL slots that starts at `start_slot`. Rows are appended and
never moved; a row dies when a later operation replaces or deletes its id. Only the shard's event
loop writes; readers get views (`MemtableView`) that later writes do not disturb: rows past the
view's count do not exist for it, and the alive flags are replaced, never changed, by a kill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.ids import SegmentId, Slot
from shoal_cluster.domain.point import Vectors, decode_tail, row_hash
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.filtering.memory_columns import MemoryColumns

_CAPACITY_FIRST = 256


@dataclass(frozen=True, slots=True)
class MemtableView:
    """A memtable at one moment: its first `rows` rows, of which `alive` says which live."""

    memtable: "Memtable"
    rows: int
    live: int
    vectors: Vectors
    alive: npt.NDArray[np.bool_]

    def live_rows(self) -> npt.NDArray[np.int64]:
        """Returns the row numbers that live, ascending."""
        return np.flatnonzero(self.alive[: self.rows])


class Memtable:
    """Invariant T-1: at most one live row an id; `touched` names every id an operation named.

    empty_from: between it and start_slot lie slots without operations, as a patch of points that
    are not there leaves one; a manifest may cut the log anywhere among them.
    """

    def __init__(
        self, schema: CollectionSchema, start_slot: Slot, empty_from: Slot | None = None
    ) -> None:
        self.schema = schema
        self.start_slot = start_slot
        self.empty_from = start_slot if empty_from is None else empty_from
        self.ids: list[bytes] = []
        self.tails: list[bytes] = []
        self.seqs: list[int] = []
        self.hashes: list[int] = []
        self.row_of: dict[bytes, int] = {}
        self.deleted: set[bytes] = set()
        self._kills: dict[SegmentId, list[npt.NDArray[np.int64]]] = {}
        self.operations = 0
        self.size_bytes = 0
        self.live = 0
        self._vectors: Vectors = np.empty((_CAPACITY_FIRST, schema.dimension), dtype=np.float32)
        self._alive = np.ones(_CAPACITY_FIRST, dtype=np.bool_)
        self.columns = MemoryColumns(schema.attributes)

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def vectors(self) -> Vectors:
        """All rows, dead ones included: (rows, dimension). Valid until the next append."""
        return self._vectors[: len(self.ids)]

    def touched(self) -> list[bytes]:
        """Returns every id that an operation of this memtable named."""
        return [*self.row_of, *self.deleted]

    def view(self) -> MemtableView:
        return MemtableView(
            memtable=self,
            rows=len(self.ids),
            live=self.live,
            vectors=self.vectors,
            alive=self._alive,
        )

    def append(
        self, ids: Sequence[bytes], vectors: Vectors, tails: Sequence[bytes], seqs: Sequence[int]
    ) -> int:
        """Adds live rows; ids are distinct and not live here. Returns the sum of their hashes."""
        first = len(self.ids)
        self._reserve(first + len(ids))
        self._vectors[first : first + len(ids)] = vectors
        width = vectors.shape[1] * 4
        block = self._vectors[first : first + len(ids)].data.cast("B") if ids else memoryview(b"")
        declared = self.schema.attributes.keys()
        total = 0
        for offset, (point_id, tail, seq) in enumerate(zip(ids, tails, seqs, strict=True)):
            start = offset * width
            hashed = row_hash(point_id, seq, block[start : start + width], tail)
            total += hashed
            self.hashes.append(hashed)
            self.row_of[point_id] = first + offset
            self.deleted.discard(point_id)
            attributes = decode_tail(tail)[1]
            if not attributes.keys() <= declared:
                # Written under a newer schema than this replica has been told of. Applying is
                # total, so the value waits in the tail for `redeclare`.
                attributes = {name: attributes[name] for name in attributes.keys() & declared}
            self.columns.append(attributes)
            self.size_bytes += len(point_id) + len(tail) + width
        self.ids.extend(ids)
        self.tails.extend(tails)
        self.seqs.extend(seqs)
        self.live += len(ids)
        return total

    def find(self, point_id: bytes) -> int | None:
        """Returns the live row of an id, or None."""
        row = self.row_of.get(point_id)
        return row if row is not None and self._alive[row] else None

    def kill(self, rows: Sequence[int]) -> int:
        """Marks live rows dead. Returns the sum of their hashes."""
        self._alive = self._alive.copy()
        self._alive[list(rows)] = False
        self.live -= len(rows)
        return sum(self.hashes[row] for row in rows)

    def live_sum(self) -> int:
        """Returns the sum of the live rows' hashes."""
        return sum(self.hashes[row] for row in np.flatnonzero(self._alive[: len(self.ids)]))

    def note_deleted(self, ids: Sequence[bytes]) -> None:
        self.deleted.update(ids)

    def note_segment_kills(self, segment: SegmentId, rows: npt.NDArray[np.int64]) -> None:
        """Remembers rows of a segment that operations of this memtable replaced or deleted."""
        self._kills.setdefault(segment, []).append(rows)

    def replace_segment_kills(self, kills: Mapping[SegmentId, npt.NDArray[np.int64]]) -> None:
        """Forgets what was noted of other segments; these are the installed ones now."""
        self._kills = {segment: [rows] for segment, rows in kills.items()}

    def killed_rows(self, segment: SegmentId) -> npt.NDArray[np.int64]:
        """Returns the rows of a segment that this memtable killed."""
        parts = self._kills.get(segment)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def redeclare(self, schema: CollectionSchema) -> None:
        """Builds the columns again after attributes were added."""
        declared = schema.attributes
        self.schema = schema
        columns = MemoryColumns(schema.attributes)
        for tail in self.tails:
            attributes = decode_tail(tail)[1]
            columns.append({name: attributes[name] for name in attributes if name in declared})
        # Replaced whole: a search in another thread may hold the columns it began with.
        self.columns = columns

    def memory_bytes(self) -> int:
        """Returns an estimate of the resident memory: array capacity plus stored bytes."""
        return self._vectors.nbytes + self.size_bytes + 200 * len(self.ids)

    def _reserve(self, rows: int) -> None:
        capacity = len(self._alive)
        if rows <= capacity:
            return
        # Readers keep the arrays they were given: growing replaces both.
        grown = max(rows, 2 * capacity)
        vectors = np.empty((grown, self._vectors.shape[1]), dtype=np.float32)
        vectors[: len(self.ids)] = self._vectors[: len(self.ids)]
        alive = np.ones(grown, dtype=np.bool_)
        alive[: len(self.ids)] = self._alive[: len(self.ids)]
        self._vectors = vectors
        self._alive = alive
