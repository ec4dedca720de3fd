"""Each segment measures its own recall, so that a query can ask for recall instead of settings.

At build, rows of the segment serve as queries, each excluded from its own answer: a stored row
finds itself trivially. They are asked as they are, moved away by noise, and as the middle of three
rows, because users' queries do not lie where rows lie; of the three the worst counts. Two things
are measured apart:

- *Codes*: rescoring is exact, so the recall at depth D is the share of the true top k that the
  codes rank among their first D candidates: one deep scan of all rows measures every depth at once.
- *Coverage*, behind an inverted file: the share of the nearest r rows that lie in the p lists whose
  centres are nearest. Needs no scan at all, only where the true neighbours are.

- *Beyond*: the codes' recall where the nearest rows may not be returned, as under a filter that
  has none of them.

A row is missed by one or by the other, so misses add up at most (settings.py).

Queries that users asked may be measured later (docs/design/live-recall.md), and then they count as
a fourth kind.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.index.distances import (
    NO_ROW,
    Keys,
    Rows,
    StoredVectors,
    exact_top_k,
    gather_keys,
    scan_keys_of_all,
)
from shoal_cluster.index.families import CandidateIndex, Effort
from shoal_cluster.index.row_bits import bits_of_flags

QUERIES: Final = 200
"""At recall 0.98 and k = 10 the standard error is about 0.003; MARGIN_ERRORS accounts for it."""

K_CLASSES: Final = (10, 100)
FACTORS: Final = (2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128)
DEPTH_MAX: Final = 6_400
"""Candidates a query is measured to. Rescoring so many takes 0.3 ms at 384-d."""

RANKS: Final = (100, 300, 1_000, 3_000)
"""Neighbours whose lists are looked up. A filter that one row in a hundred passes makes the
thousandth neighbour the tenth."""

PROBED_SHARES: Final = (128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2)
"""One in so many lists is probed: steps that change the cost by a third."""

BEYOND_SHARES: Final = (0.002, 0.01, 0.1)
"""Shares of the nearest rows left out. Further out no depth that pays finds the rest."""

BEYOND_QUERIES: Final = 64
"""Each compares every row and scans alone: 100,000 × 384 takes half a second in all."""

BEYOND_QUERIES_AT_ONCE: Final = 8
"""32 bytes a row while their keys are held."""

BEYOND_FACTORS: Final = (4, 8, 16, 32, 64, 128, 256, 512)

QUERY_NOISES: Final = (0.0, 0.75)
"""Noise of the queries, in standard deviations of each dimension; one measurement each.

Sentence embeddings (600 real queries on 1,500 to 8,000 Debian descriptions): unmoved rows promise
0.971 at factor 4 where queries reach 0.951; noise of 0.7 predicts every factor within 0.006, and
0.75 stays on the careful side. Gaussian clusters (16,000 × 48): noise makes queries easier, 0.925
promised at factor 8 where new rows reach 0.869, and unmoved rows predict them within 0.01."""

MIXED_ROWS: Final = 3
"""Rows whose mean is a query. Rows come in families, so that rows, even moved ones, find their ten
nearest too easily: of 100,000 mixtures of 8,000 real embeddings (tests/bench) they promise 0.99 at
80 candidates where 500 real queries reach 0.965. Means of three rows promise 0.952 there, and 0.985
where real queries on the 8,000 themselves reach 0.985."""

MARGIN_ERRORS: Final = 1.0
"""Standard errors taken off the measured mean, because 200 queries are a sample."""

SPREAD_ROWS: Final = 4_096
"""Rows that estimate the deviation of each dimension, to about 1 %."""

Recalls = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Recall of the codes at depth k · factor, all lists scanned.

    lower: the mean less its sampling error; what a target is held to.
    """

    k: int
    factor: int
    recall: float
    lower: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CoveragePoint:
    """Share of the `rank` nearest rows that lie in the `probes` nearest lists. lower: as above."""

    rank: int
    probes: int
    recall: float
    lower: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BeyondPoint:
    """Recall of the codes at k = 10 and depth 10 · factor among all but the nearest rows.

    beyond: share of the rows left out. All lists scanned. lower: as above.
    """

    beyond: float
    factor: int
    recall: float
    lower: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallCurve:
    """What a segment measured about itself at build.

    points: ascending by (k, factor); none for flat. coverage: ascending by (rank, probes); none
    when there is one list. beyond: ascending by (beyond, factor).
    """

    points: tuple[CurvePoint, ...]
    queries: int
    coverage: tuple[CoveragePoint, ...] = ()
    beyond: tuple[BeyondPoint, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Returns a msgpack-able map; `from_wire` reverses it exactly."""
        return {
            "queries": self.queries,
            "points": [[p.k, p.factor, p.recall, p.lower] for p in self.points],
            "coverage": [[c.rank, c.probes, c.recall, c.lower] for c in self.coverage],
            "beyond": [[b.beyond, b.factor, b.recall, b.lower] for b in self.beyond],
        }

    @staticmethod
    def from_wire(fields: dict[str, Any]) -> "RecallCurve":
        return RecallCurve(
            points=tuple(
                CurvePoint(k=k, factor=factor, recall=recall, lower=lower)
                for k, factor, recall, lower in fields["points"]
            ),
            queries=fields["queries"],
            coverage=tuple(
                CoveragePoint(rank=rank, probes=probes, recall=recall, lower=lower)
                for rank, probes, recall, lower in fields["coverage"]
            ),
            beyond=tuple(
                BeyondPoint(beyond=beyond, factor=factor, recall=recall, lower=lower)
                for beyond, factor, recall, lower in fields["beyond"]
            ),
        )


NO_CURVE: Final = RecallCurve(points=(), queries=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRecalls:
    """Recall of each query of one kind, (nq,), at every point of a curve.

    codes by (k, factor), coverage by (rank, probes), beyond by (share left out, factor).
    """

    codes: Mapping[tuple[int, int], Recalls]
    coverage: Mapping[tuple[int, int], Recalls]
    beyond: Mapping[tuple[float, int], Recalls]


def measure_recall(
    index: CandidateIndex, vectors: Vectors, metric: Metric, seed: int, *, threads: int = 1
) -> RecallCurve:
    """Measures codes and coverage with rows of the segment as queries.

    The same index, vectors and seed give the same curve, on any number of threads. O(QUERIES · n ·
    d): 100,000 × 384 takes two seconds of processor time.
    """
    random = np.random.default_rng(seed)
    sample = np.sort(random.permutation(len(vectors))[:QUERIES])
    spread_rows = vectors[random.permutation(len(vectors))[:SPREAD_ROWS]]
    centre, spread = spread_rows.mean(axis=0), spread_rows.std(axis=0)
    mixed = vectors[random.integers(0, len(vectors), (MIXED_ROWS, len(sample)))].mean(axis=0)
    measure = functools.partial(_measure, index, vectors, metric)
    jobs: list[Callable[[], QueryRecalls]] = [functools.partial(measure, mixed)]
    for noise in QUERY_NOISES:
        drawn = random.standard_normal((len(sample), vectors.shape[1]), dtype=np.float32)
        moved = _moved(vectors[sample], noise * spread * drawn, centre)
        jobs.append(functools.partial(measure, moved, sample))
    jobs.append(functools.partial(_beyond_alone, index, vectors, metric, mixed[:BEYOND_QUERIES]))
    if threads == 1:
        *kinds, beyond = [job() for job in jobs]
    else:
        with ThreadPoolExecutor(threads) as pool:
            *kinds, beyond = list(pool.map(lambda job: job(), jobs))
    curves = [curve_of([kind], len(sample)) for kind in kinds]
    return worst_of([*curves, curve_of([beyond], 0)])


def _beyond_alone(
    index: CandidateIndex, vectors: Vectors, metric: Metric, queries: Vectors
) -> QueryRecalls:
    beyond = _measure_beyond(index, vectors, metric, queries)
    return QueryRecalls(codes={}, coverage={}, beyond=beyond)


def measure_queries(
    index: CandidateIndex, vectors: StoredVectors, metric: Metric, queries: Vectors, *, beyond: int
) -> QueryRecalls:
    """Measures with queries (nq, d) that are no rows of the segment.

    beyond: how many of them are also asked without their nearest rows.
    """
    return _measure(index, vectors, metric, queries, beyond=beyond)


def curve_of(pieces: Sequence[QueryRecalls], queries: int) -> RecallCurve:
    """Returns the curve of one kind of queries, measured in pieces. queries: how many they were."""
    codes = _means(piece.codes for piece in pieces)
    coverage = _means(piece.coverage for piece in pieces)
    beyond = _means(piece.beyond for piece in pieces)
    return RecallCurve(
        points=tuple(
            CurvePoint(k=k, factor=factor, recall=recall, lower=lower)
            for (k, factor), (recall, lower) in codes.items()
        ),
        queries=queries,
        coverage=tuple(
            CoveragePoint(rank=rank, probes=probes, recall=recall, lower=lower)
            for (rank, probes), (recall, lower) in coverage.items()
        ),
        beyond=tuple(
            BeyondPoint(beyond=share, factor=factor, recall=recall, lower=lower)
            for (share, factor), (recall, lower) in beyond.items()
        ),
    )


def worst_of(curves: Sequence[RecallCurve]) -> RecallCurve:
    """Returns the worst of each point that was measured: a target is reached for every kind."""
    points = {(p.k, p.factor): p for p in _best_first(each.points for each in curves)}
    coverage = {(c.rank, c.probes): c for c in _best_first(each.coverage for each in curves)}
    beyond = {(b.beyond, b.factor): b for b in _best_first(each.beyond for each in curves)}
    return RecallCurve(
        points=tuple(points[each] for each in sorted(points)),
        queries=sum(curve.queries for curve in curves),
        coverage=tuple(coverage[each] for each in sorted(coverage)),
        beyond=tuple(beyond[each] for each in sorted(beyond)),
    )


Point = TypeVar("Point", CurvePoint, CoveragePoint, BeyondPoint)
Place = TypeVar("Place", tuple[int, int], tuple[float, int])


def _best_first(measured: Iterable[Sequence[Point]]) -> list[Point]:
    """Orders points so that the worst of one place is the last, and stays in a dict."""
    points = [point for curve in measured for point in curve]
    return sorted(points, key=lambda point: -point.lower)


def _means(pieces: Iterable[Mapping[Place, Recalls]]) -> dict[Place, tuple[float, float]]:
    """Returns the mean over queries of each place, and the mean less its sampling error."""
    joined: dict[Place, list[Recalls]] = {}
    for piece in pieces:
        for place, recalls in piece.items():
            joined.setdefault(place, []).append(recalls)
    return {place: _mean(np.concatenate(recalls)) for place, recalls in joined.items()}


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
    index: CandidateIndex,
    vectors: StoredVectors,
    metric: Metric,
    queries: Vectors,
    excluded: Rows | None = None,
    *,
    beyond: int = 0,
) -> QueryRecalls:
    """Measures one kind of queries. excluded: the row each leaves out, None if there is none."""
    if excluded is None:
        excluded = np.full(len(queries), NO_ROW)
    # True neighbours, as many as are measured, and one more to see whether the last is tied.
    wanted = RANKS[-1] if index.shape.lists > 1 else K_CLASSES[-1] + 1
    k = min(wanted, len(vectors) - 1)
    nearest = _without(excluded, exact_top_k(vectors, queries, k + 1, metric)[1])
    return QueryRecalls(
        codes=_measure_codes(index, vectors, metric, excluded, queries, nearest),
        coverage=_measure_coverage(index, queries, nearest) if index.shape.lists > 1 else {},
        beyond=_measure_beyond(index, vectors, metric, queries[:beyond]) if beyond else {},
    )


def _measure_codes(
    index: CandidateIndex,
    vectors: StoredVectors,
    metric: Metric,
    excluded: Rows,
    queries: Vectors,
    nearest: Rows,
) -> dict[tuple[int, int], Recalls]:
    deepest = min(DEPTH_MAX, len(vectors) - 1)
    everything = Effort(depth=deepest + 1, probes=index.shape.lists)
    found = _without(excluded, index.candidates(queries, everything))
    nearest = np.ascontiguousarray(nearest[:, : K_CLASSES[-1] + 1])
    true_keys = gather_keys(vectors, queries, nearest, metric)
    found_keys = _keys_found(vectors, metric, queries, found, nearest, true_keys)
    recalls = {}
    for k in K_CLASSES:
        # Counted by key, not by row: of many equal rows any k are a right answer.
        bound = true_keys[:, min(k, true_keys.shape[1]) - 1, np.newaxis]
        hits = np.cumsum(found_keys <= bound, axis=1)
        for factor in FACTORS:
            if k > true_keys.shape[1] or k * factor > deepest:
                continue
            recalls[k, factor] = np.minimum(hits[:, k * factor - 1], k) / k
    return recalls


def _keys_found(
    vectors: StoredVectors,
    metric: Metric,
    queries: Vectors,
    found: Rows,
    nearest: Rows,
    true_keys: Keys,
) -> Keys:
    """Returns the keys of found rows, +inf for what is further than the K_CLASSES[-1] nearest.

    Looked up, not computed: most of 6,400 found rows are far, and their vectors all over the
    memory. Only where the last that counts and the one after it are equally near, others may be
    too, and every key is computed.
    """
    keys = np.empty(found.shape, dtype=np.float32)
    known = np.full(len(vectors) + 1, np.inf, dtype=np.float32)  # the last stands for NO_ROW
    for rows, its_keys, its_nearest, its_true_keys in zip(
        found, keys, nearest, true_keys, strict=True
    ):
        known[its_nearest] = its_true_keys
        known.take(rows, out=its_keys, mode="wrap")
        known[its_nearest] = np.inf
    counted = min(K_CLASSES[-1], true_keys.shape[1])
    tied = np.flatnonzero(~(true_keys[:, -1] > true_keys[:, counted - 1]))
    if tied.size:
        keys[tied] = gather_keys(vectors, queries[tied], found[tied], metric)
    return keys


def _measure_coverage(
    index: CandidateIndex, queries: Vectors, nearest: Rows
) -> dict[tuple[int, int], Recalls]:
    places = index.list_places(queries, nearest)
    return {
        (rank, probes): (places[:, :rank] < probes).mean(axis=1)
        for rank in RANKS
        if rank <= nearest.shape[1]
        for probes in probes_measured(index.shape.lists)
    }


def _measure_beyond(
    index: CandidateIndex, vectors: StoredVectors, metric: Metric, queries: Vectors
) -> dict[tuple[float, int], Recalls]:
    count, k = len(vectors), K_CLASSES[0]
    depth = min(k * BEYOND_FACTORS[-1], count)
    found: dict[float, list[Recalls]] = {beyond: [] for beyond in BEYOND_SHARES}
    bounds = {beyond: (int(beyond * count), int(beyond * count) + k) for beyond in BEYOND_SHARES}
    furthest = bounds[BEYOND_SHARES[-1]][1]
    effort = Effort(depth=depth, probes=index.shape.lists)
    for start in range(0, len(queries), BEYOND_QUERIES_AT_ONCE):
        some = queries[start : start + BEYOND_QUERIES_AT_ONCE]
        for query, keys in zip(some, scan_keys_of_all(vectors, some, metric), strict=True):
            near = np.sort(np.partition(keys, furthest)[: furthest + 1])
            for beyond, (first, last) in bounds.items():
                allowed = bits_of_flags(keys >= near[first])
                rows = index.candidates(query[np.newaxis], effort, allowed)[0]
                hits = np.cumsum((rows != NO_ROW) & (keys[rows] <= near[last]))
                found[beyond].append(np.minimum(hits, k) / k)
    return {
        (beyond, factor): np.stack(recalls)[:, k * factor - 1]
        for beyond, recalls in found.items()
        for factor in BEYOND_FACTORS
        if k * factor <= depth
    }


def probes_measured(lists: int) -> list[int]:
    """Returns the numbers of lists that coverage is measured at, ascending, all of them left out:
    what they cover is everything."""
    return sorted({max(lists // share, 1) for share in PROBED_SHARES})


def _mean(recalls: Recalls) -> tuple[float, float]:
    """Returns the mean over queries, and the mean less its sampling error."""
    mean = float(recalls.mean())
    return mean, mean - MARGIN_ERRORS * float(recalls.std() / np.sqrt(len(recalls)))


def _without(excluded: Rows, answers: Rows) -> Rows:
    """Removes each query's own row from its answer, or the last row where it is not there."""
    keep = answers != excluded[:, np.newaxis]
    keep[:, -1] &= ~keep.all(axis=1)
    kept: Rows = answers[keep].reshape(len(answers), -1)
    return kept
