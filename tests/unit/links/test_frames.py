"""The codec alone: any header and body survive any chunking; nothing malformed gets through."""

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_cluster.domain import limits
from shoal_protos.frames import (
    FRAME_BYTES_MAX,
    PREFIX_BYTES,
    Frame,
    FrameDecoder,
    FrameError,
    FrameType,
    encode_frame,
)

headers = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.integers(0, 99), inner, max_size=4)
    ),
    max_leaves=10,
)
messages = st.tuples(
    st.sampled_from(FrameType),
    st.integers(0, 2**32 - 1),
    headers,
    st.lists(st.binary(max_size=20_000), max_size=3),
)


def joined(buffers: list) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def decoded(decoder: FrameDecoder, stream: bytes, cuts: list[int]) -> list[Frame]:
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [
        frame
        for start, end in itertools.pairwise(bounds)
        for frame in decoder.feed(stream[start:end])
    ]


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 70_000), max_size=12))
def test_frames_survive_any_chunking(sent: list, cuts: list[int]) -> None:
    stream = b"".join(joined(encode_frame(*message)) for message in sent)
    decoder = FrameDecoder()
    received = decoded(decoder, stream, cuts)
    assert [(f.type, f.request_id, f.header, bytes(f.body)) for f in received] == [
        (frame_type, request_id, header, b"".join(parts))
        for frame_type, request_id, header, parts in sent
    ]
    assert decoder.buffered_bytes == 0


@given(st.lists(messages, min_size=1, max_size=3))
def test_frames_survive_one_byte_at_a_time(sent: list) -> None:
    sent = [(kind, n, header, [part[:50] for part in parts]) for kind, n, header, parts in sent]
    stream = b"".join(joined(encode_frame(*message)) for message in sent)
    received = decoded(FrameDecoder(), stream, list(range(len(stream))))
    assert [(f.header, bytes(f.body)) for f in received] == [
        (header, b"".join(parts)) for _, _, header, parts in sent
    ]


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_garbage_yields_frames_or_frame_errors_only(garbage: bytes, cuts: list[int]) -> None:
    decoder = FrameDecoder()
    try:
        decoded(decoder, garbage, cuts)
    except FrameError:
        with pytest.raises(FrameError):
            decoder.feed(b"")
    assert decoder.buffered_bytes <= len(garbage)


@given(st.binary(min_size=1, max_size=200))
def test_garbage_header_is_a_frame_error_or_a_value(header: bytes) -> None:
    stream = struct.pack("<IBII", 9 + len(header), FrameType.REQUEST, 7, len(header)) + header
    try:
        frames = FrameDecoder().feed(stream)
    except FrameError:
        return
    assert len(frames) == 1


def test_deeply_nested_header_is_refused() -> None:
    header = b"\x91" * 100_000 + b"\x01"
    stream = struct.pack("<IBII", 9 + len(header), FrameType.REQUEST, 7, len(header)) + header
    with pytest.raises(FrameError):
        FrameDecoder().feed(stream)


def test_layout_is_the_documented_one() -> None:
    frame = joined(encode_frame(FrameType.REPLY, 0x01020304, [1], b"xyz"))
    assert frame == bytes.fromhex("0e000000 04 04030201 02000000 9101") + b"xyz"
    assert joined(encode_frame(FrameType.PING, 1)) == bytes.fromhex("09000000 07 01000000 00000000")


def test_frame_limit_is_the_servers_limit() -> None:
    assert FRAME_BYTES_MAX == limits.FRAME_BYTES_MAX


def test_frame_of_exactly_the_limit_passes_and_one_byte_more_is_refused() -> None:
    body = bytes(FRAME_BYTES_MAX - PREFIX_BYTES)
    assert encode_frame(FrameType.REPLY, 1, None, body)
    with pytest.raises(FrameError, match="over the limit of 67108864 bytes"):
        encode_frame(FrameType.REPLY, 1, None, [body, b"x"])


def test_announced_oversize_is_refused_before_anything_is_buffered() -> None:
    decoder = FrameDecoder(frame_bytes_max=1024)
    with pytest.raises(FrameError, match="frame of 1025 bytes is over the limit of 1024"):
        decoder.feed(struct.pack("<IBII", 1021, FrameType.REPLY, 1, 0))
    assert decoder.buffered_bytes == 0


def test_header_longer_than_its_frame_is_refused() -> None:
    with pytest.raises(FrameError, match="cannot hold a header of 5 bytes"):
        FrameDecoder().feed(struct.pack("<IBII", 9 + 4, FrameType.REPLY, 1, 5) + b"\x00" * 9)


def test_unknown_type_is_refused() -> None:
    with pytest.raises(FrameError, match="frame type 77 is unknown"):
        FrameDecoder().feed(struct.pack("<IBII", 9, 77, 1, 0))


def test_large_body_is_neither_copied_when_sent_nor_when_received_whole() -> None:
    vectors = np.arange(40_000, dtype=np.float32).reshape(100, 400)
    buffers = encode_frame(FrameType.REQUEST, 1, ["m"], [vectors.data, b"tail"])
    assert np.shares_memory(np.frombuffer(buffers[1], dtype=np.uint8), vectors)
    stream = joined(buffers)
    (frame,) = FrameDecoder().feed(stream)
    whole = np.frombuffer(stream, dtype=np.uint8)
    assert np.shares_memory(np.frombuffer(frame.body, dtype=np.uint8), whole)
    assert frame.body.readonly
    assert frame.body == vectors.tobytes() + b"tail"


def test_empty_array_is_an_empty_body() -> None:
    (frame,) = FrameDecoder().feed(
        joined(encode_frame(FrameType.REPLY, 1, None, np.empty((0, 384), np.float32).data))
    )
    assert frame.body == b""


def test_a_header_that_cannot_be_packed_leaves_the_packer_usable() -> None:
    with pytest.raises(TypeError):
        encode_frame(FrameType.REPLY, 1, ["text", object()])
    assert joined(encode_frame(FrameType.REPLY, 1, [1])).endswith(b"\x91\x01")
