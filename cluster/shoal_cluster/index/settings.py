"""The cheapest way to search a segment that its own recall curve says reaches a target. Pure."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shoal_cluster.index.calibration import K_CLASSES, RecallCurve
from shoal_cluster.index.families import Effort

RANK_MIN: Final = 100
"""Neighbours that have to be covered, however few are asked for. The ten nearest rows of a row are
in its own list more often than those of a query: at 100,000 × 384 (tests/bench) 79 of 632 lists
hold 0.970 of them, and 0.940 of the ten nearest of real queries; of a hundred they hold 0.931."""

EXACT_SHARE: Final = 0.5
"""Past this share of the rows, a scan and scattered rescoring cost more than one exact scan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How to search a segment. effort: None to compute everything exactly.

    factor: candidates rescored per hit, 0 when exact.
    """

    effort: Effort | None
    factor: int
    expected_recall: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """What scanning so many lists covers of a query's neighbours."""

    probes: int
    recall: float
    lower: float


def setting_for(
    curve: RecallCurve,
    recall_target: float,
    k: int,
    *,
    rows: int,
    lists: int,
    rank: int | None,
    cost_ns: Callable[[Effort], float],
) -> Setting:
    """Returns the cheapest measured setting whose recall reaches the target, else exact.

    rows: rows of the segment. rank: see `rank_measured`. Misses of the lists and of the codes add
    up at most, so their lower bounds together must leave the target.
    """
    if recall_target >= 1.0:
        return _exact("recall 1.0 is asked for, which only exact search promises")
    best: tuple[float, Setting] | None = None
    for cover in _covers(curve, lists, rank):
        found = _with_cover(curve, recall_target, k, rows, cover)
        if found.effort is None:
            continue
        cost = cost_ns(found.effort)
        if best is None or cost < best[0]:
            best = (cost, found)
    if best is not None:
        return best[1]
    everything = Cover(probes=lists, recall=1.0, lower=1.0)
    return _with_cover(curve, recall_target, k, rows, everything)


def effort_beyond(
    curve: RecallCurve, recall_target: float, k: int, *, lists: int, beyond: float
) -> Effort | None:
    """Returns how deep to look where a share of the rows nearer to the query is not allowed.

    None: no measured depth reaches the target so far out; every allowed row has to be compared.
    A quarter of the misses is spent: so far out few queries were measured, real ones are harder
    (8,000 × 384, 10 % left out: 0.940 at a measured 0.975), and `beyond` is itself an estimate.
    """
    needed = 1 - (1 - recall_target) / 4
    measured = min((p.beyond for p in curve.beyond if p.beyond >= beyond), default=None)
    for point in curve.beyond:
        if point.beyond == measured and point.lower >= needed:
            return Effort(depth=point.factor * max(k, K_CLASSES[0]), probes=lists)
    return None


def rank_measured(curve: RecallCurve, k: int, selectivity: float) -> int | None:
    """Returns the rank whose coverage says which lists hold the k nearest allowed rows.

    selectivity: share of the rows around the query that may be returned: the k-th of those is about
    the (k / selectivity)-th of all. Coverage falls with rank, so the next one measured is on the
    careful side. None: so far away, nothing was measured; all lists have to be scanned.
    """
    if selectivity <= 0.0:
        return None
    rank = max(math.ceil(k / selectivity), RANK_MIN)
    return min((point.rank for point in curve.coverage if point.rank >= rank), default=None)


def _covers(curve: RecallCurve, lists: int, rank: int | None) -> list[Cover]:
    """Returns what each measured number of lists covers, and all of them, ascending."""
    measured = [
        Cover(probes=point.probes, recall=point.recall, lower=point.lower)
        for point in curve.coverage
        if point.rank == rank and point.probes < lists
    ]
    return [*measured, Cover(probes=lists, recall=1.0, lower=1.0)]


def _with_cover(
    curve: RecallCurve, recall_target: float, k: int, rows: int, cover: Cover
) -> Setting:
    """Returns the shallowest depth that reaches the target after what the lists miss.

    Every class must reach it, not only the one nearest to k: where rows come in families of
    near-duplicates, ten of them are found too easily, and only a hundred reach the neighbourhood
    that a new query sees (measured: class 10 alone promised 0.982 where queries reached 0.959; with
    both they reached 0.995). From k = 100 on, class 100 decides.
    """
    needed = recall_target + (1.0 - cover.lower)
    classes = [k_class for k_class in K_CLASSES if not k_class < K_CLASSES[-1] <= k]
    factor = 0
    for k_class in classes:
        reached = _first_reaching(curve, needed, k_class)
        if reached is None:
            return _exact(f"no measured setting reaches recall {recall_target} at k {k_class}")
        factor = max(factor, reached)
    # Below the smallest class its depth is kept: one row is as hard to rank as ten are.
    depth = factor * max(k, K_CLASSES[0])
    if depth > rows * EXACT_SHARE:
        return _exact(f"rescoring {depth} of {rows} rows would cost as much as all")
    of_codes = min(p.recall for p in curve.points if p.factor == factor and p.k in classes)
    expected_recall = max(of_codes + cover.recall - 1.0, 0.0)
    lists = "" if not curve.coverage else f" over {cover.probes} lists"
    return Setting(
        effort=Effort(depth=depth, probes=cover.probes),
        factor=factor,
        expected_recall=expected_recall,
        reason=f"factor {factor}{lists} measured recall {expected_recall:.4f}",
    )


def _first_reaching(curve: RecallCurve, recall_target: float, k_class: int) -> int | None:
    for point in curve.points:
        if point.k == k_class and point.lower >= recall_target:
            return point.factor
    return None


def _exact(reason: str) -> Setting:
    return Setting(effort=None, factor=0, expected_recall=1.0, reason=reason)
