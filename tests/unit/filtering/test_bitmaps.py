"""Conversions between masks, row lists, packed bits and roaring bitmaps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.filtering import bitmaps

SIZES = [0, 1, 7, 8, 9, 4096, 65_535, 65_536, 65_537, 400_000]
SHARES = [0.0, 0.0001, 0.03, 0.0625, 0.07, 0.5, 0.99, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), st.sampled_from(SHARES), st.booleans(), st.integers(0, 1000))
def test_every_form_holds_the_same_rows(
    rows: int, share: float, clustered: bool, seed: int
) -> None:
    """clustered makes runs, which `run_optimize` stores in their own kind of container."""
    generator = np.random.default_rng(seed)
    mask = generator.random(rows) < share
    if clustered:
        mask = np.repeat(generator.random(-(-rows // 500)) < share, 500)[:rows]
    wanted = BitMap(np.flatnonzero(mask).tolist())
    assert bitmaps.from_mask(mask) == wanted
    shuffled = generator.permutation(np.flatnonzero(mask)).astype(np.uint32)
    assert bitmaps.from_rows(shuffled) == wanted
    assert np.array_equal(bitmaps.to_rows(wanted), np.flatnonzero(mask))
    packed = np.packbits(mask, bitorder="little")
    assert np.array_equal(bitmaps.to_packed_bits(wanted, rows), packed)
    wanted.run_optimize()
    assert np.array_equal(bitmaps.to_packed_bits(wanted, rows), packed)
    assert bitmaps.deserialise(memoryview(wanted.serialize())) == wanted


def test_all_rows_is_every_row_once() -> None:
    assert list(bitmaps.all_rows(3)) == [0, 1, 2]
    assert not bitmaps.all_rows(0)
    assert bitmaps.to_packed_bits(bitmaps.all_rows(10), 10).tolist() == [255, 3]


@pytest.mark.parametrize("damaged", [b"", b"garbage", BitMap([1, 70_000]).serialize()[:-3]])
def test_damaged_bitmap_is_corrupt(damaged: bytes) -> None:
    with pytest.raises(Corrupt):
        bitmaps.deserialise(memoryview(damaged))
