"""Packed bits against Python sets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal_cluster.index import row_bits


@given(st.data(), st.integers(1, 300))
def test_bits_hold_exactly_their_rows(data: st.DataObject, count: int) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, count - 1))))

    bits = row_bits.bits_of_rows(np.array(rows, dtype=np.int64), count)

    assert bits.shape == ((count + 7) // 8,)
    assert row_bits.rows_of_bits(bits, count).tolist() == rows
    assert row_bits.count_bits(bits) == len(rows)
    held = row_bits.rows_in_bits(np.arange(count, dtype=np.uint32), bits)
    assert np.flatnonzero(held).tolist() == rows
    assert np.array_equal(row_bits.flags_of_bits(bits, count), held)


@given(st.integers(1, 300))
def test_the_set_of_all_rows_has_no_bit_past_the_last(count: int) -> None:
    bits = row_bits.bits_of_all(count)

    assert row_bits.count_bits(bits) == count
