"""The ladder of recall targets that a budget is spent on."""

import pytest

from shoal_cluster.domain.limits import RECALL_TARGET_MAX, RECALL_TARGET_MIN
from shoal_cluster.index.budget import TARGETS, best_within


def test_the_ladder_goes_down_over_all_that_may_be_declared() -> None:
    assert list(TARGETS) == sorted(set(TARGETS), reverse=True)
    assert (TARGETS[-1], TARGETS[0]) == (RECALL_TARGET_MIN, RECALL_TARGET_MAX)


@pytest.mark.parametrize(
    ("budget_ns", "target"), [(1e9, 1.0), (1000.0, 1.0), (999.0, 0.999), (901.0, 0.9), (900.0, 0.9)]
)
def test_the_highest_target_that_fits_is_taken(budget_ns: float, target: float) -> None:
    cost_ns = {1.0: 1000.0, 0.999: 999.0, **dict.fromkeys((0.995, 0.99, 0.98, 0.97, 0.95), 950.0)}

    def planned(asked: float) -> tuple[str, float]:
        return f"plan for {asked}", cost_ns.get(asked, 900.0)

    assert best_within(budget_ns, planned) == (target, f"plan for {target}")


def test_below_the_last_rung_nothing_is_given_up() -> None:
    assert best_within(0.0, lambda target: (target, 5.0)) == (0.5, 0.5)
