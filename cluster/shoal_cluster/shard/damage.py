"""What the scrubber found wrong with an object, and what that means for a replica. Pure values."""

import enum
from dataclasses import dataclass

from shoal_cluster.domain.ids import SegmentId


class Part(enum.Enum):
    """What a damaged object holds, hence who can replace it.

    MANIFEST, LOG, TOMBSTONES: a running primary has the contents in memory. DERIVED: a segment file
    that can be built from ROWS. ROWS: vectors, ids or payload; only a copy of the object helps.
    COPIED: any segment file in an object store, whose cached copy here is sound.
    """

    MANIFEST = "manifest"
    LOG = "log"
    TOMBSTONES = "tombstones"
    DERIVED = "derived"
    ROWS = "rows"
    COPIED = "copied"


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One object that failed its check. reason: names it.

    served: reads of this replica come from these very bytes (a mapped file), not from what was
    checked and copied when it was opened. fetched: it is our cached copy; the object may be sound.
    """

    part: Part
    key: str
    reason: str
    segment: SegmentId | None = None
    served: bool = False
    fetched: bool = False

    @property
    def advice(self) -> str:
        """Says in one sentence what becomes of it."""
        if self.fetched:
            return "it is a cached copy and is fetched again"
        if self.part is Part.ROWS:
            return (
                "rows are lost unless the object is put back from a copy of the bucket; the "
                "replica then opens by itself"
            )
        if self.part is Part.COPIED:
            return "the cached copy is sound; the shard's primary puts it again"
        return "the shard's primary replaces it"
