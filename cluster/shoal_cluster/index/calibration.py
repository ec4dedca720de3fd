"""Each segment measures its own recall, so that a query can ask for recall instead of settings.

At build, rows of the segment serve as queries, each excluded from its own answer: a stored row
finds itself trivially. They are asked twice, as they are and moved away by noise, because users'
queries do not lie where rows lie; of the two the worse counts. Rescoring is exact, so the recall at
depth D is the share of the true top k that the codes rank among their first D candidates: one deep
scan measures every factor at once.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.index.distances import Rows, exact_top_k, gather_keys
from shoal_cluster.index.families import FastScanIndex

QUERIES: Final = 200
"""At recall 0.98 and k = 10 the standard error is about 0.003; MARGIN_ERRORS accounts for it."""

K_CLASSES: Final = (10, 100)
FACTORS: Final = (2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128)
DEPTH_MAX: Final = 6_400
"""Candidates a query is measured to. Rescoring so many takes 0.3 ms at 384-d."""

EXACT_SHARE: Final = 0.5
"""Past this share of the rows, a scan and scattered rescoring cost more than one exact scan."""

QUERY_NOISES: Final = (0.0, 0.75)
"""Noise of the queries, in standard deviations of each dimension; one measurement each.

Sentence embeddings (600 real queries on 1,500 to 8,000 Debian descriptions): unmoved rows promise
0.971 at factor 4 where queries reach 0.951; noise of 0.7 predicts every factor within 0.006, and
0.75 stays on the careful side. Gaussian clusters (16,000 × 48): noise makes queries easier, 0.925
promised at factor 8 where new rows reach 0.869, and unmoved rows predict them within 0.01."""

MARGIN_ERRORS: Final = 1.0
"""Standard errors taken off the measured mean, because 200 queries are a sample."""

SPREAD_ROWS: Final = 4_096
"""Rows that estimate the deviation of each dimension, to about 1 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Recall of one setting. lower: the mean less its sampling error; what a target is held to."""

    k: int
    factor: int
    recall: float
    lower: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallCurve:
    """What a segment measured about itself at build. Ascending by (k, factor); empty for flat."""

    points: tuple[CurvePoint, ...]
    queries: int

    def to_wire(self) -> dict[str, Any]:
        """Returns a msgpack-able map; `from_wire` reverses it exactly."""
        return {
            "queries": self.queries,
            "points": [[p.k, p.factor, p.recall, p.lower] for p in self.points],
        }

    @staticmethod
    def from_wire(fields: dict[str, Any]) -> "RecallCurve":
        return RecallCurve(
            points=tuple(
                CurvePoint(k=k, factor=factor, recall=recall, lower=lower)
                for k, factor, recall, lower in fields["points"]
            ),
            queries=fields["queries"],
        )


NO_CURVE: Final = RecallCurve(points=(), queries=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How to search a segment. depth: candidates to rescore, None to compute everything exactly."""

    depth: int | None
    factor: int
    expected_recall: float
    reason: str


def measure_recall(
    index: FastScanIndex, vectors: Vectors, metric: Metric, seed: int
) -> RecallCurve:
    """Measures the recall of every (k class, factor) with rows of the segment as queries.

    The same index, vectors and seed give the same curve. O(QUERIES · n · d): 100,000 × 384 takes
    about two seconds.
    """
    random = np.random.default_rng(seed)
    sample = np.sort(random.permutation(len(vectors))[:QUERIES])
    others = vectors[random.permutation(len(vectors))[:SPREAD_ROWS]]
    centre, spread = others.mean(axis=0), others.std(axis=0)
    curves = []
    for noise in QUERY_NOISES:
        drawn = random.standard_normal((len(sample), vectors.shape[1]), dtype=np.float32)
        queries = _moved(vectors[sample], noise * spread * drawn, centre)
        curves.append(_measure(index, vectors, metric, sample, queries))
    worst = (min(alike, key=lambda point: point.lower) for alike in zip(*curves, strict=True))
    return RecallCurve(points=tuple(worst), queries=len(sample) * len(curves))


def _moved(rows: Vectors, noise: Vectors, centre: npt.NDArray[np.float32]) -> Vectors:
    """Adds noise to rows, keeping each as far from the centre as it was.

    Else l2 would find the queries outside of where rows are, and easier (measured: 0.984 promised
    where queries reached 0.979; with the distance kept 0.978).
    """
    before, after = rows - centre, rows + noise - centre
    lengths = np.linalg.norm(before, axis=1, keepdims=True)
    # A row at the very centre goes back there, whatever its noise: it has no direction.
    scale = lengths / np.maximum(np.linalg.norm(after, axis=1, keepdims=True), 1e-30)
    return np.ascontiguousarray(centre + after * scale, dtype=np.float32)


def _measure(
    index: FastScanIndex,
    vectors: Vectors,
    metric: Metric,
    sample: npt.NDArray[np.int64],
    queries: Vectors,
) -> list[CurvePoint]:
    """Returns the recall of one set of queries; `sample` are the rows each leaves out."""
    count = len(vectors)
    deepest = min(DEPTH_MAX, count - 1)
    found = _without(sample, index.candidates(queries, deepest + 1))
    k_true = min(K_CLASSES[-1], count - 1)
    nearest = _without(sample, exact_top_k(vectors, queries, k_true + 1, metric)[1])
    true_keys = gather_keys(vectors, queries, nearest, metric)
    found_keys = gather_keys(vectors, queries, found, metric)
    points: list[CurvePoint] = []
    for k in K_CLASSES:
        # Counted by key, not by row: of many equal rows any k are a right answer.
        hits = np.cumsum(found_keys <= true_keys[:, min(k, k_true) - 1, np.newaxis], axis=1)
        for factor in FACTORS:
            if k > k_true or k * factor > deepest:
                continue
            recall = np.minimum(hits[:, k * factor - 1], k) / k
            error = float(recall.std() / np.sqrt(len(recall)))
            mean = float(recall.mean())
            points.append(
                CurvePoint(k=k, factor=factor, recall=mean, lower=mean - MARGIN_ERRORS * error)
            )
    return points


def _without(sample: npt.NDArray[np.int64], answers: Rows) -> Rows:
    """Removes each query's own row from its answer, or the last row where it is not there."""
    keep = answers != sample[:, np.newaxis]
    keep[:, -1] &= ~keep.all(axis=1)
    kept: Rows = answers[keep].reshape(len(answers), -1)
    return kept


def setting_for(curve: RecallCurve, recall_target: float, k: int, rows: int) -> Setting:
    """Returns the cheapest measured setting whose recall reaches the target, else exact.

    rows: rows of the segment. Every class must reach the target, not only the one nearest to k:
    where rows come in families of near-duplicates, ten of them are found too easily, and only a
    hundred reach the neighbourhood that a new query sees (measured: class 10 alone promised 0.982
    where queries reached 0.959; with both they reached 0.995). From k = 100 on, class 100 decides.
    """
    if recall_target >= 1.0:
        return _exact("recall 1.0 is asked for, which only exact search promises")
    factor, expected_recall = 0, 1.0
    for k_class in K_CLASSES:
        if k_class < K_CLASSES[-1] <= k:
            continue
        reached = _first_reaching(curve, recall_target, k_class)
        if reached is None:
            return _exact(f"no measured setting reaches recall {recall_target} at k {k_class}")
        factor = max(factor, reached.factor)
        expected_recall = min(expected_recall, reached.recall)
    # Below the smallest class its depth is kept: one row is as hard to rank as ten are.
    depth = factor * max(k, K_CLASSES[0])
    if depth > rows * EXACT_SHARE:
        return _exact(f"rescoring {depth} of {rows} rows would cost as much as all")
    return Setting(
        depth=depth,
        factor=factor,
        expected_recall=expected_recall,
        reason=f"factor {factor} measured recall {expected_recall:.4f}",
    )


def _first_reaching(curve: RecallCurve, recall_target: float, k_class: int) -> CurvePoint | None:
    for point in curve.points:
        if point.k == k_class and point.lower >= recall_target:
            return point
    return None


def _exact(reason: str) -> Setting:
    return Setting(depth=None, factor=0, expected_recall=1.0, reason=reason)
