"""Keeps an id unique in a collection that is partitioned by an attribute.

An upsert goes to the shard of the partition value; a former version of the same id may lie on
another shard, under another value. Steps:

1. before the write, ask the primaries of all other shards for the ids: one call per shard and
   batch, with an empty answer unless a point really moves;
2. write to the owners;
3. for ids found elsewhere: if the owner still has the row that step 2 wrote, delete the former
   version where it was found, on condition that it still has the sequence number seen in step 1.

Crash after 1: nothing happened. After 2: two shards hold the id, the write is not acknowledged,
and sending it again (or any later upsert of the id) completes step 3. Step 1 comes first and step
3 is conditional, because otherwise two concurrent upserts of one id under two values could each
delete what the other wrote; as it is, they may at worst leave both, until the next upsert. The
owner is asked again in step 3, because a request that is sent again late may already have been
superseded by another move.
"""

from collections.abc import Mapping, Sequence

from shoal_cluster.domain.errors import Conflict, Indeterminate, ShoalError
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Position
from shoal_cluster.ingest.parts import each_shard
from shoal_cluster.ingest.primary_calls import PrimaryCalls
from shoal_cluster.ingest.route import Part
from shoal_cluster.ingest.validate import UpsertRequest
from shoal_cluster.shard.calls import (
    AFTER_EVERY_SLOT,
    GetCall,
    RowsReply,
    WriteCall,
    WriteKind,
    WriteReply,
)

REMOVAL_ATTEMPTS_MAX = 3
"""Each is made without the ids that changed meanwhile, so a second one rarely fails."""

Found = Mapping[ShardNumber, Mapping[bytes, int]]
"""Sequence numbers of ids on shards that do not own them."""


async def find_elsewhere(
    parts: Sequence[Part], schema: CollectionSchema, calls: PrimaryCalls, *, deadline_s: float
) -> Found:
    """Returns where else the ids of an upsert are (step 1)."""
    owned = {part.call.shard: part.call.ids for part in parts}
    asked: dict[ShardNumber, list[bytes]] = {}
    for number in range(schema.shards):
        shard = ShardNumber(number)
        foreign = [point_id for owner, ids in owned.items() if owner != shard for point_id in ids]
        if foreign:
            asked[shard] = foreign
    replies = await _get(asked, schema, calls, deadline_s)
    return {
        shard: dict(zip(reply.ids, reply.seqs, strict=True))
        for shard, reply in replies.items()
        if reply.ids
    }


def check_conditions(request: UpsertRequest, ids: Sequence[bytes], found: Found) -> None:
    """Checks the conditions of an upsert against versions that lie under another partition value.

    Raises: Conflict naming the point (nothing was applied).
    """
    if not request.if_absent and request.if_seqs is None:
        return
    for shard, seqs in found.items():
        for i, point_id in enumerate(ids):
            if point_id in seqs:
                raise Conflict(
                    f"the point {point_id.decode()!r} exists under another partition value, on "
                    f"shard {shard} with seq {seqs[point_id]}; delete it there first",
                    field=f"conditions[{i}]",
                )


async def remove_elsewhere(
    name: RequestName,
    found: Found,
    parts: Sequence[Part],
    replies: Sequence[WriteReply],
    schema: CollectionSchema,
    calls: PrimaryCalls,
    *,
    deadline_s: float,
) -> dict[ShardNumber, Position]:
    """Deletes the former versions of points that moved (step 3); returns the shards' positions.

    Raises: Indeterminate when a former version may remain; sending the request again removes it.
    """
    moved = {point_id for seqs in found.values() for point_id in seqs}
    asked = {
        part.call.shard: [point_id for point_id in part.call.ids if point_id in moved]
        for part in parts
    }
    try:
        owners = await _get(
            {shard: ids for shard, ids in asked.items() if ids}, schema, calls, deadline_s
        )
    except ShoalError as error:
        raise _may_remain(error) from error
    written = {
        part.call.shard: range(reply.first_seq, reply.position.seq + 1)
        for part, reply in zip(parts, replies, strict=True)
    }
    ours = {
        point_id
        for shard, rows in owners.items()
        for point_id, seq in zip(rows.ids, rows.seqs, strict=True)
        if seq in written[shard]
    }
    removals = {
        shard: _remove(
            name,
            shard,
            {point_id: seq for point_id, seq in seqs.items() if point_id in ours},
            schema,
            calls,
            deadline_s,
        )
        for shard, seqs in found.items()
    }
    try:
        positions = await each_shard(removals)
    except ShoalError as error:
        raise _may_remain(error) from error
    return {
        shard: position
        for shard, position in zip(removals, positions, strict=True)
        if position is not None
    }


async def _remove(
    name: RequestName,
    shard: ShardNumber,
    seqs: Mapping[bytes, int],
    schema: CollectionSchema,
    calls: PrimaryCalls,
    deadline_s: float,
) -> Position | None:
    """Deletes the versions `seqs` on one shard; leaves alone what somebody wrote since."""
    for attempt in range(REMOVAL_ATTEMPTS_MAX):
        if not seqs:
            return None
        part_name = name.part("m", attempt)
        removal = WriteCall(
            collection=schema.id,
            shard=shard,
            client_id=part_name.client_id,
            request_no=part_name.request_no,
            kind=WriteKind.DELETE,
            ids=list(seqs),
            if_seqs=list(seqs.values()),
            since=AFTER_EVERY_SLOT,  # these versions are there, so it was not carried out
        )
        try:
            reply = await calls.write(removal, schema, deadline_s=deadline_s)
        except Conflict:
            rows = (await _get({shard: list(seqs)}, schema, calls, deadline_s))[shard]
            unchanged = set(zip(rows.ids, rows.seqs, strict=True))
            seqs = {i: seq for i, seq in seqs.items() if (i, seq) in unchanged}
        else:
            return reply.position
    raise Conflict(f"{len(seqs)} points on shard {shard} keep changing")


async def _get(
    asked: Mapping[ShardNumber, Sequence[bytes]],
    schema: CollectionSchema,
    calls: PrimaryCalls,
    deadline_s: float,
) -> dict[ShardNumber, RowsReply]:
    work = {
        shard: calls.get(
            GetCall(collection=schema.id, shard=shard, ids=ids, with_tails=False),
            schema,
            deadline_s=deadline_s,
        )
        for shard, ids in asked.items()
    }
    return dict(zip(work, await each_shard(work), strict=True))


def _may_remain(error: ShoalError) -> Indeterminate:
    return Indeterminate(
        "the points are written, but former versions under another partition value may remain; "
        f"send the request again with the same request id: {error.message}",
        field=error.field,
        retry_after_ms=error.retry_after_ms,
    )
