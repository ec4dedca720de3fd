"""Decides when and where the searches of a process run: on the loop, in a thread, or as one batch.

Natural batching, without timers: a search that finds a worker idle starts in the same turn of the
loop; those that find all workers busy wait, and the ones of the same plan then run together through
the batched kernels. So an idle server adds no latency, and a busy one gains from being busy.

A lone search that is known to be short runs on the loop itself: handing it to a thread and back
takes two wake-ups, which cost more than they free. A search of many queries is cut up, so that idle
workers share it; all pieces see one snapshot.

docs/design/hot-path.md has the measurements. Everything here runs on one event loop.
"""

import asyncio
import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import numpy as np

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.shard import search
from shoal_cluster.shard.calls import AsOf
from shoal_cluster.shard.compute import Compute
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.search import Prepared, SearchOrder, ShardHits

BATCH_QUERIES_MAX: Final = 16
"""Queries of different calls that run as one: more would gain nothing, and the first would wait."""

PIECE_QUERIES_MIN: Final = 2
"""A search of many queries is cut into pieces of at least so many: the batched kernel answers two
queries in 1.45 times the time of one, and 64 in no less time each."""

PIECE_QUERIES_MAX: Final = 32
"""And of at most so many, so that others get their turn between."""

INLINE_ROWS_MAX: Final = 4096
"""Rows x queries below which a search always runs on the loop: handing it to a thread costs
50-100 us, about what scanning so many rows does."""

INLINE_S_MAX: Final = 0.001
"""A lone search of at most this runs on the loop. Others that arrive meanwhile wait that long, and
then they are not alone and go to the threads."""

PACE_WEIGHT: Final = 0.2
"""Of the newest duration in the running mean: five searches forget a cold cache."""

SHARDS_PACED_MAX: Final = 4096
"""Replicas whose pace is remembered; beyond, the oldest is forgotten and measured again."""


class Found(NamedTuple):
    """A search's hits and what they were found in. begun_s: monotonic, when it began to run."""

    hits: ShardHits
    prepared: Prepared
    as_of: AsOf
    begun_s: float


@dataclass(slots=True, eq=False)
class _Waiting:
    """bound: a piece of a larger search has its snapshot already; None: takes one when it runs."""

    replica: Replica
    order: SearchOrder
    future: "asyncio.Future[Found]"
    bound: tuple[Prepared, AsOf] | None = None
    queries: int = field(init=False)

    def __post_init__(self) -> None:
        self.queries = len(self.order.queries)

    def runs_with(self, other: "_Waiting") -> bool:
        """Says whether both have the same plan, so that one batch can answer both."""
        mine, theirs = self.order, other.order
        return (
            self.replica is other.replica
            and self.bound is None
            and other.bound is None
            and mine.k == theirs.k
            and mine.exact == theirs.exact
            and mine.recall_target == theirs.recall_target
            and mine.max_cost_ns == theirs.max_cost_ns
            and not mine.explain
            and not theirs.explain
            and mine.filter == theirs.filter
        )


class SearchQueue:
    """workers: how many searches run at once, as many as `compute` has threads."""

    def __init__(self, compute: Compute, clock: Clock, workers: int) -> None:
        self._compute = compute
        self._clock = clock
        self._workers = workers
        self._waiting: deque[_Waiting] = deque()
        self._running = 0
        self._scheduled = False
        self._pace: dict[tuple[str, ShardNumber, bool, bool], float] = {}

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def search(self, replica: Replica, order: SearchOrder) -> "asyncio.Future[Found]":
        """Returns the future of what `order` finds in the replica's state when it begins to run.

        The position is at least that of now. Bounded by the calls that links let in.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Found] = loop.create_future()
        pieces = _pieces(order, self._workers - self._running - len(self._waiting))
        if len(pieces) == 1:
            self._waiting.append(_Waiting(replica, order, future))
        else:
            as_of, prepared = replica.as_of(), search.prepare(replica.state, order)
            parts: list[asyncio.Future[Found]] = []
            for piece in pieces:
                parts.append(loop.create_future())
                bound = (replace(prepared, order=piece), as_of)
                self._waiting.append(_Waiting(replica, piece, parts[-1], bound))
            join = functools.partial(_join, prepared, as_of, parts, future)
            for part in parts:
                part.add_done_callback(join)
        if not self._scheduled and self._running < self._workers:
            # At the end of this turn: what the same read brought in starts together.
            self._scheduled = True
            loop.call_soon(self._start)
        return future

    def _start(self) -> None:
        self._scheduled = False
        while self._waiting and self._running < self._workers:
            batch = self._next_batch()
            if batch:
                self._run(batch)

    def _next_batch(self) -> list[_Waiting]:
        """Takes the first that waits and those that can run with it: a fair share of all."""
        waiting = self._waiting
        first = waiting.popleft()
        if first.future.done():
            return []
        batch, queries = [first], first.queries
        idle = self._workers - self._running
        queries_max = min(BATCH_QUERIES_MAX, -(-(len(waiting) + 1) // idle))
        if queries < queries_max:
            left: list[_Waiting] = []
            while waiting and queries < queries_max:
                other = waiting.popleft()
                if other.future.done():
                    continue
                if queries + other.queries <= queries_max and first.runs_with(other):
                    batch.append(other)
                    queries += other.queries
                else:
                    left.append(other)
            waiting.extendleft(reversed(left))
        return batch

    def _run(self, batch: Sequence[_Waiting]) -> None:
        first = batch[0]
        replica = first.replica
        begun_s = self._clock.monotonic_s()
        try:
            if first.bound is not None:
                prepared, as_of = first.bound
            else:
                order = first.order
                if len(batch) > 1:
                    queries = np.concatenate([waiting.order.queries for waiting in batch])
                    order = replace(order, queries=queries)
                # Both at one moment: what the reply claims to reflect is what is searched.
                as_of, prepared = replica.as_of(), search.prepare(replica.state, order)
            metric = replica.schema.metric
            if self._belongs_on_loop(prepared, replica, alone=len(batch) == 1):
                hits = search.execute(prepared, metric)
                self._settle(batch, hits, prepared, as_of, begun_s, self._clock.monotonic_s())
                return
        except Exception as error:  # noqa: BLE001  it belongs to whoever awaits the search
            _fail(batch, error)
            return
        self._running += 1
        clock = self._clock

        def work() -> tuple[ShardHits, float, float]:
            before_s = clock.monotonic_s()
            return search.execute(prepared, metric), before_s, clock.monotonic_s()

        def done(future: "asyncio.Future[tuple[ShardHits, float, float]]") -> None:
            self._running -= 1
            error = asyncio.CancelledError() if future.cancelled() else future.exception()
            if error is not None:
                _fail(batch, error)
            else:
                hits, before_s, after_s = future.result()
                self._settle(batch, hits, prepared, as_of, before_s, after_s)
            if self._waiting and not self._scheduled:
                self._start()

        self._compute.run(work).add_done_callback(done)

    def _belongs_on_loop(self, prepared: Prepared, replica: Replica, *, alone: bool) -> bool:
        if prepared.rows_considered <= INLINE_ROWS_MAX:
            return True
        if not alone or self._running or self._waiting:
            return False
        pace_s = self._pace.get(_kind(replica, prepared.order))
        return pace_s is not None and pace_s * len(prepared.order.queries) <= INLINE_S_MAX

    def _settle(
        self,
        batch: Sequence[_Waiting],
        hits: ShardHits,
        prepared: Prepared,
        as_of: AsOf,
        before_s: float,
        after_s: float,
    ) -> None:
        self._note_pace(batch[0].replica, prepared.order, after_s - before_s)
        if len(batch) == 1:
            _give(batch[0].future, Found(hits, prepared, as_of, before_s))
            return
        query = hit = 0
        for waiting in batch:
            counts = hits.counts[query : query + waiting.queries]
            part = hits.part(counts, hit)
            query += waiting.queries
            hit += len(part.ids)
            _give(waiting.future, Found(part, prepared, as_of, before_s))

    def _note_pace(self, replica: Replica, order: SearchOrder, taken_s: float) -> None:
        kind = _kind(replica, order)
        per_query_s = taken_s / len(order.queries)
        known_s = self._pace.get(kind)
        if known_s is None and len(self._pace) >= SHARDS_PACED_MAX:
            del self._pace[next(iter(self._pace))]
        self._pace[kind] = (
            per_query_s if known_s is None else known_s + PACE_WEIGHT * (per_query_s - known_s)
        )


def _kind(replica: Replica, order: SearchOrder) -> tuple[str, ShardNumber, bool, bool]:
    """Returns what searches that take about as long have in common."""
    return (replica.schema.id, replica.keys.shard, order.exact, order.filter is None)


def _pieces(order: SearchOrder, idle: int) -> list[SearchOrder]:
    """Cuts a search of many queries into one piece an idle worker; explained ones stay whole."""
    count = len(order.queries)
    # Of several rounds all pieces are alike, so that the last round keeps no worker waiting.
    rounds = -(-count // (PIECE_QUERIES_MAX * max(idle, 1)))
    size = max(-(-count // (rounds * max(idle, 1))), PIECE_QUERIES_MIN)
    if size >= count or order.explain:
        return [order]
    return [
        replace(order, queries=order.queries[start : start + size])
        for start in range(0, count, size)
    ]


def _join(
    prepared: Prepared,
    as_of: AsOf,
    parts: Sequence["asyncio.Future[Found]"],
    whole: "asyncio.Future[Found]",
    _done: "asyncio.Future[Found]",
) -> None:
    """Completes a search that was cut up, once its last piece is done."""
    if whole.done():
        for part in parts:
            part.cancel()
        return
    if not all(part.done() for part in parts):
        return
    for part in parts:
        error = asyncio.CancelledError() if part.cancelled() else part.exception()
        if error is not None:
            _fail_one(whole, error)
            return
    found = [part.result() for part in parts]
    hits = ShardHits(
        counts=[count for part in found for count in part.hits.counts],
        ids=[point_id for part in found for point_id in part.hits.ids],
        keys=np.concatenate([part.hits.keys for part in found]),
        seqs=[seq for part in found for seq in part.hits.seqs],
        places=[place for part in found for place in part.hits.places],
    )
    whole.set_result(Found(hits, prepared, as_of, min(part.begun_s for part in found)))


def _give(future: "asyncio.Future[Found]", found: Found) -> None:
    if not future.done():
        future.set_result(found)


def _fail(batch: Sequence[_Waiting], error: BaseException) -> None:
    for waiting in batch:
        _fail_one(waiting.future, error)


def _fail_one(future: "asyncio.Future[Found]", error: BaseException) -> None:
    if future.done():
        return
    if isinstance(error, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)
