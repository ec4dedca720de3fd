"""Tombstones: round trip, alive bits, damage."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.index import row_bits
from shoal_cluster.segment.deletes import alive_bits, decode_tombstones, encode_tombstones


@given(st.data(), st.integers(1, 5000))
@settings(max_examples=60)
def test_tombstones_and_alive_bits_agree(data: st.DataObject, rows: int) -> None:
    """Invariant S-8 among others."""
    dead = BitMap(data.draw(st.sets(st.integers(0, rows - 1), max_size=200)))

    decoded = decode_tombstones(encode_tombstones(rows, dead), rows, key="one/tombstones")
    alive = alive_bits(rows, decoded)

    assert decoded == dead
    assert row_bits.rows_of_bits(alive, rows).tolist() == sorted(set(range(rows)) - set(dead))
    assert row_bits.count_bits(alive) == rows - len(dead)


def test_equal_sets_have_equal_bytes_however_they_were_made() -> None:
    one_by_one, at_once = BitMap(), BitMap()
    for row in range(1000):
        one_by_one.add(row)
    at_once.add_range(0, 1000)

    assert encode_tombstones(5000, one_by_one) == encode_tombstones(5000, at_once)


def test_any_flipped_bit_is_found_and_the_object_named() -> None:
    body = bytearray(encode_tombstones(900, BitMap([1, 5, 899])))
    for position in range(len(body)):
        body[position] ^= 4
        with pytest.raises(Corrupt, match="one/tombstones"):
            decode_tombstones(bytes(body), 900, key="one/tombstones")
        body[position] ^= 4


def test_tombstones_of_another_segment_are_refused() -> None:
    with pytest.raises(Corrupt, match="one/tombstones"):
        decode_tombstones(encode_tombstones(900, BitMap([1])), 901, key="one/tombstones")


def test_a_dead_row_past_the_end_is_a_programmer_error() -> None:
    with pytest.raises(AssertionError):
        encode_tombstones(10, BitMap([10]))
