"""Calls the primary of one shard, following it wherever it moves. Last step of a write.

The same message goes out again, under the same request name, until it is answered or the deadline
passes; the shard recognises the name and returns its first answer. So a lost reply costs time,
never a second application, and only what is still unknown at the deadline ends as Indeterminate.

Writes to one shard travel together, without timers: those of one turn of the event loop, and, while
GROUPS_IN_FLIGHT_MAX are on their way, all that come meanwhile. A group costs a frame, a task and a
reply, whatever it holds, and arrives as one: the shard's group commit finds it whole. Each write of
a group has its own fate, and those to be sent again go together again.

A shard that does not know a client must be told since when its request can have been carried out
(WriteCall.since). For a request that nobody sent before that is now: the newest slot this
coordinator has heard of, noted before its first attempt. When it has heard too little, it asks.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from shoal_cluster.domain.ids import NO_SLOT, CollectionId, ServerId, ShardNumber, Slot
from shoal_cluster.domain.limits import WAL_RECORD_BYTES_MAX
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.shard_caller import Body, ShardCaller, TopologySource
from shoal_cluster.domain.topology import CollectionPlace, Topology
from shoal_cluster.shard.calls import (
    UNKNOWN_CLIENT,
    GetCall,
    RowsReply,
    WriteCall,
    WriteGroup,
    WriteReply,
    fates_from_wire,
)

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

GROUPS_IN_FLIGHT_MAX = 2
"""Of one shard: while one is being made durable, the next is on its way or waits at the primary."""

GROUP_CALLS_MAX = 256
GROUP_BYTES_MAX = WAL_RECORD_BYTES_MAX
"""What one record of the log may hold; a larger group would be two records anyway."""

SHARDS_KNOWN_MAX = 65_536
"""Shards whose slot is kept, some 10 MB; beyond, all are forgotten, at the cost of asking again."""

CALL_BYTES = 128
"""What a call without rows counts."""

Call = WriteCall | GetCall

_Place = tuple[CollectionId, ShardNumber]


@dataclass(slots=True, eq=False)
class _Asked:
    """A call that is not answered yet.

    failure: why it was not, the last time. lost: the last attempt that may have been applied.
    is_unknown: it was refused, because the shard may have forgotten the client. is_told: since when
    it can have been carried out was asked for after that.
    """

    call: Call
    schema: CollectionSchema
    deadline_s: float
    answer: "asyncio.Future[Any]"
    failure: ShoalError | None = None
    lost: ShoalError | None = None
    is_unknown: bool = False
    is_told: bool = False
    on_its_way: bool = False

    def fail(self, error: ShoalError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def give_up(self) -> ShoalError:
        """Returns how the call ends that nobody answered for good."""
        return _gave_up(
            self.call,
            self.schema,
            self.lost,
            self.failure or Unavailable("the deadline passed"),
        )


@dataclass(slots=True, eq=False)
class _Line:
    """Writes to one shard. in_flight: groups, one that is about to be taken included."""

    waiting: deque[_Asked] = field(default_factory=deque)
    in_flight: int = 0
    is_starting: bool = False


class PrimaryCalls:
    """Reaches primaries for one coordinator. Used from one event loop."""

    def __init__(self, *, caller: ShardCaller, topology: TopologySource, clock: Clock) -> None:
        self._caller = caller
        self._topology = topology
        self._clock = clock
        self._lines: dict[_Place, _Line] = {}
        self._slots: dict[_Place, Slot] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def write(
        self, call: WriteCall, schema: CollectionSchema, *, deadline_s: float
    ) -> WriteReply:
        """Returns the answer of the first application of `call`.

        Raises: Indeterminate when the write may have been applied; Unavailable, Overloaded or
        NotFound (the collection was dropped) when it was not; what the primary says about it.
        """
        asked = _Asked(call, schema, deadline_s, asyncio.get_running_loop().create_future())
        self._join_line(asked)
        try:
            # It may have to wait longer than it can, behind a group that is not answered.
            async with asyncio.timeout(max(0.0, deadline_s - self._clock.monotonic_s())):
                reply: WriteReply = await asked.answer
        except TimeoutError as error:
            if asked.on_its_way:
                asked.lost = Indeterminate("no answer before the deadline")
            raise asked.give_up() from error
        return reply

    async def get(self, call: GetCall, schema: CollectionSchema, *, deadline_s: float) -> RowsReply:
        """Returns rows as the primary has them; without tails and vectors they are all there.

        Raises: Unavailable, Overloaded, NotFound; nothing was applied, this is a read.
        """
        asked = _Asked(call, schema, deadline_s, asyncio.get_running_loop().create_future())
        await self._deliver([asked])
        reply: RowsReply = await asked.answer
        return reply

    def _join_line(self, asked: _Asked) -> None:
        key = (asked.call.collection, asked.call.shard)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        line.waiting.append(asked)
        self._start(key, line)

    def _start(self, key: _Place, line: _Line) -> None:
        """Has a group taken in the next turn of the loop, unless enough are on their way."""
        if not line.waiting or line.is_starting or line.in_flight >= GROUPS_IN_FLIGHT_MAX:
            return
        line.is_starting = True
        line.in_flight += 1
        task = asyncio.ensure_future(self._serve(key, line))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _serve(self, key: _Place, line: _Line) -> None:
        """Delivers groups of a line, one after the other, while any wait."""
        line.is_starting = False
        try:
            while group := _next_group(line.waiting):
                self._start(key, line)
                try:
                    await self._deliver(group)
                except Exception as error:  # noqa: BLE001  it belongs to whoever awaits the writes
                    for asked in group:
                        if not asked.answer.done():
                            asked.answer.set_exception(error)
        finally:
            line.in_flight -= 1
            if not line.in_flight and not line.waiting:
                del self._lines[key]

    async def _deliver(self, group: Sequence[_Asked]) -> None:
        """Returns once each call of the group has its answer or its failure. All of one shard."""
        since = self._slots.get(_place_of(group[0].call), NO_SLOT)
        topology = self._topology.current()
        wait_s = ROUND_WAIT_MIN_S
        while group := self._in_time(group):
            call, schema = group[0].call, group[0].schema
            retry_after_s = 0.0
            try:
                place = _same(topology.collections.get(schema.name), schema)
            except NotFound as dropped:
                for asked in group:
                    asked.fail(dropped)
                return
            primary = place.shards[call.shard].primary
            if primary is None:
                for asked in group:
                    asked.failure = Unavailable("a takeover is under way")
            else:
                answers = await self._attempt(group, since, primary, topology)
                for asked, answer in zip(group, answers, strict=True):
                    retry_after_s = max(retry_after_s, self._take(asked, answer))
            group = [asked for asked in group if not asked.answer.done()]
            if not group:
                return
            if any(asked.is_unknown for asked in group) and await self._learn_slot(group):
                continue
            if retry_after_s:
                await self._clock.sleep(retry_after_s)
                topology = self._topology.current()
                continue
            left_s = max(asked.deadline_s for asked in group) - self._clock.monotonic_s()
            topology = await self._topology.newer_than(
                topology.version, min(wait_s, max(0.0, left_s))
            )
            wait_s = min(2 * wait_s, ROUND_WAIT_MAX_S)

    def _in_time(self, group: Sequence[_Asked]) -> list[_Asked]:
        """Returns the calls that somebody waits for; those whose deadline has passed fail."""
        now_s = self._clock.monotonic_s()
        for asked in group:
            if asked.deadline_s <= now_s:
                asked.fail(asked.give_up())
        return [asked for asked in group if not asked.answer.done()]

    async def _learn_slot(self, group: Sequence[_Asked]) -> bool:
        """Asks how far the shard is for calls that were refused though nobody sent them before.

        So they are sent for the first time after this. Returns whether it was told.
        """
        first = group[0]
        probe = GetCall(collection=first.call.collection, shard=first.call.shard, ids=())
        deadline_s = max(asked.deadline_s for asked in group)
        try:
            reply = await self.get(probe, first.schema, deadline_s=deadline_s)
        except ShoalError as error:
            for asked in group:
                asked.failure = error
            return False
        for asked in group:
            if asked.is_unknown:
                assert isinstance(asked.call, WriteCall)
                asked.call = replace(asked.call, since=reply.as_of.slot)
                asked.is_unknown, asked.is_told = False, True
        return True

    def _note_slot(self, place: _Place, slot: Slot) -> None:
        if slot > self._slots.get(place, NO_SLOT):
            if len(self._slots) >= SHARDS_KNOWN_MAX:
                self._slots.clear()
            self._slots[place] = slot

    async def _attempt(
        self, group: Sequence[_Asked], since: Slot, primary: ServerId, topology: Topology
    ) -> Sequence[Any]:
        """Sends the group once; returns what became of each call, a reply or a ShoalError."""
        deadline_s = max(asked.deadline_s for asked in group)
        first = group[0].call
        message: WriteGroup | GetCall
        bodies: Body = b""
        if isinstance(first, GetCall):
            message, on_lost = first, Outcome.NOT_APPLIED
        else:
            calls: Any = [asked.call for asked in group]  # writes, all of them
            message = WriteGroup(calls, since)
            bodies, on_lost = message.bodies(), Outcome.MAYBE_APPLIED
        attempt = asyncio.ensure_future(
            self._caller.call(
                primary,
                message.METHOD,
                message.to_wire(),
                bodies,
                timeout_s=min(deadline_s - self._clock.monotonic_s(), ATTEMPT_S_MAX),
                on_lost=on_lost,
            )
        )
        for asked in group:
            asked.on_its_way = True
        try:
            header, body = await self._while_it_leads(
                attempt, primary, group[0], topology=topology, on_lost=on_lost
            )
        except ShoalError as error:
            return [error] * len(group)
        finally:
            for asked in group:
                asked.on_its_way = False
        if isinstance(message, GetCall):
            return [RowsReply.from_wire(header, body)]
        return fates_from_wire(header)

    def _take(self, asked: _Asked, answer: Any) -> float:
        """Takes what became of a call; returns how long the shard asks to be left alone."""
        if not isinstance(answer, ShoalError):
            slot = answer.slot if isinstance(answer, WriteReply) else answer.as_of.slot
            self._note_slot(_place_of(asked.call), slot)
            if not asked.answer.done():
                asked.answer.set_result(answer)
        elif isinstance(answer, Overloaded):
            asked.failure = answer
            retry_after_s = (answer.retry_after_ms or RETRY_AFTER_MS_DEFAULT) / 1000
            if retry_after_s < asked.deadline_s - self._clock.monotonic_s():
                return retry_after_s
            asked.fail(asked.give_up())
        elif isinstance(answer, Indeterminate) and answer.field is None:
            asked.lost = asked.failure = answer
        elif _is_first_attempt(asked, answer):
            asked.is_unknown, asked.failure = True, Unavailable(answer.message)
            if asked.is_told:
                asked.fail(
                    Unavailable(
                        f"shard {asked.call.shard} forgets clients faster than they can write to "
                        "it; nothing was applied"
                    )
                )
        elif isinstance(answer, Unavailable | NotFound):
            # NotPrimary; or the server is gone, or has not loaded the shard yet.
            asked.failure = answer
        else:
            asked.fail(answer)
        return 0.0

    async def _while_it_leads(
        self,
        attempt: asyncio.Task[tuple[Any, memoryview]],
        primary: ServerId,
        asked: _Asked,
        *,
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
                if not attempt.done() and _primary_of(topology, asked) != primary:
                    reason = (
                        f"server {primary} stopped leading shard {asked.call.shard} before it "
                        "answered"
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


def _next_group(waiting: deque[_Asked]) -> list[_Asked]:
    """Takes those that somebody still waits for, in their order, up to the bounds."""
    group: list[_Asked] = []
    size_bytes = 0
    while waiting and len(group) < GROUP_CALLS_MAX:
        call = waiting[0].call
        assert isinstance(call, WriteCall), "only writes stand in line"
        size_bytes += call.size_bytes + CALL_BYTES
        if group and size_bytes > GROUP_BYTES_MAX:
            break
        asked = waiting.popleft()
        if not asked.answer.done():
            group.append(asked)
    return group


def _place_of(call: Call) -> _Place:
    return call.collection, call.shard


def _is_first_attempt(asked: _Asked, refusal: ShoalError) -> bool:
    """Says whether a call was refused as one of an unknown client that nobody sent before."""
    return (
        isinstance(refusal, Indeterminate)
        and refusal.field == UNKNOWN_CLIENT
        and asked.lost is None
        and isinstance(asked.call, WriteCall)
        and (asked.call.since is None or asked.is_told)
    )


def _primary_of(topology: Topology, asked: _Asked) -> ServerId | None:
    place = topology.collections.get(asked.schema.name)
    if place is None or place.schema.id != asked.schema.id:
        return None
    return place.shards[asked.call.shard].primary


def _same(place: CollectionPlace | None, schema: CollectionSchema) -> CollectionPlace:
    if place is None or place.schema.id != schema.id:
        raise NotFound(f"collection {schema.name!r} was dropped", field="collection")
    return place


def _gave_up(
    call: Call,
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
