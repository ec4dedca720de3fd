"""Splits a write into one part per shard. Pure; third step of a write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import NO_SLOT, PointId, ShardNumber, Slot
from shoal_cluster.domain.limits import KIB, WAL_RECORD_BYTES_MAX
from shoal_cluster.domain.partition import shard_of_id, shard_of_value
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.ingest.validate import (
    Batch,
    DeleteRequest,
    DeleteWhereRequest,
    PatchRequest,
    Tails,
    UpsertRequest,
)
from shoal_cluster.shard.calls import WriteCall, WriteKind
from shoal_cluster.wal.record import OPERATION_BYTES

PART_BYTES_MAX = WAL_RECORD_BYTES_MAX - 64 * KIB
"""A part becomes one WAL record; 64 KiB are for what is not rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One shard's part of a write. rows: positions in the request, parallel to the call's ids."""

    call: WriteCall
    rows: Sequence[int]


def route_upsert(
    request: UpsertRequest, schema: CollectionSchema, batch: Batch, tails: Tails
) -> list[Part]:
    """Returns one part per shard that owns a point of the batch, by shard number.

    A point belongs to the shard of its partition value, or of its id.

    Raises: InvalidRequest when a part would not fit into one WAL record.
    """
    if schema.shards == 1:
        grouped: Mapping[ShardNumber, Sequence[int]] = {ShardNumber(0): range(len(batch.ids))}
    elif schema.partition_by is not None:
        grouped = _grouped([shard_of_value(v, schema.shards) for v in tails.partition_values])
    else:
        grouped = rows_by_id(request.ids, schema)
    parts = []
    for shard, rows in grouped.items():
        everything = len(rows) == len(batch.ids)
        vectors = batch.vectors if everything else batch.vectors[rows]
        if_seqs = request.if_seqs
        call = WriteCall(
            collection=schema.id,
            shard=shard,
            client_id=request.name.client_id,
            request_no=request.name.request_no,
            kind=WriteKind.UPSERT,
            ids=batch.ids if everything else [batch.ids[i] for i in rows],
            tails=tails.encoded if everything else [tails.encoded[i] for i in rows],
            if_absent=request.if_absent,
            if_seqs=None if if_seqs is None else [if_seqs[i] for i in rows],
            since=since_of(request),
            body=vectors.data.cast("B"),
        )
        _require_record_size(call)
        parts.append(Part(call=call, rows=rows))
    return parts


def route_ids(
    request: PatchRequest | DeleteRequest,
    kind: WriteKind,
    ids: Sequence[bytes],
    schema: CollectionSchema,
    *,
    patches: Sequence[Mapping[str, Any]] = (),
) -> list[Part]:
    """Returns the parts of a delete or patch by id.

    In a collection partitioned by an attribute an id does not tell its shard, so every shard gets
    all ids; those that are not there are skipped.
    """
    if schema.shards == 1 or schema.partition_by is not None:
        everything = range(len(ids))
        grouped: Mapping[ShardNumber, Sequence[int]] = {
            ShardNumber(number): everything for number in range(schema.shards)
        }
    else:
        grouped = rows_by_id([point_id.decode() for point_id in ids], schema)
    return [
        Part(
            call=WriteCall(
                collection=schema.id,
                shard=shard,
                client_id=request.name.client_id,
                request_no=request.name.request_no,
                kind=kind,
                ids=[ids[i] for i in rows],
                patches=[patches[i] for i in rows] if patches else (),
                since=since_of(request),
            ),
            rows=rows,
        )
        for shard, rows in grouped.items()
    ]


def since_of(
    request: UpsertRequest | PatchRequest | DeleteRequest | DeleteWhereRequest,
) -> Slot | None:
    """Returns `WriteCall.since`: when the client sent the request first is not known here."""
    return NO_SLOT if request.again else None


def rows_by_id(ids: Sequence[str], schema: CollectionSchema) -> dict[ShardNumber, list[int]]:
    """Groups positions of ids by the shard of the id."""
    return _grouped([shard_of_id(PointId(point_id), schema.shards) for point_id in ids])


def _grouped(shards: Sequence[ShardNumber]) -> dict[ShardNumber, list[int]]:
    grouped: dict[ShardNumber, list[int]] = {}
    for i, shard in enumerate(shards):
        grouped.setdefault(shard, []).append(i)
    return dict(sorted(grouped.items()))


def _require_record_size(call: WriteCall) -> None:
    size_bytes = (
        len(call.body)
        + sum(map(len, call.tails))
        + sum(map(len, call.ids))
        + OPERATION_BYTES * len(call.ids)
    )
    if size_bytes > PART_BYTES_MAX:
        raise InvalidRequest(
            f"the batch holds {size_bytes} bytes for shard {call.shard}, which writes a batch as "
            f"one record; send fewer than {len(call.ids)} points at a time",
            field="points",
            limit=f"{PART_BYTES_MAX} bytes for one shard",
        )
