"""The recall curve that a segment measures of itself."""

import numpy as np
import pytest

from shoal_cluster.domain.schema import Metric
from shoal_cluster.index.calibration import (
    BEYOND_SHARES,
    BeyondPoint,
    CoveragePoint,
    CurvePoint,
    RecallCurve,
    curve_of,
    measure_queries,
    measure_recall,
    worst_of,
)
from shoal_cluster.index.distances import Keys, exact_top_k, gather_keys
from shoal_cluster.index.families import CodeShape, Effort
from shoal_cluster.index.fast_scan import FastScanIndex, train_codes
from shoal_cluster.index.rescoring import rescored_top_k


def index_of(vectors: np.ndarray, metric: Metric, lists: int = 1) -> FastScanIndex:
    codes = train_codes(vectors, metric, CodeShape(values_a_code=2, lists=lists), 1)
    return FastScanIndex(codes, vectors.shape[1])


def keys_at(
    index: FastScanIndex,
    vectors: np.ndarray,
    queries: np.ndarray,
    metric: Metric,
    depth: int,
    probes: int = 1,
) -> Keys:
    candidates = index.candidates(queries, Effort(depth=depth, probes=probes))
    return rescored_top_k(vectors, queries, candidates, 10, metric)[0]


def a_curve(*points: tuple[int, int, float]) -> RecallCurve:
    return RecallCurve(
        points=tuple(
            CurvePoint(k=k, factor=factor, recall=recall, lower=recall - 0.005)
            for k, factor, recall in points
        ),
        queries=200,
    )


def measured(metric: Metric) -> tuple[FastScanIndex, np.ndarray, RecallCurve]:
    random = np.random.default_rng(5)
    vectors = random.standard_normal((3000, 48), dtype=np.float32)
    vectors[:, ::2] += 3 * random.standard_normal((10, 24))[random.integers(0, 10, 3000)]
    if metric is Metric.COSINE:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = index_of(vectors, metric)
    return index, vectors, measure_recall(index, vectors, metric, seed=1)


@pytest.mark.parametrize("metric", Metric)
def test_the_curve_rises_and_predicts_queries_it_never_saw(metric: Metric) -> None:
    index, vectors, curve = measured(metric)
    random = np.random.default_rng(6)
    queries = vectors[:300] + 0.6 * vectors.std(axis=0) * random.standard_normal((300, 48))
    queries = queries.astype(np.float32)
    true_keys = exact_top_k(vectors, queries, 10, metric)[0]

    points = [point for point in curve.points if point.k == 10]

    assert [p.recall for p in points] == sorted(p.recall for p in points)
    assert all(p.lower <= p.recall <= 1 for p in points)
    for point in points:
        keys = keys_at(index, vectors, queries, metric, 10 * point.factor)
        reached = float((keys <= true_keys[:, -1:]).mean())
        assert reached >= point.lower - 0.03, point


@pytest.mark.parametrize("lists", [1, 12])
def test_queries_measured_in_pieces_give_the_curve_of_all(lists: int) -> None:
    random = np.random.default_rng(8)
    vectors = random.standard_normal((2000, 48), dtype=np.float32)
    index = index_of(vectors, Metric.L2, lists)
    queries = random.standard_normal((60, 48), dtype=np.float32)

    def measured_by(size: int) -> RecallCurve:
        pieces = [queries[start : start + size] for start in range(0, len(queries), size)]
        recalls = [measure_queries(index, vectors, Metric.L2, each, beyond=4) for each in pieces]
        return worst_of([curve_of(recalls, len(queries))])

    whole, apart = measured_by(60), measured_by(16)

    assert whole.points == apart.points and whole.coverage == apart.coverage
    assert bool(whole.coverage) == (lists > 1) and whole.queries == 60
    built = measure_recall(index, vectors, Metric.L2, seed=1)
    both = worst_of([built, whole])
    assert len(both.points) == len(built.points) == len(whole.points)
    for worst, *alike in zip(both.points, built.points, whole.points, strict=True):
        assert worst in alike and worst.lower == min(point.lower for point in alike)


def test_a_row_does_not_count_as_its_own_neighbour() -> None:
    """Without structure, codes find a row itself and little else: counting it would flatter."""
    random = np.random.default_rng(7)
    vectors = random.standard_normal((3300, 48), dtype=np.float32)
    queries, vectors = vectors[3000:], vectors[:3000].copy()
    index = index_of(vectors, Metric.L2)
    true_keys = exact_top_k(vectors, queries, 10, Metric.L2)[0]

    curve = measure_recall(index, vectors, Metric.L2, seed=1)

    hard = [point for point in curve.points if point.k == 10 and point.recall < 0.9]
    assert len(hard) >= 3
    for point in hard:
        keys = keys_at(index, vectors, queries, Metric.L2, 10 * point.factor)
        assert float((keys <= true_keys[:, -1:]).mean()) >= point.recall - 0.025, point


def test_what_codes_find_beyond_the_nearest_rows_is_measured_to_the_end() -> None:
    _, _, curve = measured(Metric.COSINE)

    for share in BEYOND_SHARES:
        recalls = [point.recall for point in curve.beyond if point.beyond == share]
        assert recalls == sorted(recalls) and recalls[0] < 0.9 and recalls[-1] > 0.99


def test_the_same_seed_measures_the_same_curve() -> None:
    index, vectors, curve = measured(Metric.COSINE)

    assert measure_recall(index, vectors, Metric.COSINE, seed=1) == curve
    assert measure_recall(index, vectors, Metric.COSINE, seed=2) != curve


def test_equal_rows_do_not_lower_the_measured_recall() -> None:
    """Of many equal rows any k are right: counting row numbers would call most of them misses."""
    distinct = np.random.default_rng(1).standard_normal((30, 32), dtype=np.float32)
    vectors = np.repeat(distinct, 100, axis=0)
    index = index_of(vectors, Metric.L2)

    curve = measure_recall(index, vectors, Metric.L2, seed=1)

    assert max(point.recall for point in curve.points if point.k == 10) == 1.0


@pytest.mark.parametrize("equal_rows", [1, 2, 101, 150])
@pytest.mark.parametrize("lists", [1, 6])
def test_the_curve_is_that_of_comparing_every_key(equal_rows: int, lists: int) -> None:
    """Keys of rows that are near are known, and others not computed; ties may hide others."""
    random = np.random.default_rng(9)
    distinct = random.standard_normal((3000 // equal_rows, 24), dtype=np.float32)
    vectors = random.permutation(np.repeat(distinct, equal_rows, axis=0))
    index = index_of(vectors, Metric.L2, lists)
    queries = random.standard_normal((20, 24), dtype=np.float32)

    measured = measure_queries(index, vectors, Metric.L2, queries, beyond=0).codes

    found = index.candidates(queries, Effort(depth=len(vectors), probes=lists))
    keys = gather_keys(vectors, queries, found, Metric.L2)
    for (k, factor), recalls in measured.items():
        bounds = exact_top_k(vectors, queries, k, Metric.L2)[0][:, -1:]
        hits = (keys[:, : k * factor] <= bounds).sum(axis=1)
        assert np.array_equal(recalls, np.minimum(hits, k) / k), (k, factor)
    assert {k for k, _ in measured} == {10, 100}


@pytest.mark.parametrize("metric", Metric)
def test_coverage_predicts_in_how_many_lists_new_queries_neighbours_are(metric: Metric) -> None:
    random = np.random.default_rng(8)
    centres = random.standard_normal((60, 24), dtype=np.float32)
    vectors = centres[random.integers(0, 60, 6300)] + 0.6 * random.standard_normal((6300, 24))
    vectors = vectors.astype(np.float32)
    if metric is Metric.COSINE:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, vectors = vectors[6000:].copy(), vectors[:6000].copy()
    index = index_of(vectors, metric, lists=64)
    curve = measure_recall(index, vectors, metric, seed=1)
    true = exact_top_k(vectors, queries, 300, metric)[1]

    places = index.list_places(queries, true)

    assert curve.coverage
    for point in curve.coverage:
        if point.rank <= 300:
            reached = float((places[:, : point.rank] < point.probes).mean())
            assert reached >= point.lower - 0.02, point
    for rank in (100, 300):
        covered = [point.recall for point in curve.coverage if point.rank == rank]
        assert covered == sorted(covered) and covered[0] < 0.95 < covered[-1]


def test_a_curve_survives_the_wire() -> None:
    curve = a_curve((10, 4, 0.95), (100, 8, 0.998))
    covered = RecallCurve(
        points=curve.points,
        queries=400,
        coverage=(CoveragePoint(rank=10, probes=3, recall=0.9, lower=0.89),),
        beyond=(BeyondPoint(beyond=0.01, factor=4, recall=0.9, lower=0.89),),
    )
    for each in (curve, covered):
        assert RecallCurve.from_wire(each.to_wire()) == each
