"""The objects of a bulk load: staged rows, receipts, what was prepared, what was decided.

Each is an envelope. All but the decision lie under the shard's `load/{load}/`. Names and bodies are
functions of what was sent (rows, receipts) or unique (prepared), so creating one again is harmless.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import xxhash

from shoal_cluster.bucket.create import create
from shoal_cluster.bucket.envelope import EnvelopeKind, decode, encode, put_id_of
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Conflict, Corrupt
from shoal_cluster.domain.ids import Epoch, ShardNumber
from shoal_cluster.domain.keys import LoadKeys
from shoal_cluster.domain.point import Tail, Vectors
from shoal_cluster.manifest.manifest import SegmentEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedRows:
    """Rows of one chunk as the shard stores them, parallel arrays."""

    ids: Sequence[bytes]
    vectors: Vectors
    tails: Sequence[Tail]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A chunk is staged in every shard. digest: of the source's rows, as the client made it.

    schema_version: that the rows were checked with. rows: by shard, those without rows left out.
    """

    digest: int
    schema_version: int
    rows: Mapping[ShardNumber, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The segments of a load in one shard, built by the primary of `epoch`; numbered from 1."""

    epoch: Epoch
    rows: int
    segments: tuple[SegmentEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """epochs: who prepared each shard that has rows. An abort has none."""

    commit: bool
    rows: int
    epochs: Mapping[ShardNumber, Epoch]


ABORT = Decision(commit=False, rows=0, epochs={})


async def stage_rows(
    store: Store, clock: Clock, keys: LoadKeys, chunk: str, rows: StagedRows
) -> bytes:
    """Creates the object and returns its put id, which is made of its contents.

    Raises: Conflict when other rows were staged under the name.
    """
    payload = msgpack.packb(
        [rows.ids, rows.vectors.shape[1], rows.vectors.data.cast("B"), rows.tails]
    )
    put_id = xxhash.xxh3_128_digest(payload)
    header = {**_place(keys), "chunk": chunk, "count": len(rows.ids), "put_id": put_id}
    body = encode(EnvelopeKind.LOAD_ROWS, header, payload)
    if await _create(store, clock, keys.rows(chunk), body, put_id) is not None:
        raise _other_rows(keys, chunk)
    return put_id


async def read_rows(store: Store, keys: LoadKeys, chunk: str) -> StagedRows | None:
    """Returns a chunk's rows in this shard, None when the object is not there.

    Raises: Corrupt naming the object.
    """
    key = keys.rows(chunk)
    body = await store.get(key)
    if body is None:
        return None
    envelope = decode(body, EnvelopeKind.LOAD_ROWS, key=key)
    _require_place(envelope.header, keys, key)
    ids, dimension, vectors, tails = msgpack.unpackb(envelope.payload)
    return StagedRows(
        ids=ids,
        vectors=np.frombuffer(vectors, dtype=np.float32).reshape(len(ids), dimension),
        tails=tails,
    )


async def give_receipt(
    store: Store, clock: Clock, keys: LoadKeys, chunk: str, receipt: Receipt, contents: bytes
) -> None:
    """Creates a chunk's receipt. contents: the put ids of its rows, one after the other.

    Raises: Conflict when the receipt is of other rows.
    """
    rows = [[shard, count] for shard, count in sorted(receipt.rows.items())]
    version = receipt.schema_version
    put_id = xxhash.xxh3_128_digest(msgpack.packb([receipt.digest, version, rows, contents]))
    header = {
        **_place(keys),
        "chunk": chunk,
        "digest": receipt.digest,
        "schema_version": receipt.schema_version,
        "rows": rows,
        "put_id": put_id,
    }
    body = encode(EnvelopeKind.LOAD_RECEIPT, header)
    other = await _create(store, clock, keys.receipt(chunk), body, put_id)
    if other is not None:
        raise _other_rows(keys, chunk)


async def read_receipt(store: Store, keys: LoadKeys, chunk: str) -> Receipt | None:
    key = keys.receipt(chunk)
    body = await store.get(key)
    if body is None:
        return None
    header = decode(body, EnvelopeKind.LOAD_RECEIPT, key=key).header
    _require_place(header, keys, key)
    rows = {ShardNumber(shard): int(count) for shard, count in header["rows"]}
    return Receipt(digest=header["digest"], schema_version=header["schema_version"], rows=rows)


async def record_prepared(
    store: Store, clock: Clock, keys: LoadKeys, prepared: Prepared, put_id: bytes
) -> None:
    """Creates what the epoch prepared; only its primary does, once."""
    header = {**_place(keys), "epoch": prepared.epoch, "put_id": put_id}
    payload = msgpack.packb([prepared.rows, [entry.to_wire() for entry in prepared.segments]])
    body = encode(EnvelopeKind.LOAD_PREPARED, header, payload)
    key = keys.prepared_by(prepared.epoch)
    if await _create(store, clock, key, body, put_id) is not None:
        raise Conflict(f"{key} is there already: this epoch has prepared the load before")


async def read_prepared(store: Store, keys: LoadKeys, key: str) -> Prepared | None:
    body = await store.get(key)
    if body is None:
        return None
    envelope = decode(body, EnvelopeKind.LOAD_PREPARED, key=key)
    _require_place(envelope.header, keys, key)
    rows, segments = msgpack.unpackb(envelope.payload)
    return Prepared(
        epoch=envelope.header["epoch"],
        rows=rows,
        segments=tuple(SegmentEntry.from_wire(entry) for entry in segments),
    )


async def decide(
    store: Store, clock: Clock, keys: LoadKeys, decision: Decision, put_id: bytes
) -> Decision:
    """Creates the decision unless there is one; returns the one that counts."""
    header = {"collection": keys.collection, "load": keys.load, "put_id": put_id}
    epochs = [[shard, epoch] for shard, epoch in sorted(decision.epochs.items())]
    payload = msgpack.packb([decision.commit, decision.rows, epochs])
    body = encode(EnvelopeKind.LOAD_DECISION, header, payload)
    other = await _create(store, clock, keys.decision, body, put_id)
    return decision if other is None else decode_decision(other, key=keys.decision)


async def read_decision(store: Store, keys: LoadKeys) -> Decision | None:
    body = await store.get(keys.decision)
    return None if body is None else decode_decision(body, key=keys.decision)


def decode_decision(body: bytes, *, key: str) -> Decision:
    """Raises: Corrupt naming `key`."""
    envelope = decode(body, EnvelopeKind.LOAD_DECISION, key=key)
    if not key.endswith(f"/load/{envelope.header.get('load')}"):
        raise Corrupt(f"object {key} is the decision of another load")
    commit, rows, epochs = msgpack.unpackb(envelope.payload)
    return Decision(
        commit=commit,
        rows=rows,
        epochs={ShardNumber(shard): Epoch(epoch) for shard, epoch in epochs},
    )


async def _create(store: Store, clock: Clock, key: str, body: bytes, put_id: bytes) -> bytes | None:
    return await create(
        store, key, body, put_id=put_id, read_put_id=put_id_of, clock=clock, deadline_s=None
    )


def _place(keys: LoadKeys) -> dict[str, Any]:
    return {"collection": keys.collection, "shard": keys.shard, "load": keys.load}


def _require_place(header: Mapping[str, Any], keys: LoadKeys, key: str) -> None:
    if any(header.get(name) != value for name, value in _place(keys).items()):
        raise Corrupt(f"object {key} belongs to another load; it was copied or misplaced")


def _other_rows(keys: LoadKeys, chunk: str) -> Conflict:
    return Conflict(
        f"chunk {chunk} of load {keys.load} was staged before with other rows; has the source "
        "changed? abort the load, or give the changed source a load id of its own",
        field="chunk",
    )
