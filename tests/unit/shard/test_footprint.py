"""What `shoal plan` says before, against what an index takes after."""

import numpy as np
import pytest

from shoal_cluster.domain.schema import MemoryTier, Metric, VectorStorage
from shoal_cluster.index.cost_model import CostModel
from shoal_cluster.index.families import CodeShape, Family
from shoal_cluster.index.fast_scan import FastScanIndex, encode_codes, train_codes
from shoal_cluster.shard.build_memory import rows_fitting
from shoal_cluster.shard.footprint import codes_bytes, footprint


@pytest.mark.parametrize("dimension", [9, 64, 385])
@pytest.mark.parametrize("values_a_code", [1, 2, 4])
@pytest.mark.parametrize("lists", [1, 20])
def test_codes_take_what_was_foreseen(dimension: int, values_a_code: int, lists: int) -> None:
    vectors = np.random.default_rng(1).standard_normal((3000, dimension), dtype=np.float32)
    shape = CodeShape(values_a_code=values_a_code, lists=lists)
    codes = train_codes(vectors, Metric.L2, shape, seed=1)

    foreseen = codes_bytes(len(vectors), dimension, shape)

    held = FastScanIndex(codes, dimension).memory_bytes()
    written = sum(part.size for part in encode_codes(codes, dimension))
    assert held == pytest.approx(foreseen, rel=0.1)
    assert written == pytest.approx(foreseen, rel=0.15)


def test_a_compact_vector_of_384_values_takes_at_most_120_bytes() -> None:
    for target in (0.9, 0.95, 0.99, 0.999):
        found = footprint(100_000, CostModel(dimension=384), target)

        assert found.memory / found.rows <= 120
        assert found.mapped / found.rows == 384 * 4 + 32


def test_tiers_and_storage_move_what_is_held() -> None:
    def of(tier: MemoryTier, storage: VectorStorage) -> tuple[float, float]:
        found = footprint(50_000, CostModel(dimension=768, storage=storage, tier=tier), 0.95)
        return found.memory / found.rows, found.disk / found.rows

    full, compact = (
        of(tier, VectorStorage.FLOAT32) for tier in (MemoryTier.FULL, MemoryTier.COMPACT)
    )
    half = of(MemoryTier.FULL, VectorStorage.FLOAT16)
    assert full[0] - compact[0] == 768 * 4
    assert full[0] - half[0] == pytest.approx(768 * 2)
    assert full[1] - half[1] == pytest.approx(768 * 2)


def test_more_rows_than_a_build_takes_are_several_segments() -> None:
    found = footprint(1_000_000, CostModel(dimension=4096), 0.95)

    assert found.segments == -(-1_000_000 // rows_fitting(4096))
    assert found.choice.family is Family.INVERTED


def test_few_rows_have_no_codes() -> None:
    found = footprint(500, CostModel(dimension=384), 0.95)

    assert found.memory == 0 and found.choice.family is Family.FLAT
