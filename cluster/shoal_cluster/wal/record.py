"""One WAL object: a fence, or a batch of operations in the shard's order.

The header carries everything needed to tell a misplaced, copied or foreign object from the right
one. Operations are struct-of-arrays so that vectors and tails are copied, never re-encoded.
Replaying a record is a pure, total function of the record: whatever could fail was refused before
the append (shard/primary.py).
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack
import numpy as np

from shoal_cluster.bucket.envelope import EnvelopeKind, decode, encode
from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import Epoch, Seq, Slot
from shoal_cluster.domain.point import Vectors

FIRST_PUT_ID = bytes(16)
"""What slot 1 names as its predecessor."""

OPERATION_BYTES = 16
"""What an operation takes in a record besides its id, vector and tail, at most."""


class RecordKind(enum.Enum):
    FENCE = "fence"
    DATA = "data"


class RequestMark(NamedTuple):
    """Which operations of a batch one client request became; remembered for deduplication.

    first: index of its first operation in the batch. affected: what the client was told.
    more: a delete-by-filter left rows.
    """

    client_id: str
    request_no: int
    first: int
    operations: int
    affected: int
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationBatch:
    """Operations in order. Operation i has sequence number first_seq + i.

    ids: UTF-8. upserts: one byte an operation, 1 for an upsert, 0 for a delete. vectors:
    (number of upserts, dimension) float32, tails: parallel to vectors (domain/point.py).
    """

    requests: tuple[RequestMark, ...]
    ids: Sequence[bytes]
    upserts: bytes
    vectors: Vectors
    tails: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.ids)


def _empty_vectors() -> Vectors:
    return np.empty((0, 0), dtype=np.float32)


EMPTY_BATCH = OperationBatch(requests=(), ids=(), upserts=b"", vectors=_empty_vectors(), tails=())


@dataclass(frozen=True, slots=True, kw_only=True)
class WalRecord:
    """A decoded WAL object.

    prev_put_id: of the object in the slot before, so that the log is a chain (FIRST_PUT_ID in slot
    1). first_seq: of the batch's first operation; on
    a fence, the next sequence number to be given out. memtable_start: the first slot of the
    memtable this record belongs to, so that every replica cuts its memtables alike.
    """

    slot: Slot
    epoch: Epoch
    kind: RecordKind
    put_id: bytes
    prev_put_id: bytes
    first_seq: Seq
    memtable_start: Slot
    batch: OperationBatch = field(default=EMPTY_BATCH)

    @property
    def last_seq(self) -> Seq:
        return Seq(self.first_seq + len(self.batch) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WalIdentity:
    """Whose log it is: stamped into and checked on every record."""

    cluster_uuid: bytes
    collection: str
    shard: int


def encode_record(record: WalRecord, identity: WalIdentity) -> bytes:
    """Returns the object's bytes."""
    batch = record.batch
    header = {
        "cluster": identity.cluster_uuid,
        "collection": identity.collection,
        "shard": identity.shard,
        "slot": record.slot,
        "epoch": record.epoch,
        "kind": record.kind.value,
        "put_id": record.put_id,
        "prev_put_id": record.prev_put_id,
        "first_seq": record.first_seq,
        "count": len(batch),
        "memtable_start": record.memtable_start,
    }
    if record.kind is RecordKind.FENCE:
        assert not batch.ids and not batch.requests, "a fence carries no operations"
        return encode(EnvelopeKind.WAL, header, b"")
    payload: bytes = msgpack.packb(
        [
            [tuple(mark) for mark in batch.requests],
            batch.ids,
            batch.upserts,
            batch.vectors.shape[1],
            batch.vectors.data.cast("B") if batch.vectors.size else b"",
            batch.tails,
        ]
    )
    return encode(EnvelopeKind.WAL, header, payload)


def decode_record(body: bytes | memoryview, identity: WalIdentity, *, key: str) -> WalRecord:
    """Reverses `encode_record`; the result shares no memory with `body`.

    Raises: Corrupt naming `key`, when the checksum fails or the record belongs elsewhere; Conflict
    when a newer Shoal wrote it.
    """
    envelope = decode(body, EnvelopeKind.WAL, key=key)
    try:
        record = _decode_fields(envelope.header, envelope.payload, identity, key)
    except (KeyError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise Corrupt(f"object {key} lacks or contradicts itself in {error}") from error
    return record


def _decode_fields(
    header: Mapping[str, Any], payload: memoryview, identity: WalIdentity, key: str
) -> WalRecord:
    belongs = (header["cluster"], header["collection"], header["shard"])
    if belongs != (identity.cluster_uuid, identity.collection, identity.shard):
        raise Corrupt(
            f"object {key} belongs to shard {belongs[2]} of collection {belongs[1]} of cluster "
            f"{bytes(belongs[0]).hex()}; it was copied or misplaced"
        )
    if not key.endswith(f"/{header['slot']:020d}"):
        raise Corrupt(f"object {key} says it is slot {header['slot']}; it was copied or misplaced")
    kind = RecordKind(header["kind"])
    batch = EMPTY_BATCH
    if kind is RecordKind.DATA:
        batch = _decode_batch(payload)
    counts = (len(batch.ids), len(batch.upserts), sum(batch.upserts))
    if counts != (header["count"], header["count"], len(batch.tails)):
        raise Corrupt(f"object {key} contradicts itself: header and payload count different rows")
    return WalRecord(
        slot=header["slot"],
        epoch=header["epoch"],
        kind=kind,
        put_id=header["put_id"],
        prev_put_id=header["prev_put_id"],
        first_seq=header["first_seq"],
        memtable_start=header["memtable_start"],
        batch=batch,
    )


def _decode_batch(payload: memoryview) -> OperationBatch:
    # msgpack copies what it unpacks into new bytes objects, which are aligned for float32.
    marks, ids, upserts, dimension, vectors, tails = msgpack.unpackb(payload)
    return OperationBatch(
        requests=tuple(RequestMark(*mark) for mark in marks),
        ids=ids,
        upserts=upserts,
        vectors=np.frombuffer(vectors, dtype=np.float32).reshape(len(tails), dimension),
        tails=tails,
    )
