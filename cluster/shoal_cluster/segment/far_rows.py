"""Asks again, and deeper, where every allowed row is far from the query (rank_sample.py notices).

Two ways are sure: comparing all allowed rows, or rescoring as deep as the segment measured where
its nearest rows are left out. Both are made for the worst filter, one cut at a distance from this
very query. Most filters that leave far rows only are cut otherwise, by language or section, and a
few hundred candidates hold their nearest rows. So a shallower scan is tried first and judges
itself: where codes rank well, the nearest of the rescored rows stand early among the candidates;
where codes tell nothing, anywhere. Measured in docs/design/index-families.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal_cluster.index.calibration import K_CLASSES, RecallCurve
from shoal_cluster.index.distances import Keys, Rows
from shoal_cluster.index.families import Effort
from shoal_cluster.index.settings import effort_beyond

FIRST_FACTOR: Final = 64
"""Candidates a hit of the first try: 640 at ten hits, an eighth of 5,000 far rows."""

STEP: Final = 4
"""Each try is so many times as deep as the one before, and rows that stand in the first quarter
would have been found by the one before."""

SCAN_PARTS: Final = 2
"""The filtered scan has the depth that reaches the target where the curve holds, so that up to
HITS_ALONE_TARGET_MAX it is enough that its hits stand in the first half."""

TRIED_COST_MAX: Final = 0.5
"""A try costs at most this share of the sure way, since it may have been for nothing."""

HITS_ALONE_TARGET_MAX: Final = 0.95
"""Up to here the hits are judged, ten at least. Ten tell one late row in twenty from none only by
luck, so above, twice as many of the nearest rows are judged."""

LATE_HITS_MAX: Final = 0.05
"""So many of the hits may be late: none of ten. With one of ten a filter that one near row in 500
passes lost 0.014 of a recall of 0.95."""

LATE_SHARE_MAX: Final = 0.1
"""So many may be late where twice as many rows are judged, half of which are no hits: two of 20."""

LATE_A_MISS: Final = 10.0
"""The same in misses that the target allows, for targets above 0.99: there, none of 20."""

HOPELESS_SHARE: Final = 0.4
"""With more late rows than this a deeper try would not settle either: the sure way is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SureWay:
    """effort: how deep to look whatever the filter; None: compare every allowed row."""

    effort: Effort | None
    cost_ns: float


def sure_way(
    curve: RecallCurve,
    recall_target: float,
    k: int,
    *,
    lists: int,
    beyond: float,
    scan_ns: Callable[[Effort], float],
    gather_ns: float,
) -> SureWay:
    """Returns the cheaper of the two ways that reach the target under any filter.

    beyond: share of all rows that are nearer than the k-th hit and not allowed. gather_ns: cost of
    comparing all allowed rows.
    """
    effort = effort_beyond(curve, recall_target, k, lists=lists, beyond=beyond)
    if effort is None or scan_ns(effort) >= gather_ns:
        return SureWay(effort=None, cost_ns=gather_ns)
    return SureWay(effort=effort, cost_ns=scan_ns(effort))


def try_depths(
    k: int,
    recall_target: float,
    *,
    shallowest: int,
    allowed: int,
    lists: int,
    cost_ns: Callable[[Effort], float],
    sure_ns: float,
    scan: Callable[[Effort], tuple[Keys, Rows, Keys]],
) -> tuple[Keys, Rows] | None:
    """Returns the k nearest of a scan that is deep enough; None: only the sure way will do.

    shallowest: the depth that was not enough to know. allowed: rows that may be returned. cost_ns:
    of a scan. sure_ns: of the sure way. scan: returns what `rescored_top_k` does for one query.
    """
    depth = max(shallowest, FIRST_FACTOR * max(k, K_CLASSES[0]))
    while depth < allowed:
        effort = Effort(depth=depth, probes=lists)
        if cost_ns(effort) > TRIED_COST_MAX * sure_ns:
            return None
        keys, rows, candidates = scan(effort)
        if settles(candidates[0], k, recall_target):
            return keys[0], rows[0]
        if late_share(candidates[0], rows_judged(k, recall_target)) > HOPELESS_SHARE:
            return None
        depth *= STEP
    return None


def suffices(keys: Keys, k: int, recall_target: float) -> bool:
    """Returns whether the filtered scan itself was deep enough. keys: as in `settles`."""
    alone = recall_target <= HITS_ALONE_TARGET_MAX
    return _is_early(keys, k, recall_target, SCAN_PARTS if alone else STEP)


def settles(keys: Keys, k: int, recall_target: float) -> bool:
    """Returns whether a try was deep enough. keys: exact, (m,), best by code first."""
    return _is_early(keys, k, recall_target, STEP)


def _is_early(keys: Keys, k: int, recall_target: float, parts: int) -> bool:
    judged = rows_judged(k, recall_target)
    if keys.size < parts * judged:
        return False
    tolerated = LATE_HITS_MAX
    if recall_target > HITS_ALONE_TARGET_MAX:
        tolerated = min(LATE_SHARE_MAX, LATE_A_MISS * (1.0 - recall_target))
    return late_share(keys, judged, parts) <= tolerated


def rows_judged(k: int, recall_target: float) -> int:
    hits = max(k, K_CLASSES[0])
    return hits if recall_target <= HITS_ALONE_TARGET_MAX else 2 * hits


def late_share(keys: Keys, judged: int, parts: int = STEP) -> float:
    """Returns which share of the nearest candidates stand behind the first of so many parts.

    keys: (m,) exact keys, best by code first; m is at least `judged`, the number of nearest rows.
    """
    nearest = np.argpartition(keys, judged - 1)[:judged]
    return float(np.count_nonzero(nearest >= keys.size // parts)) / judged
