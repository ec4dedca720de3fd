"""The setting chosen from a recall curve."""

import pytest

from shoal_cluster.index.calibration import (
    NO_CURVE,
    BeyondPoint,
    CoveragePoint,
    CurvePoint,
    RecallCurve,
)
from shoal_cluster.index.families import Effort
from shoal_cluster.index.settings import Setting, effort_beyond, rank_measured, setting_for


def curve_of(*points: tuple[int, int, float]) -> RecallCurve:
    return RecallCurve(
        points=tuple(
            CurvePoint(k=k, factor=factor, recall=recall, lower=recall - 0.005)
            for k, factor, recall in points
        ),
        queries=200,
    )


CURVE = curve_of((10, 4, 0.95), (10, 8, 0.99), (10, 16, 0.999), (100, 4, 0.97), (100, 8, 0.998))


LISTED = RecallCurve(
    points=CURVE.points,
    queries=200,
    coverage=tuple(
        CoveragePoint(rank=rank, probes=probes, recall=recall, lower=recall)
        for rank, probes, recall in (
            (100, 8, 0.93),
            (100, 16, 0.985),
            (100, 32, 0.999),
            (1000, 8, 0.7),
            (1000, 16, 0.9),
            (1000, 32, 0.96),
        )
    ),
)


def chosen(
    curve: RecallCurve, target: float, k: int = 10, rows: int = 10_000, **listed: object
) -> Setting:
    """Depth costs 1 a candidate, a list 10."""
    arguments = {"lists": 1, "rank": None, **listed}
    return setting_for(
        curve, target, k, rows=rows, cost_ns=lambda e: e.depth + 10 * e.probes, **arguments
    )


def depth_of(setting: Setting) -> int:
    assert setting.effort is not None
    return setting.effort.depth


def test_the_cheapest_setting_that_reaches_the_target_is_chosen() -> None:
    assert depth_of(chosen(CURVE, 0.90, 10)) == 40
    assert depth_of(chosen(CURVE, 0.98, 10)) == 80
    assert depth_of(chosen(CURVE, 0.985, 10)) == 80
    assert depth_of(chosen(CURVE, 0.986, 10)) == 160
    assert depth_of(chosen(CURVE, 0.98, 100)) == 800
    assert depth_of(chosen(CURVE, 0.98, 300)) == 2400


def test_a_target_is_held_to_the_lower_bound_not_the_mean() -> None:
    assert chosen(CURVE, 0.99, 10).factor == 16


def test_small_k_keeps_the_depth_of_ten() -> None:
    assert depth_of(chosen(CURVE, 0.98, 1)) == depth_of(chosen(CURVE, 0.98, 10))


def test_every_class_up_to_a_hundred_must_reach_the_target() -> None:
    families = curve_of((10, 4, 0.999), (100, 4, 0.80), (100, 24, 0.99))

    assert chosen(families, 0.98, 10).factor == 24


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
    setting = chosen(curve, target, 10, rows)

    assert setting.effort is None
    assert setting.expected_recall == 1.0
    assert why in setting.reason


def test_lists_and_depth_share_the_misses_at_the_least_cost() -> None:
    """0.985 of the lists leaves 0.965 to the codes: factor 8, for 16 lists and 80 candidates."""
    setting = chosen(LISTED, 0.95, lists=100, rank=100)

    assert setting.effort == Effort(depth=80, probes=16)
    assert setting.expected_recall == pytest.approx(0.985 + 0.99 - 1)
    assert "16 lists" in setting.reason


def test_a_cover_that_leaves_the_codes_too_little_is_passed_over() -> None:
    assert chosen(LISTED, 0.985, lists=100, rank=100).effort == Effort(depth=160, probes=32)
    assert chosen(LISTED, 0.985, lists=100, rank=1000).effort == Effort(depth=80, probes=100)


def test_where_nothing_was_measured_all_lists_are_scanned() -> None:
    assert chosen(LISTED, 0.95, lists=100, rank=None).effort == Effort(depth=80, probes=100)


@pytest.mark.parametrize(
    ("beyond", "target", "effort"),
    [
        (0.005, 0.8, Effort(depth=160, probes=7)),
        (0.01, 0.8, Effort(depth=160, probes=7)),
        (0.005, 0.96, Effort(depth=640, probes=7)),
        (0.02, 0.8, Effort(depth=640, probes=7)),
        (0.02, 0.96, None),
        (0.2, 0.5, None),
    ],
)
def test_far_out_the_next_measured_share_decides_and_a_quarter_of_the_misses_is_spent(
    beyond: float, target: float, effort: Effort | None
) -> None:
    curve = RecallCurve(
        points=(),
        queries=200,
        beyond=tuple(
            BeyondPoint(beyond=share, factor=factor, recall=recall, lower=recall)
            for share, factor, recall in (
                (0.01, 16, 0.95),
                (0.01, 64, 0.99),
                (0.1, 16, 0.7),
                (0.1, 64, 0.96),
            )
        ),
    )

    assert effort_beyond(curve, target, 10, lists=7, beyond=beyond) == effort


@pytest.mark.parametrize(
    ("k", "selectivity", "rank"),
    [
        (10, 1.0, 100),
        (1, 1.0, 100),
        (10, 0.1, 100),
        (10, 0.09, 1000),
        (101, 1.0, 1000),
        (10, 0.009, None),
        (1, 0.0, None),
    ],
)
def test_a_filter_moves_the_neighbours_out_to_the_next_measured_rank(
    k: int, selectivity: float, rank: int | None
) -> None:
    assert rank_measured(LISTED, k, selectivity) == rank
