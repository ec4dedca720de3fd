"""What clients of the model saw, and what must hold of it.

H-1  an acknowledged row is present after recovery;
H-2  a strong read contains every row acknowledged before the read began;
H-3  of two strong reads that do not overlap, the later contains the earlier;
H-4  what a strong read returned is present after recovery (no dirty read);
H-5  a session read contains the row whose token it carries, on whichever replica it is answered;
H-6  nobody who follows the log meets an object that does not follow what it has: its sequence
     number, its predecessor or its epoch. A shard where that happens is stuck for ever.
"""

import enum
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.model.bucket import Row, Rows


class ViolationKind(enum.Enum):
    ACKED_ROW_LOST = "acknowledged row lost"
    STALE_STRONG_READ = "stale strong read"
    STRONG_READS_WENT_BACK = "strong reads went back"
    DIRTY_READ = "row seen by a strong read, then gone"
    STALE_SESSION_READ = "stale session read"
    LOG_BROKEN = "log broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """places: the rows that were lost, missing or gone; the slots where a log is broken."""

    kind: ViolationKind
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrongRead:
    began: int
    ended: int
    rows: Rows


class Position(NamedTuple):
    """What an acknowledgement hands out as token, and what a replica says it has reached."""

    epoch: int
    seq: int


@dataclass(slots=True)
class History:
    """Times are steps of the bucket. stale_session_rows: what session reads missed (H-5).

    broken_slots: where somebody met an object that does not follow (H-6).
    """

    acked_at: dict[Row, int] = field(default_factory=dict)
    tokens: dict[Row, Position] = field(default_factory=dict)
    strong_reads: list[StrongRead] = field(default_factory=list)
    stale_session_rows: set[Row] = field(default_factory=set)
    broken_slots: set[int] = field(default_factory=set)
    takeovers: int = 0
    flushes: int = 0


def find_violation(history: History, recovered: Rows) -> Violation | None:
    """Returns the first breach of H-1 to H-6, or None. O(reads² + reads × acks)."""

    def breach(kind: ViolationKind, places: AbstractSet[int]) -> Violation:
        return Violation(kind=kind, places=tuple(sorted(places)))

    if lost := frozenset(history.acked_at) - recovered:
        return breach(ViolationKind.ACKED_ROW_LOST, lost)
    for read in history.strong_reads:
        due = frozenset(row for row, acked in history.acked_at.items() if acked <= read.began)
        if missing := due - read.rows:
            return breach(ViolationKind.STALE_STRONG_READ, missing)
    for earlier in history.strong_reads:
        for later in history.strong_reads:
            if earlier.ended <= later.began and (gone := earlier.rows - later.rows):
                return breach(ViolationKind.STRONG_READS_WENT_BACK, gone)
    for read in history.strong_reads:
        if gone := read.rows - recovered:
            return breach(ViolationKind.DIRTY_READ, gone)
    if history.stale_session_rows:
        return breach(ViolationKind.STALE_SESSION_READ, history.stale_session_rows)
    if history.broken_slots:
        return breach(ViolationKind.LOG_BROKEN, history.broken_slots)
    return None
