"""The envelope gives back what went in, and notices everything else (B-4)."""

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shoal_cluster.bucket.envelope import FORMAT_VERSION, EnvelopeKind, decode, encode, put_id_of
from shoal_cluster.domain.errors import Conflict, Corrupt

HEADER = {"put_id": b"0123456789abcdef", "slot": 7}
KEY = "c/1/s/0/wal/7"

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.integers(0, 255), st.dictionaries(st.text(), values, max_size=5), st.binary())
def test_decode_reverses_encode(kind: int, header: dict[str, object], payload: bytes) -> None:
    envelope = decode(encode(kind, header, payload), kind, key=KEY)
    assert envelope.header == header
    assert bytes(envelope.payload) == payload


def test_payload_is_a_view_and_no_copy() -> None:
    body = encode(EnvelopeKind.WAL, HEADER, b"payload")
    assert decode(body, EnvelopeKind.WAL, key=KEY).payload.obj is body


def test_every_flip_of_every_bit_is_corrupt() -> None:
    body = encode(EnvelopeKind.WAL, HEADER, b"payload")
    for at in range(len(body)):
        for bit in range(8):
            damaged = body[:at] + bytes([body[at] ^ (1 << bit)]) + body[at + 1 :]
            with pytest.raises(Corrupt, match=KEY):
                decode(damaged, EnvelopeKind.WAL, key=KEY)


def test_every_truncation_and_extension_is_corrupt() -> None:
    body = encode(EnvelopeKind.WAL, HEADER, b"payload")
    for damaged in [body[:size] for size in range(len(body))] + [body + b"\0", body + body]:
        with pytest.raises(Corrupt, match=KEY):
            decode(damaged, EnvelopeKind.WAL, key=KEY)


def test_object_of_another_kind_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="kind 2 where kind 1"):
        decode(encode(EnvelopeKind.MANIFEST, HEADER), EnvelopeKind.WAL, key=KEY)


def sealed(version: int, header: bytes) -> bytes:
    """Returns an envelope of any version around any header, with a right checksum."""
    body = struct.pack("<5sBHIQ", b"SHOAL", EnvelopeKind.WAL, version, len(header), 0) + header
    return body + xxhash.xxh3_128_digest(body)


def test_newer_format_asks_for_an_upgrade_naming_both_versions() -> None:
    with pytest.raises(Conflict, match=f"format 2.*reads up to {FORMAT_VERSION}; upgrade"):
        decode(sealed(2, b"whatever a newer Shoal writes"), EnvelopeKind.WAL, key=KEY)
    with pytest.raises(Conflict, match="newer Shoal"):
        put_id_of(sealed(2, b"whatever"))


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x90", b"\x80\x80", b"\x81\xa1"])
def test_header_that_is_no_map_is_corrupt(header: bytes) -> None:
    with pytest.raises(Corrupt, match=KEY):
        decode(sealed(1, header), EnvelopeKind.WAL, key=KEY)


def test_put_id_is_found_in_an_envelope_of_any_kind() -> None:
    for kind in EnvelopeKind:
        assert put_id_of(encode(kind, HEADER, b"x")) == HEADER["put_id"]


@pytest.mark.parametrize("put_id", [None, "0123456789abcdef", b"short"])
def test_envelope_without_a_put_id_is_corrupt_as_a_contested_object(put_id: object) -> None:
    with pytest.raises(Corrupt, match="put id"):
        put_id_of(encode(EnvelopeKind.WAL, {"put_id": put_id}))
