"""Decides which segments to merge. Pure.

Tiered, as in most log-structured stores: segments of about one size are merged when there are
COMPACTION_FAN_IN of them, so a row is rewritten about log(n) times; a segment that is mostly dead
is rewritten by itself.
"""

from collections.abc import Sequence

from shoal_cluster.domain import limits
from shoal_cluster.manifest.manifest import SegmentEntry

_TIER_GROWTH = limits.COMPACTION_FAN_IN
_SETTLE_FRACTION_MIN = 1 / 8
"""The largest segment is rewritten only with so much beside it: at most eight times in all."""
_DEAD_FRACTION_MAX = 0.5


def plan_compaction(segments: Sequence[SegmentEntry]) -> tuple[SegmentEntry, ...]:
    """Returns the segments to merge into one, or () when nothing is worth it."""
    tiers: dict[int, list[SegmentEntry]] = {}
    for segment in segments:
        if segment.dead > _DEAD_FRACTION_MAX * segment.rows:
            return (segment,)
        tiers.setdefault(_tier(segment.live), []).append(segment)
    for _, members in sorted(tiers.items()):
        chosen: list[SegmentEntry] = []
        rows = 0
        for segment in sorted(members, key=lambda member: member.live):
            if rows + segment.live > limits.SEGMENT_ROWS_MAX:
                break
            chosen.append(segment)
            rows += segment.live
        if len(chosen) >= limits.COMPACTION_FAN_IN:
            return tuple(chosen)
    return ()


def plan_settling(segments: Sequence[SegmentEntry]) -> tuple[SegmentEntry, ...]:
    """Returns what a shard that nobody writes to should merge: fewer segments, cheaper searches.

    Everything, when what lies beside the largest segment is worth rewriting it; else the small
    ones among themselves.
    """
    if len(segments) < 2:
        return ()
    *rest, largest = sorted(segments, key=lambda segment: segment.live)
    beside = sum(segment.live for segment in rest)
    if (
        beside >= _SETTLE_FRACTION_MIN * largest.live
        and beside + largest.live <= limits.SETTLE_ROWS_MAX
    ):
        return tuple(segments)
    if len(rest) > 1 and beside <= limits.SETTLE_ROWS_MAX:
        return tuple(rest)
    return ()


def _tier(rows: int) -> int:
    tier = 0
    size = limits.SEAL_OPERATIONS * _TIER_GROWTH
    while rows > size:
        tier += 1
        size *= _TIER_GROWTH
    return tier
