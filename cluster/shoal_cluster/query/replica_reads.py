"""Reads one shard from whichever replica answers: retries, hedges, waits for a newer topology.

A dead server fails no read while another replica lives: the next replica is asked at once, and
only when all have failed once does the read wait. Reads have no effect, so any failure that says
"not here" may be retried elsewhere until the deadline.
"""

import functools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import (
    Corrupt,
    NotFound,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import CollectionId, ServerId, ShardNumber
from shoal_cluster.domain.session import Consistency
from shoal_cluster.domain.shard_caller import ShardCaller, TopologySource
from shoal_cluster.domain.topology import ShardPlace, Topology
from shoal_cluster.query.hedging import HedgeBudget, LatencyWindow, first_answer
from shoal_cluster.query.routing import order_replicas

FAILED_RECENTLY_S = 2.0
"""How long a server that failed is tried last: about as long as the controller takes to notice."""

ROUND_WAIT_MIN_S, ROUND_WAIT_MAX_S = 0.05, 1.0
"""Between rounds over all replicas, unless a newer topology comes first. Doubles each round.

Bounded, because a replica may come back without any change of the topology.
"""

LATENCY_KINDS_MAX = 64
"""Kinds of reads timed apart; more would mean that a caller puts request values into a kind."""

ELSEWHERE = (Unavailable, NotFound, Overloaded, Corrupt)
"""Failures of one replica that another may not have. NotFound: it does not hold the shard (any
more). Corrupt: its local copy is damaged. Everything else is about the request, or a bug, and would
be the same everywhere.
"""

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRead(Generic[Reply]):
    """One read of one shard. parse: makes a reply of header and body.

    kind: reads of one kind take about the same time; for hedging.
    """

    collection: str
    collection_id: CollectionId
    shard: ShardNumber
    method: str
    header: object
    body: bytes | memoryview = b""
    parse: Callable[[Any, memoryview], Reply]
    consistency: Consistency = Consistency.SESSION
    kind: str


@dataclass(frozen=True, slots=True)
class ShardAnswer(Generic[Reply]):
    """primary: the replica that answered was the primary. reason: why this one answered."""

    reply: Reply
    server: ServerId
    primary: bool
    reason: str


class ReplicaReads:
    """Keeps what routing and hedging need: load, recent failures, latencies. One loop only."""

    def __init__(self, *, caller: ShardCaller, topology: TopologySource, clock: Clock) -> None:
        self._caller = caller
        self._topology = topology
        self._clock = clock
        self._in_flight: dict[ServerId, int] = {}
        self._failed_until_s: dict[ServerId, float] = {}
        self._latencies: dict[str, LatencyWindow] = {}
        self._budget = HedgeBudget()

    async def read(
        self, read: ShardRead[Reply], topology: Topology, *, deadline_s: float
    ) -> ShardAnswer[Reply]:
        """Returns the first answer of any replica.

        topology: what the read was planned with. deadline_s: by the injected clock.

        Raises: NotFound when the collection is gone; Overloaded when every replica is; Unavailable
        when none answered by the deadline; what a replica says about the request itself.
        """
        wait_s = ROUND_WAIT_MIN_S
        while True:
            place = _place_of(topology, read)
            try:
                return await self._ask_each(read, place, deadline_s)
            except Overloaded:
                raise
            except ELSEWHERE as error:
                remaining_s = deadline_s - self._clock.monotonic_s()
                if remaining_s <= 0:
                    raise _none_answered(read, error) from error
            topology = await self._topology.newer_than(topology.version, min(wait_s, remaining_s))
            wait_s = min(2 * wait_s, ROUND_WAIT_MAX_S)

    async def _ask_each(
        self, read: ShardRead[Reply], place: ShardPlace, deadline_s: float
    ) -> ShardAnswer[Reply]:
        """Asks each replica once. Raises the last failure; Overloaded only if all were."""
        untried = list(
            order_replicas(
                place,
                in_flight=self._in_flight,
                failed_recently=self._failed_recently(),
                consistency=read.consistency,
            )
        )
        failure: ShoalError | None = None
        reason = "fewest requests in flight"
        while untried:
            server = untried.pop(0)
            first = self._ask(read, server, deadline_s, alternatives=len(untried))
            try:
                if untried:
                    reply, hedged = await first_answer(
                        first,
                        functools.partial(self._hedge, read, untried, deadline_s),
                        self._latency(read.kind).hedge_delay_s(),
                        elsewhere=ELSEWHERE,
                    )
                    if hedged:
                        self._note_failure(server)
                        return _answer(reply, place, "answered before a slower replica")
                else:
                    reply = await first
                return _answer(reply, place, reason)
            except ELSEWHERE as error:
                if failure is None or not isinstance(error, Overloaded):
                    failure = error
                reason = f"{server} failed: {error.kind}"
        raise failure or Unavailable("no replica is loaded yet")

    def _hedge(
        self, read: ShardRead[Reply], untried: list[ServerId], deadline_s: float
    ) -> Coroutine[Any, Any, tuple[Reply, ServerId]] | None:
        if not untried or not self._budget.spend():
            return None
        return self._ask(read, untried.pop(0), deadline_s, alternatives=len(untried))

    async def _ask(
        self, read: ShardRead[Reply], server: ServerId, deadline_s: float, *, alternatives: int
    ) -> tuple[Reply, ServerId]:
        started_s = self._clock.monotonic_s()
        remaining_s = deadline_s - started_s
        if remaining_s <= 0:
            raise Unavailable("the deadline passed")
        self._budget.earn()
        self._in_flight[server] = self._in_flight.get(server, 0) + 1
        try:
            header, body = await self._caller.call(
                server,
                read.method,
                read.header,
                read.body,
                # A server that says nothing may not eat the time its alternatives need.
                timeout_s=remaining_s if alternatives == 0 else remaining_s / 2,
                on_lost=Outcome.NOT_APPLIED,
            )
        except ELSEWHERE as error:
            if not isinstance(error, Overloaded):
                self._note_failure(server)
            raise
        finally:
            self._in_flight[server] -= 1
            if not self._in_flight[server]:
                del self._in_flight[server]
        if self._failed_until_s:
            self._failed_until_s.pop(server, None)
        self._latency(read.kind).add(self._clock.monotonic_s() - started_s)
        return read.parse(header, body), server

    def _latency(self, kind: str) -> LatencyWindow:
        window = self._latencies.get(kind)
        if window is None:
            assert len(self._latencies) < LATENCY_KINDS_MAX, f"too many kinds of reads: {kind}"
            window = self._latencies[kind] = LatencyWindow()
        return window

    def _note_failure(self, server: ServerId) -> None:
        self._failed_until_s[server] = self._clock.monotonic_s() + FAILED_RECENTLY_S

    def _failed_recently(self) -> frozenset[ServerId]:
        """Returns who failed lately; forgets the others, so that the map stays small."""
        if not self._failed_until_s:
            return frozenset()
        now_s = self._clock.monotonic_s()
        for server in [s for s, until_s in self._failed_until_s.items() if until_s <= now_s]:
            del self._failed_until_s[server]
        return frozenset(self._failed_until_s)


def _answer(reply: tuple[Reply, ServerId], place: ShardPlace, reason: str) -> ShardAnswer[Reply]:
    return ShardAnswer(reply[0], reply[1], reply[1] == place.primary, reason)


def _place_of(topology: Topology, read: ShardRead[Reply]) -> ShardPlace:
    place = topology.collections.get(read.collection)
    if place is None or place.schema.id != read.collection_id:
        raise NotFound(f"collection {read.collection!r} was dropped", field="collection")
    return place.shards[read.shard]


def _none_answered(read: ShardRead[Reply], error: ShoalError) -> ShoalError:
    if isinstance(error, Corrupt):
        return error
    return Unavailable(
        f"no replica of shard {read.shard} of {read.collection!r} answered in time; "
        f"the last said: {error.message}"
    )
