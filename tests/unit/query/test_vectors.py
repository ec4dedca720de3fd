"""What happens to vectors from outside before anything compares them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.schema import Metric
from shoal_cluster.domain.vectors import prepare_vectors

SCALES = st.sampled_from([1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e18, 1e37])
BLOCKS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 8)),
    elements=st.floats(-1, 1, width=32, allow_subnormal=False),
)


def field(row: int) -> str:
    return f"vectors[{row}]"


@given(block=BLOCKS, scale=SCALES)
def test_under_cosine_vectors_get_unit_length_and_keep_their_norm(
    block: np.ndarray, scale: float
) -> None:
    block = (block * np.float32(scale)).astype(np.float32)
    lengths = np.sqrt((block.astype(np.float64) ** 2).sum(axis=1))
    if not lengths.all():
        with pytest.raises(InvalidRequest, match="zero") as caught:
            prepare_vectors(block, Metric.COSINE, field=field)
        assert caught.value.field == f"vectors[{int(np.argmin(lengths))}]"
        return
    unit, norms = prepare_vectors(block, Metric.COSINE, field=field)
    assert unit.dtype == np.float32 and unit.flags.c_contiguous
    assert np.allclose(np.linalg.norm(unit.astype(np.float64), axis=1), 1, atol=1e-5)
    # Below 1e-38 float32 is subnormal and keeps fewer digits.
    assert np.allclose(unit * norms[:, None], block, rtol=1e-5, atol=1e-44 + 1e-6 * lengths.max())


def test_a_vector_that_has_unit_length_comes_back_bit_for_bit() -> None:
    block = np.random.default_rng(3).normal(size=(50, 384)).astype(np.float32)
    block /= np.linalg.norm(block, axis=1, keepdims=True)
    unit, norms = prepare_vectors(block, Metric.COSINE, field=field)
    assert (unit == block).all() and (norms == 1).all()


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.L2])
def test_other_metrics_store_vectors_as_they_are(metric: Metric) -> None:
    block = np.array([[3, 4], [0, 0]], np.float32)
    stored, norms = prepare_vectors(block, metric, field=field)
    assert stored is block and (norms == 1).all()


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_named(metric: Metric, bad: float) -> None:
    block = np.ones((5, 3), np.float32)
    block[2, 1] = bad
    block[4, 0] = bad
    with pytest.raises(InvalidRequest, match="at position 1") as caught:
        prepare_vectors(block, metric, field=field)
    assert caught.value.field == "vectors[2]"
