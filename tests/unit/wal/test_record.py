"""The bytes of one WAL object."""

from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_cluster.bucket.envelope import EnvelopeKind, encode
from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import Epoch, Seq, Slot
from shoal_cluster.wal.record import (
    EMPTY_BATCH,
    OperationBatch,
    RecordKind,
    RequestMark,
    WalIdentity,
    WalRecord,
    decode_record,
    encode_record,
)

IDENTITY = WalIdentity(cluster_uuid=bytes(range(16)), collection="c" * 32, shard=3)
KEY = f"c/{'c' * 32}/s/0003/wal/{7:020d}"


@st.composite
def batches(draw: st.DrawFn) -> OperationBatch:
    dimension = draw(st.integers(1, 5))
    upserts = draw(st.lists(st.booleans(), max_size=12))
    count = sum(upserts)
    numbers = draw(
        st.lists(
            st.floats(width=32, allow_nan=False),
            min_size=count * dimension,
            max_size=count * dimension,
        )
    )
    marks = draw(
        st.lists(
            st.builds(
                RequestMark,
                client_id=st.text(min_size=1, max_size=9),
                request_no=st.integers(1, 2**63 - 1),
                first=st.integers(0, 12),
                operations=st.integers(0, 12),
                affected=st.integers(0, 12),
                more=st.booleans(),
            ),
            max_size=3,
        )
    )
    return OperationBatch(
        requests=tuple(marks),
        ids=[draw(st.binary(min_size=1, max_size=9)) for _ in upserts],
        upserts=bytes(upserts),
        vectors=np.array(numbers, dtype=np.float32).reshape(count, dimension),
        tails=[draw(st.binary(max_size=9)) for _ in range(count)],
    )


def record_of(batch: OperationBatch, kind: RecordKind = RecordKind.DATA) -> WalRecord:
    return WalRecord(
        slot=Slot(7),
        epoch=Epoch(2),
        kind=kind,
        put_id=bytes(range(16)),
        prev_put_id=bytes(range(16, 32)),
        first_seq=Seq(40),
        memtable_start=Slot(5),
        batch=batch,
    )


SIMPLE = OperationBatch(
    requests=(RequestMark("client", 9, 0, 2, 2, False),),
    ids=[b"a", b"b"],
    upserts=b"\x01\x00",
    vectors=np.array([[1.5, -2.0]], dtype=np.float32),
    tails=[b"tail"],
)


def assert_equal(left: WalRecord, right: WalRecord) -> None:
    assert replace(left, batch=SIMPLE) == replace(right, batch=SIMPLE)
    ours, theirs = left.batch, right.batch
    assert ours.requests == theirs.requests
    assert list(ours.ids) == list(theirs.ids) and list(ours.tails) == list(theirs.tails)
    assert ours.upserts == theirs.upserts
    assert ours.vectors.shape == theirs.vectors.shape
    assert ours.vectors.tobytes() == theirs.vectors.tobytes()


@given(batches())
def test_a_record_comes_back_as_it_went(batch):
    record = record_of(batch)
    body = encode_record(record, IDENTITY)
    assert_equal(decode_record(body, IDENTITY, key=KEY), record)
    # From an unaligned view too, and the result does not depend on it afterwards.
    frame = bytearray(b"?" + body)
    decoded = decode_record(memoryview(frame)[1:], IDENTITY, key=KEY)
    frame[:] = bytes(len(frame))
    assert_equal(decoded, record)
    assert decoded.batch.vectors.flags.aligned


def test_a_fence_has_no_operations_and_its_seq_is_the_next_to_be_given_out():
    fence = record_of(EMPTY_BATCH, RecordKind.FENCE)
    decoded = decode_record(encode_record(fence, IDENTITY), IDENTITY, key=KEY)
    assert (decoded.kind, len(decoded.batch), decoded.first_seq) == (RecordKind.FENCE, 0, 40)
    assert decoded.last_seq == 39


@pytest.mark.parametrize(
    "identity",
    [
        replace(IDENTITY, cluster_uuid=bytes(16)),
        replace(IDENTITY, collection="d" * 32),
        replace(IDENTITY, shard=4),
    ],
)
def test_a_record_of_another_place_is_refused(identity):
    body = encode_record(record_of(SIMPLE), IDENTITY)
    with pytest.raises(Corrupt, match="copied or misplaced"):
        decode_record(body, identity, key=KEY)


def test_a_record_in_another_slot_is_refused():
    body = encode_record(record_of(SIMPLE), IDENTITY)
    with pytest.raises(Corrupt, match="says it is slot 7"):
        decode_record(body, IDENTITY, key=KEY[:-1] + "8")


def test_every_flipped_bit_is_noticed():
    body = encode_record(record_of(SIMPLE), IDENTITY)
    for place in range(len(body)):
        damaged = bytearray(body)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(Corrupt, match=KEY):
            decode_record(bytes(damaged), IDENTITY, key=KEY)


def header_of(**changes: object) -> dict[str, object]:
    record = record_of(SIMPLE)
    return {
        "cluster": IDENTITY.cluster_uuid,
        "collection": IDENTITY.collection,
        "shard": IDENTITY.shard,
        "slot": 7,
        "epoch": 2,
        "kind": "data",
        "put_id": record.put_id,
        "prev_put_id": record.prev_put_id,
        "first_seq": 40,
        "count": 2,
        "memtable_start": 5,
        **changes,
    }


PAYLOAD = [[["client", 9, 0, 2, 2, False]], [b"a", b"b"], b"\x01\x00", 2, bytes(8), [b"tail"]]


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        ({"kind": "other"}, PAYLOAD),
        ({"count": 3}, PAYLOAD),
        ({}, [*PAYLOAD[:2], b"\x01", *PAYLOAD[3:]]),
        ({}, [*PAYLOAD[:4], bytes(7), PAYLOAD[5]]),
        ({}, [*PAYLOAD[:5], []]),
        ({}, PAYLOAD[:5]),
        ({}, [[["client"]], *PAYLOAD[1:]]),
        ({}, "no list"),
        ({"kind": "fence"}, PAYLOAD),
    ],
)
def test_a_record_that_contradicts_itself_under_a_sound_checksum_is_refused(header, payload):
    body = encode(EnvelopeKind.WAL, header_of(**header), msgpack.packb(payload))
    with pytest.raises(Corrupt, match=KEY):
        decode_record(body, IDENTITY, key=KEY)
