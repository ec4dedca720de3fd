"""Decides which segments to merge. Pure.

Tiered, as in most log-structured stores: segments of about one size are merged when there are
COMPACTION_FAN_IN of them, so a row is rewritten about log(n) times; a segment that is mostly dead
is rewritten by itself. Smaller ones that are there are merged along: they skip a tier each.
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
    smaller: list[SegmentEntry] = []
    for _, members in sorted(tiers.items()):
        chosen = _fitting(members, limits.SEGMENT_ROWS_MAX)
        if len(chosen) >= limits.COMPACTION_FAN_IN:
            left = limits.SEGMENT_ROWS_MAX - sum(segment.live for segment in chosen)
            return (*chosen, *_fitting(smaller, left))
        smaller += members
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


def _fitting(segments: Sequence[SegmentEntry], rows_max: int) -> list[SegmentEntry]:
    """Returns as many segments as have `rows_max` rows together, the smallest first."""
    fitting = []
    for segment in sorted(segments, key=lambda segment: segment.live):
        rows_max -= segment.live
        if rows_max < 0:
            break
        fitting.append(segment)
    return fitting


def _tier(rows: int) -> int:
    tier = 0
    size = limits.SEAL_OPERATIONS * _TIER_GROWTH
    while rows > size:
        tier += 1
        size *= _TIER_GROWTH
    return tier
