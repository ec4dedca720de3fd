"""Calls the primary of one shard, following it wherever it moves. Last step of a write.

The same message goes out again, under the same request name, until it is answered or the deadline
passes; the shard recognises the name and returns its first answer. So a lost reply costs time,
never a second application, and only what is still unknown at the deadline ends as Indeterminate.
"""

import asyncio
from typing import Any

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import (
    Indeterminate,
    NotFound,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.shard_caller import ShardCaller, TopologySource
from shoal_cluster.domain.topology import CollectionPlace, Topology
from shoal_cluster.shard.calls import GetCall, RowsReply, WriteCall, WriteReply

ATTEMPT_S_MAX = 5.0
"""Then the message goes out again, perhaps to another primary. Above the slowest usual PUT."""

WATCH_AFTER_S = 0.25
"""An attempt that takes longer is given up once its server leads no more: a stopped process breaks
no link, so its callers would wait ATTEMPT_S_MAX though another serves after 3 s. Most attempts are
answered sooner and cost no watch."""

WATCH_ROUND_S = 0.5
"""Also looked at this often: a restarted controller numbers its topologies anew."""

ROUND_WAIT_MIN_S, ROUND_WAIT_MAX_S = 0.05, 1.0
"""Before trying again, unless a newer topology comes first. Doubles each time."""

RETRY_AFTER_MS_DEFAULT = 100


class PrimaryCalls:
    """Reaches primaries for one coordinator. Used from one event loop."""

    def __init__(self, *, caller: ShardCaller, topology: TopologySource, clock: Clock) -> None:
        self._caller = caller
        self._topology = topology
        self._clock = clock

    async def write(
        self, call: WriteCall, schema: CollectionSchema, *, deadline_s: float
    ) -> WriteReply:
        """Returns the answer of the first application of `call`.

        Raises: Indeterminate when the write may have been applied; Unavailable, Overloaded or
        NotFound (the collection was dropped) when it was not; what the primary says about it.
        """
        header, _ = await self._ask(
            call, call.body, schema, deadline_s=deadline_s, on_lost=Outcome.MAYBE_APPLIED
        )
        return WriteReply.from_wire(header)

    async def get(self, call: GetCall, schema: CollectionSchema, *, deadline_s: float) -> RowsReply:
        """Returns rows as the primary has them; without tails and vectors they are all there.

        Raises: Unavailable, Overloaded, NotFound; nothing was applied, this is a read.
        """
        header, body = await self._ask(
            call, b"", schema, deadline_s=deadline_s, on_lost=Outcome.NOT_APPLIED
        )
        return RowsReply.from_wire(header, body)

    async def _ask(
        self,
        call: WriteCall | GetCall,
        body: bytes | memoryview,
        schema: CollectionSchema,
        *,
        deadline_s: float,
        on_lost: Outcome,
    ) -> tuple[Any, memoryview]:
        header = call.to_wire()
        topology = self._topology.current()
        wait_s = ROUND_WAIT_MIN_S
        lost: ShoalError | None = None  # an attempt that may have been applied
        failure: ShoalError = Unavailable("the deadline passed")
        while True:
            remaining_s = deadline_s - self._clock.monotonic_s()
            if remaining_s <= 0:
                raise _gave_up(call, schema, lost, failure)
            primary = (
                _same(topology.collections.get(schema.name), schema).shards[call.shard].primary
            )
            try:
                if primary is None:
                    raise Unavailable("a takeover is under way")
                attempt = asyncio.ensure_future(
                    self._caller.call(
                        primary,
                        call.METHOD,
                        header,
                        body,
                        timeout_s=min(remaining_s, ATTEMPT_S_MAX),
                        on_lost=on_lost,
                    )
                )
                return await self._while_it_leads(
                    attempt,
                    primary,
                    call=call,
                    schema=schema,
                    topology=topology,
                    on_lost=on_lost,
                )
            except Overloaded as error:
                failure = error
                retry_after_s = (error.retry_after_ms or RETRY_AFTER_MS_DEFAULT) / 1000
                if retry_after_s >= deadline_s - self._clock.monotonic_s():
                    raise _gave_up(call, schema, lost, error) from error
                await self._clock.sleep(retry_after_s)
                topology = self._topology.current()
                continue
            except Indeterminate as error:
                if error.field is not None:
                    raise  # the shard's own verdict about the request, not a lost reply
                lost = failure = error
            except (Unavailable, NotFound) as error:
                # NotPrimary; or the server is gone, or has not loaded the shard yet.
                failure = error
            remaining_s = max(0.0, deadline_s - self._clock.monotonic_s())
            topology = await self._topology.newer_than(topology.version, min(wait_s, remaining_s))
            wait_s = min(2 * wait_s, ROUND_WAIT_MAX_S)

    async def _while_it_leads(
        self,
        attempt: asyncio.Task[tuple[Any, memoryview]],
        primary: ServerId,
        *,
        call: WriteCall | GetCall,
        schema: CollectionSchema,
        topology: Topology,
        on_lost: Outcome,
    ) -> tuple[Any, memoryview]:
        """Returns the attempt's reply, or gives the attempt up when `primary` leads no more.

        Raises: as the attempt; when given up, what `on_lost` says a lost reply is.
        """
        try:
            await asyncio.wait((attempt,), timeout=WATCH_AFTER_S)
            while not attempt.done():
                news = asyncio.ensure_future(
                    self._topology.newer_than(topology.version, WATCH_ROUND_S)
                )
                try:
                    await asyncio.wait((attempt, news), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    news.cancel()
                topology = self._topology.current()
                if not attempt.done() and _primary_of(topology, call, schema) != primary:
                    reason = (
                        f"server {primary} stopped leading shard {call.shard} before it answered"
                    )
                    if on_lost is Outcome.MAYBE_APPLIED:
                        raise Indeterminate(reason)
                    raise Unavailable(reason)
            return attempt.result()
        finally:
            if not attempt.done():
                attempt.cancel()
                await asyncio.wait((attempt,))
            if not attempt.cancelled():
                attempt.exception()  # seen: what a given up attempt found is of no interest


def _primary_of(
    topology: Topology, call: WriteCall | GetCall, schema: CollectionSchema
) -> ServerId | None:
    place = topology.collections.get(schema.name)
    if place is None or place.schema.id != schema.id:
        return None
    return place.shards[call.shard].primary


def _same(place: CollectionPlace | None, schema: CollectionSchema) -> CollectionPlace:
    if place is None or place.schema.id != schema.id:
        raise NotFound(f"collection {schema.name!r} was dropped", field="collection")
    return place


def _gave_up(
    call: WriteCall | GetCall,
    schema: CollectionSchema,
    lost: ShoalError | None,
    failure: ShoalError,
) -> ShoalError:
    """Returns how a call ends that nobody answered for good."""
    where = f"shard {call.shard} of {schema.name!r}"
    if lost is not None:
        return Indeterminate(
            f"the write to {where} may have been applied; send it again with the same request id: "
            f"{lost.message}"
        )
    if isinstance(failure, Overloaded):
        return failure
    return Unavailable(f"the primary of {where} did not answer in time: {failure.message}")
