"""Runs writes: check, route, send every part to its primary. Third step of a write.

A write is acknowledged when every part is durable and visible. Parts of different shards are not
atomic together; each is, on its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Indeterminate, NotFound, ShoalError
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.partition import shard_of_value
from shoal_cluster.domain.request import RequestName, validate_request_name
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Position, merge_tokens
from shoal_cluster.domain.shard_caller import ShardCaller, TopologySource
from shoal_cluster.domain.topology import require_topology
from shoal_cluster.filtering.expression import Expression, pinned_values
from shoal_cluster.filtering.validation import validate
from shoal_cluster.filtering.wire import Wire, to_wire
from shoal_cluster.ingest.moves import Found, check_conditions, find_elsewhere, remove_elsewhere
from shoal_cluster.ingest.parts import each_shard, write_parts
from shoal_cluster.ingest.primary_calls import PrimaryCalls
from shoal_cluster.ingest.route import Part, route_ids, route_upsert, since_of
from shoal_cluster.ingest.validate import (
    DeleteRequest,
    DeleteWhereRequest,
    PatchRequest,
    Tails,
    UpsertRequest,
    check_batch,
    check_patch,
    encode_ids,
    encode_tails,
)
from shoal_cluster.shard.calls import GetCall, WriteCall, WriteKind, WriteReply

SLICE_ROWS = 64
"""Rows checked between two turns of the event loop: about 1 ms, so searches are not held up."""

PASSES_MAX = 10_000
"""Of a delete by filter: with DELETE_BY_FILTER_MAX rows each, more than a shard can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResult:
    """token: positions the session must see from now on. seqs: of an upsert, by row of the request.

    affected: rows written, patched or deleted. missing: of a patch, ids that do not exist.
    """

    schema: CollectionSchema
    token: Mapping[ShardNumber, Position]
    affected: int
    seqs: Sequence[int] = ()
    missing: Sequence[str] = ()


class Writer:
    """Executes the writes of one coordinator. Used from one event loop.

    All methods raise InvalidRequest, NotFound (the collection), Conflict, Overloaded, Unavailable
    (nothing was applied) and Indeterminate (send it again with the same name).
    """

    def __init__(self, *, caller: ShardCaller, topology: TopologySource, clock: Clock) -> None:
        self._topology = topology
        self._clock = clock
        self._calls = PrimaryCalls(caller=caller, topology=topology, clock=clock)

    async def upsert(self, request: UpsertRequest, *, timeout_s: float) -> WriteResult:
        """Writes points, replacing those with the same id."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        schema = self._schema(request.collection, request.name)
        batch = check_batch(request, schema)
        tails = Tails()
        for start in range(0, len(batch.ids), SLICE_ROWS):
            if start:
                await self._clock.sleep(0)
            rows = range(start, min(start + SLICE_ROWS, len(batch.ids)))
            encode_tails(request, schema, batch, rows=rows, tails=tails)
        parts = route_upsert(request, schema, batch, tails)
        may_move = schema.partition_by is not None and schema.shards > 1
        found: Found = {}
        if may_move:
            found = await find_elsewhere(parts, schema, self._calls, deadline_s=deadline_s)
            check_conditions(request, batch.ids, found)
        replies = await write_parts(parts, schema, self._calls, deadline_s=deadline_s)
        token = _token(parts, replies)
        if found:
            removed = await remove_elsewhere(
                request.name, found, parts, replies, schema, self._calls, deadline_s=deadline_s
            )
            token = merge_tokens(token, removed)
        return WriteResult(
            schema=schema,
            token=token,
            affected=len(batch.ids),
            seqs=_seqs(parts, replies, len(batch.ids)),
        )

    async def patch(self, request: PatchRequest, *, timeout_s: float) -> WriteResult:
        """Sets and removes attributes of existing points; vector and payload stay."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        schema = self._schema(request.collection, request.name)
        ids = encode_ids(request.ids)
        patches = check_patch(request, schema)
        parts = route_ids(request, WriteKind.PATCH, ids, schema, patches=patches)
        replies = await write_parts(parts, schema, self._calls, deadline_s=deadline_s)
        affected = sum(reply.affected for reply in replies)
        missing: Sequence[str] = ()
        if affected < len(ids):
            missing = await self._missing(parts, schema, deadline_s)
        return WriteResult(
            schema=schema, token=_token(parts, replies), affected=affected, missing=missing
        )

    async def delete(self, request: DeleteRequest, *, timeout_s: float) -> WriteResult:
        """Removes points by id; those that do not exist are no error."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        schema = self._schema(request.collection, request.name)
        ids = encode_ids(request.ids)
        parts = route_ids(request, WriteKind.DELETE, ids, schema)
        replies = await write_parts(parts, schema, self._calls, deadline_s=deadline_s)
        return WriteResult(
            schema=schema,
            token=_token(parts, replies),
            affected=sum(reply.affected for reply in replies),
        )

    async def delete_where(self, request: DeleteWhereRequest, *, timeout_s: float) -> WriteResult:
        """Removes every point that satisfies the filter when its shard is reached."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        schema = self._schema(request.collection, request.name)
        filter = validate(request.filter, schema.attributes)
        wire = to_wire(filter)
        passes = {
            shard: self._delete_where_on(shard, wire, request, schema, deadline_s)
            for shard in _shards_of(filter, schema)
        }
        ends = await each_shard(passes)
        return WriteResult(
            schema=schema,
            token={shard: position for shard, (position, _) in zip(passes, ends, strict=True)},
            affected=sum(affected for _, affected in ends),
        )

    async def _delete_where_on(
        self,
        shard: ShardNumber,
        wire: Wire,
        request: DeleteWhereRequest,
        schema: CollectionSchema,
        deadline_s: float,
    ) -> tuple[Position, int]:
        """Repeats the delete on one shard until nothing is left; each pass is a write of its own.

        The first pass has the request's name, the next ones names made from it, so that sending
        the request again repeats no pass and goes on where it ended.
        """
        affected = 0
        since = since_of(request)
        for number in range(PASSES_MAX):
            name = request.name if number == 0 else request.name.part("w", number)
            call = WriteCall(
                collection=schema.id,
                shard=shard,
                client_id=name.client_id,
                request_no=name.request_no,
                kind=WriteKind.DELETE_WHERE,
                filter=wire,
                since=since,
            )
            try:
                reply = await self._calls.write(call, schema, deadline_s=deadline_s)
            except ShoalError as error:
                if number == 0:
                    raise
                raise Indeterminate(
                    f"{affected} points of shard {shard} were removed, more may match; send the "
                    f"request again with the same request id: {error.message}",
                    retry_after_ms=error.retry_after_ms,
                ) from error
            affected += reply.affected
            if not reply.more:
                return reply.position, affected
            since = reply.slot  # whenever the next pass was carried out, it was after this one
        raise Indeterminate(f"{affected} points of shard {shard} removed, and more keep coming")

    async def _missing(
        self, parts: Sequence[Part], schema: CollectionSchema, deadline_s: float
    ) -> list[str]:
        """Returns the ids of a patch that no shard holds, in the order of the request."""
        work = {
            part.call.shard: self._calls.get(
                GetCall(
                    collection=schema.id,
                    shard=part.call.shard,
                    ids=part.call.ids,
                    with_tails=False,
                ),
                schema,
                deadline_s=deadline_s,
            )
            for part in parts
        }
        there = {point_id for reply in await each_shard(work) for point_id in reply.ids}
        asked = {
            row: point_id
            for part in parts
            for row, point_id in zip(part.rows, part.call.ids, strict=True)
        }
        return [asked[row].decode() for row in sorted(asked) if asked[row] not in there]

    def _schema(self, collection: str, name: RequestName) -> CollectionSchema:
        validate_request_name(name)
        topology = self._topology.current()
        place = topology.collections.get(collection)
        if place is None:
            require_topology(topology)
            raise NotFound(f"collection {collection[:80]!r} does not exist", field="collection")
        return place.schema


def _shards_of(filter: Expression, schema: CollectionSchema) -> list[ShardNumber]:
    """Returns the shards that can hold a matching row, ascending."""
    values = None
    if schema.partition_by is not None:
        values = pinned_values(filter, schema.partition_by)
    if values is None:
        return [ShardNumber(number) for number in range(schema.shards)]
    return sorted({shard_of_value(value, schema.shards) for value in values})


def _token(parts: Sequence[Part], replies: Sequence[WriteReply]) -> dict[ShardNumber, Position]:
    return {part.call.shard: reply.position for part, reply in zip(parts, replies, strict=True)}


def _seqs(parts: Sequence[Part], replies: Sequence[WriteReply], count: int) -> list[int]:
    """Returns each row's sequence number: a part's rows are numbered in order from first_seq."""
    seqs = [0] * count
    for part, reply in zip(parts, replies, strict=True):
        for offset, row in enumerate(part.rows):
            seqs[row] = reply.first_seq + offset
    return seqs
