"""Decides which segments to merge. Pure.

Tiered, as in most log-structured stores: segments of about one size are merged when there are
COMPACTION_FAN_IN of them, so a row is rewritten about log(n) times; a segment that is mostly dead
is rewritten by itself. Smaller ones that are there are merged along: they skip a tier each. No plan
asks for more memory than a builder has (build_memory.py).
"""

from collections.abc import Sequence

from shoal_cluster.domain import limits
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.shard.build_memory import build_bytes

_TIER_GROWTH = limits.COMPACTION_FAN_IN
_SETTLE_FRACTION_MIN = 1 / 8
"""The largest segment is rewritten only with so much beside it: at most eight times in all."""
_DEAD_FRACTION_MAX = 0.5


def plan_compaction(segments: Sequence[SegmentEntry], dimension: int) -> tuple[SegmentEntry, ...]:
    """Returns the segments to merge into one, or () when nothing is worth it."""
    tiers: dict[int, list[SegmentEntry]] = {}
    for segment in segments:
        if segment.dead > _DEAD_FRACTION_MAX * segment.rows and _fits((segment,), dimension):
            return (segment,)
        tiers.setdefault(_tier(segment.live), []).append(segment)
    smaller: list[SegmentEntry] = []
    for _, members in sorted(tiers.items()):
        chosen = _fitting(members, dimension)
        if len(chosen) >= limits.COMPACTION_FAN_IN:
            return (*chosen, *_fitting(smaller, dimension, chosen))
        smaller += members
    return ()


def plan_settling(segments: Sequence[SegmentEntry], dimension: int) -> tuple[SegmentEntry, ...]:
    """Returns what a shard that nobody writes to should merge: fewer segments, cheaper searches.

    Everything, when what lies beside the largest segment is worth rewriting it; else the small
    ones among themselves.
    """
    if len(segments) < 2:
        return ()
    *rest, largest = sorted(segments, key=lambda segment: segment.live)
    beside = sum(segment.live for segment in rest)
    if beside >= _SETTLE_FRACTION_MIN * largest.live and _fits(segments, dimension):
        return tuple(segments)
    if len(rest) > 1 and _fits(rest, dimension):
        return tuple(rest)
    return ()


def _fitting(
    segments: Sequence[SegmentEntry], dimension: int, beside: Sequence[SegmentEntry] = ()
) -> list[SegmentEntry]:
    """Returns as many segments as one build can merge `beside` others, the smallest first."""
    fitting: list[SegmentEntry] = []
    for segment in sorted(segments, key=lambda segment: segment.live):
        if not _fits((*beside, *fitting, segment), dimension):
            break
        fitting.append(segment)
    return fitting


def _fits(segments: Sequence[SegmentEntry], dimension: int) -> bool:
    """Says whether one build can merge them, and the result is not too large."""
    return (
        sum(segment.live for segment in segments) <= limits.SEGMENT_ROWS_MAX
        and build_bytes(segments, dimension) <= limits.BUILD_MEMORY_BYTES_MAX
    )


def _tier(rows: int) -> int:
    tier = 0
    size = limits.SEAL_OPERATIONS * _TIER_GROWTH
    while rows > size:
        tier += 1
        size *= _TIER_GROWTH
    return tier
