"""Whether a hit lies further out than its filter explains."""

import numpy as np
import pytest

from shoal_cluster.index.row_bits import bits_of_rows, rows_in_bits
from shoal_cluster.segment.rank_sample import SAMPLED_MAX, RankSample

ROWS = 100_003


@pytest.mark.parametrize("count", [1, 7, 100, 300, 5_000, 20_000, 90_000])
def test_only_excluded_rows_are_sampled_and_always_the_same(count: int) -> None:
    excluded = np.sort(np.random.default_rng(1).permutation(ROWS)[:count])
    allowed = bits_of_rows(np.setdiff1d(np.arange(ROWS), excluded), ROWS)

    sampled = RankSample(ROWS).excluded(allowed, ROWS - count)

    assert min(count, SAMPLED_MAX) * 0.5 <= len(sampled) <= SAMPLED_MAX
    assert len(np.unique(sampled)) == len(sampled)
    assert not rows_in_bits(sampled, allowed).any()
    assert np.array_equal(sampled, RankSample(ROWS).excluded(allowed, ROWS - count))
    if count <= 100:
        assert np.array_equal(np.sort(sampled), excluded)


def test_hits_are_unexpected_past_what_chance_leaves_nearer() -> None:
    """Of 100 sampled rows, 10 hits of 1,000 allowed leave one nearer: up to five are chance."""
    keys = np.tile(np.arange(100, dtype=np.float32), (3, 1))
    last_keys = np.array([5, 6, np.inf], dtype=np.float32)

    found = RankSample(100_000).unexpected(keys, last_keys, wanted=10, allowed=1000)

    assert list(found) == [1, 2]
    assert found[1] == pytest.approx(0.06 * 0.99) and found[2] == 0.99


def test_where_all_excluded_rows_were_compared_half_as_many_as_hits_are_tolerated() -> None:
    keys = np.tile(np.arange(20, dtype=np.float32), (2, 1))
    last_keys = np.array([5, 6], dtype=np.float32)

    found = RankSample(10_000).unexpected(keys, last_keys, wanted=10, allowed=9_980)

    assert found == {1: pytest.approx(6 / 10_000)}
