"""The recall curve a segment measures, and the setting chosen from it."""

import numpy as np
import pytest

from shoal_cluster.domain.schema import Metric
from shoal_cluster.index.calibration import (
    NO_CURVE,
    CurvePoint,
    RecallCurve,
    measure_recall,
    setting_for,
)
from shoal_cluster.index.distances import exact_top_k
from shoal_cluster.index.families import FastScanIndex, train_fast_scan


def curve_of(*points: tuple[int, int, float]) -> RecallCurve:
    return RecallCurve(
        points=tuple(
            CurvePoint(k=k, factor=factor, recall=recall, lower=recall - 0.005)
            for k, factor, recall in points
        ),
        queries=200,
    )


CURVE = curve_of((10, 4, 0.95), (10, 8, 0.99), (10, 16, 0.999), (100, 4, 0.97), (100, 8, 0.998))


def measured(metric: Metric) -> tuple[FastScanIndex, np.ndarray, RecallCurve]:
    random = np.random.default_rng(5)
    vectors = random.standard_normal((3000, 48), dtype=np.float32)
    vectors[:, ::2] += 3 * random.standard_normal((10, 24))[random.integers(0, 10, 3000)]
    if metric is Metric.COSINE:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = FastScanIndex(train_fast_scan(vectors, metric, 1), vectors, metric)
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
        keys = index.search(queries, 10, depth=10 * point.factor)[0]
        reached = float((keys <= true_keys[:, -1:]).mean())
        assert reached >= point.lower - 0.03, point


def test_a_row_does_not_count_as_its_own_neighbour() -> None:
    """Without structure, codes find a row itself and little else: counting it would flatter."""
    random = np.random.default_rng(7)
    vectors = random.standard_normal((3300, 48), dtype=np.float32)
    queries, vectors = vectors[3000:], vectors[:3000].copy()
    index = FastScanIndex(train_fast_scan(vectors, Metric.L2, 1), vectors, Metric.L2)
    true_keys = exact_top_k(vectors, queries, 10, Metric.L2)[0]

    curve = measure_recall(index, vectors, Metric.L2, seed=1)

    hard = [point for point in curve.points if point.k == 10 and point.recall < 0.9]
    assert len(hard) >= 3
    for point in hard:
        keys = index.search(queries, 10, depth=10 * point.factor)[0]
        assert float((keys <= true_keys[:, -1:]).mean()) >= point.recall - 0.025, point


def test_the_same_seed_measures_the_same_curve() -> None:
    index, vectors, curve = measured(Metric.COSINE)

    assert measure_recall(index, vectors, Metric.COSINE, seed=1) == curve
    assert measure_recall(index, vectors, Metric.COSINE, seed=2) != curve


def test_equal_rows_do_not_lower_the_measured_recall() -> None:
    """Of many equal rows any k are right: counting row numbers would call most of them misses."""
    distinct = np.random.default_rng(1).standard_normal((30, 32), dtype=np.float32)
    vectors = np.repeat(distinct, 100, axis=0)
    index = FastScanIndex(train_fast_scan(vectors, Metric.L2, 1), vectors, Metric.L2)

    curve = measure_recall(index, vectors, Metric.L2, seed=1)

    assert max(point.recall for point in curve.points if point.k == 10) == 1.0


def test_the_cheapest_setting_that_reaches_the_target_is_chosen() -> None:
    assert setting_for(CURVE, 0.90, 10, 10_000).depth == 40
    assert setting_for(CURVE, 0.98, 10, 10_000).depth == 80
    assert setting_for(CURVE, 0.985, 10, 10_000).depth == 80
    assert setting_for(CURVE, 0.986, 10, 10_000).depth == 160
    assert setting_for(CURVE, 0.98, 100, 10_000).depth == 800
    assert setting_for(CURVE, 0.98, 300, 10_000).depth == 2400


def test_a_target_is_held_to_the_lower_bound_not_the_mean() -> None:
    assert setting_for(CURVE, 0.99, 10, 10_000).factor == 16


def test_small_k_keeps_the_depth_of_ten() -> None:
    assert setting_for(CURVE, 0.98, 1, 10_000).depth == setting_for(CURVE, 0.98, 10, 10_000).depth


def test_every_class_up_to_a_hundred_must_reach_the_target() -> None:
    families = curve_of((10, 4, 0.999), (100, 4, 0.80), (100, 24, 0.99))

    assert setting_for(families, 0.98, 10, 10_000).factor == 24


@pytest.mark.parametrize(
    ("curve", "target", "rows", "why"),
    [
        (CURVE, 1.0, 10_000, "only exact"),
        (CURVE, 0.9999, 10_000, "no measured setting"),
        (NO_CURVE, 0.5, 10_000, "no measured setting"),
        (CURVE, 0.98, 150, "as much as all"),
    ],
)
def test_exact_is_the_fallback_and_says_why(
    curve: RecallCurve, target: float, rows: int, why: str
) -> None:
    setting = setting_for(curve, target, 10, rows)

    assert setting.depth is None
    assert setting.expected_recall == 1.0
    assert why in setting.reason


def test_a_curve_survives_the_wire() -> None:
    assert RecallCurve.from_wire(CURVE.to_wire()) == CURVE
