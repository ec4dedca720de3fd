"""Chooses how a segment search uses a filter, from how many rows pass it. Pure.

The filter decides the plan, not the index: few rows are gathered and compared exactly, many go as
a bitmap into the scan of the codes. Recall holds under every filter either way.

Measured on one thread, 100,000 rows, k = 10 (design/search.md has recall for the same plans):

    dimension   gather 1,000   2,000   4,000 rows   scan with bitmap, rescored
           96           0.04    0.16    0.35 ms                  0.34 … 0.56 ms
          384           0.23    0.47    1.01 ms                  0.67 … 0.97 ms
        1,024           0.53    1.10    4.31 ms                  0.92 … 2.57 ms
"""

import enum
from dataclasses import dataclass


class FilterPlan(enum.Enum):
    NONE_MATCH = "none_match"
    """No live row passes: nothing to search."""
    ALL_MATCH = "all_match"
    """Every live row passes: search as if there were no filter."""
    GATHER = "gather"
    """Compare the query with exactly the rows that pass."""
    SCAN_BITMAP = "scan_bitmap"
    """Scan the codes under a bitmap of the rows that pass, then rescore."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoice:
    """A plan and why, for `explain`."""

    plan: FilterPlan
    reason: str


GATHER_SHARE_MAX = 0.02
"""Gathering 2 % costs about what scanning everything does: a gathered row is read whole from
memory in no order, 40 times the time of its 4-bit codes in a sequential scan."""

GATHER_FLOATS_MAX = 400_000
"""Up to this many floats (1,041 rows of 384) gathering takes a quarter of a millisecond, however
small the segment; being exact is worth that."""

RESCORED_PER_HIT = 10
"""A scan rescores at least this many rows for each hit, so gathering as many costs nothing more."""


def choose_plan(*, matching: int, live: int, dimension: int, k: int) -> PlanChoice:
    """Returns how to search the rows that pass a filter, with the reason.

    matching: live rows that pass. live: rows of the segment that are not deleted.
    """
    if matching <= 0:
        return PlanChoice(plan=FilterPlan.NONE_MATCH, reason=f"0 of {live} rows match")
    if matching >= live:
        return PlanChoice(plan=FilterPlan.ALL_MATCH, reason=f"all {live} rows match")
    gathered_max = gather_rows_max(live=live, dimension=dimension, k=k)
    share = f"{matching} of {live} rows match ({matching / live:.2%})"
    if matching <= gathered_max:
        reason = f"{share}, at most {gathered_max}: compared exactly"
        return PlanChoice(plan=FilterPlan.GATHER, reason=reason)
    reason = f"{share}, more than {gathered_max}: bitmap into the scan"
    return PlanChoice(plan=FilterPlan.SCAN_BITMAP, reason=reason)


def gather_rows_max(*, live: int, dimension: int, k: int) -> int:
    """Returns up to how many matching rows gathering is no dearer than scanning."""
    return max(int(GATHER_SHARE_MAX * live), GATHER_FLOATS_MAX // dimension, RESCORED_PER_HIT * k)
