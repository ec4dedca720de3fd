"""How many matching rows lead to which plan."""

import pytest

from shoal_cluster.filtering.selectivity import FilterPlan, choose_plan, gather_rows_max


@pytest.mark.parametrize(
    ("matching", "plan"),
    [
        (0, FilterPlan.NONE_MATCH),
        (1, FilterPlan.GATHER),
        (100, FilterPlan.GATHER),
        (2_000, FilterPlan.GATHER),
        (2_001, FilterPlan.SCAN_BITMAP),
        (99_999, FilterPlan.SCAN_BITMAP),
        (100_000, FilterPlan.ALL_MATCH),
    ],
)
def test_plan_follows_the_share_of_matching_rows(matching: int, plan: FilterPlan) -> None:
    choice = choose_plan(matching=matching, live=100_000, dimension=384, k=10)
    assert choice.plan is plan
    assert str(matching) in choice.reason


def test_small_segments_gather_by_count_not_by_share() -> None:
    assert gather_rows_max(live=8_000, dimension=384, k=10) == 1_041
    assert gather_rows_max(live=8_000, dimension=4_096, k=10) == 160
    assert gather_rows_max(live=8_000, dimension=4_096, k=1000) == 10_000


def test_reason_gives_the_numbers_behind_the_choice() -> None:
    choice = choose_plan(matching=50_000, live=100_000, dimension=384, k=10)
    assert choice.reason == (
        "50000 of 100000 rows match (50.00%), more than 2000: bitmap into the scan"
    )
