"""The family and codes a segment is built with."""

import pytest

from shoal_cluster.domain.schema import MemoryTier, VectorStorage
from shoal_cluster.index.cost_model import (
    FLAT_ROWS_MAX,
    INVERTED_ROWS_MIN,
    CostModel,
    choose_family,
    expect_effort,
)
from shoal_cluster.index.families import CodeShape, Effort, Family


@pytest.mark.parametrize(
    ("rows", "dimension", "family"),
    [
        (1, 2, Family.FLAT),
        (FLAT_ROWS_MAX, 4096, Family.FLAT),
        (1500, 384, Family.FLAT),
        (1600, 384, Family.FAST_SCAN),
        (FLAT_ROWS_MAX + 1, 4096, Family.FAST_SCAN),
        (1_000_000, 2, Family.FLAT),
        (1_000_000, 7, Family.FLAT),
        (100_000, 384, Family.FAST_SCAN),
        (100_000, 383, Family.FAST_SCAN),
        (1_000_000, 384, Family.INVERTED),
        (1_000_000, 17, Family.INVERTED),
    ],
)
def test_rows_and_dimension_decide_the_family(rows: int, dimension: int, family: Family) -> None:
    choice = choose_family(rows, CostModel(dimension=dimension), 0.95)

    assert choice.family is family
    assert (choice.shape is None) == (family is Family.FLAT)
    assert str(rows) in choice.reason or str(dimension) in choice.reason


def test_the_reason_names_what_every_candidate_was_expected_to_cost() -> None:
    choice = choose_family(1_000_000, CostModel(dimension=384), 0.95)

    for part in ("recall 0.95", "compact", "flat ", "1 bits a value in 2000 lists ", "ms"):
        assert part in choice.reason


def test_short_vectors_get_finer_codes() -> None:
    wide, short = (choose_family(50_000, CostModel(dimension=d), 0.95).shape for d in (768, 32))

    assert wide == CodeShape(values_a_code=4)
    assert short is not None and short.values_a_code < 4


def test_a_higher_target_gets_finer_codes() -> None:
    low, high = (
        choose_family(100_000, CostModel(dimension=384), target).shape for target in (0.95, 0.999)
    )

    assert low == CodeShape(values_a_code=4) and high == CodeShape(values_a_code=2)


def test_rows_on_disk_get_finer_codes_so_that_fewer_are_read() -> None:
    model = CostModel(dimension=384, tier=MemoryTier.DISK)

    shape = choose_family(100_000, model, 0.95).shape

    assert shape == CodeShape(values_a_code=2, lists=shape.lists if shape else 1)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 0.98, 0.999, 1.0])
def test_expected_effort_grows_with_rows_and_target(target: float) -> None:
    shape = CodeShape(values_a_code=4)
    small, large = (expect_effort(rows, 384, shape, target) for rows in (10_000, 1_000_000))
    higher = expect_effort(1_000_000, 384, shape, min(target + 0.02, 1.0))

    assert small.depth < large.depth <= higher.depth
    assert large.probes == 1


def test_half_precision_costs_more_to_rescore_and_disks_most() -> None:
    effort = Effort(depth=100, probes=1)
    costs = [
        CostModel(dimension=384, storage=storage, tier=tier).scan_ns(
            100_000, CodeShape(values_a_code=4), effort
        )
        for storage, tier in (
            (VectorStorage.FLOAT32, MemoryTier.COMPACT),
            (VectorStorage.FLOAT16, MemoryTier.COMPACT),
            (VectorStorage.FLOAT32, MemoryTier.DISK),
        )
    ]

    assert costs == sorted(costs) and costs[2] > 3 * costs[0]


def test_an_inverted_file_is_never_built_below_its_rows() -> None:
    choice = choose_family(INVERTED_ROWS_MIN - 1, CostModel(dimension=64), 0.9)

    assert choice.shape is not None and choice.shape.lists == 1
