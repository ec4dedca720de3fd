"""Runs a search: plan, scatter to shards, gather, merge. Third step of the search path."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import numpy as np

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import InvalidRequest, NotFound
from shoal_cluster.domain.ids import ServerId, ShardNumber
from shoal_cluster.domain.limits import GATHERED_BYTES_MAX
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.shard_caller import ShardCaller, TopologySource
from shoal_cluster.query.batching import SearchBatches, Waiting
from shoal_cluster.query.merge import Hits, merge_top_k, no_hits
from shoal_cluster.query.plan import SearchPlan, SearchRequest, check_queries
from shoal_cluster.query.prepared import Parsed, PreparedSearch, SearchTemplate
from shoal_cluster.query.pruning import PrunedShard
from shoal_cluster.query.replica_reads import ReplicaReads, ShardAnswer
from shoal_cluster.query.rows import RowReader
from shoal_cluster.query.scatter import Scatter

MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchedShard:
    """How one shard answered. explain: its own map, see shard/search.py."""

    shard: ShardNumber
    server: ServerId
    primary: bool
    reason: str
    position: Position
    explain: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchExplain:
    """stages_us: time in the coordinator, in the order of the path. recall_target: 0 means the best
    that a budget pays for."""

    recall_target: float
    searched: tuple[SearchedShard, ...]
    pruned: tuple[PrunedShard, ...]
    stages_us: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """as_of: the position each searched shard answered at. staleness_ms: the largest."""

    schema: CollectionSchema
    hits: Hits
    as_of: Mapping[ShardNumber, Position]
    staleness_ms: float
    explain: SearchExplain | None = None


T = TypeVar("T")


class Searcher:
    """Answers searches of one coordinator. Used from one event loop."""

    def __init__(self, *, caller: ShardCaller, topology: TopologySource, clock: Clock) -> None:
        self._topology = topology
        self._clock = clock
        self._reads = ReplicaReads(caller=caller, topology=topology, clock=clock)
        self._batches = SearchBatches(self._reads)
        self._rows = RowReader(reads=self._reads, topology=topology, clock=clock)

    @property
    def rows(self) -> RowReader:
        """Reads by id, scrolls and counts over the same replicas, with the same routing memory."""
        return self._rows

    @property
    def scatter(self) -> Scatter:
        """What explore.py needs to read over the same replicas."""
        return Scatter(
            reads=self._reads, rows=self._rows, topology=self._topology, clock=self._clock
        )

    async def search(self, request: SearchRequest, *, timeout_s: float) -> SearchResult:
        """Returns the k nearest points of each query.

        Raises: as `begin`.
        """
        template = SearchTemplate(replace(request, queries=None))
        return await self.begin(
            template, request.queries, timeout_s=timeout_s, finish=lambda result: result
        )

    def begin(
        self,
        template: SearchTemplate,
        queries: Vectors | None,
        *,
        timeout_s: float,
        finish: Callable[[SearchResult], T],
    ) -> Awaitable[T]:
        """Starts a search and returns the future of what `finish` makes of its result.

        queries: (n, dimension) float32 as the caller gave them; None with ids. The future costs no
        task; cancelling it gives the search up.

        Raises, at once or from the future: InvalidRequest, NotFound (collection, or an id to
        search by), Overloaded, Unavailable. A failed shard fails the search: hits are never left
        out silently.
        """
        started_s = self._clock.monotonic_s()
        prepared = template.prepared(self._topology.current())
        if template.request.ids:
            check_queries(queries, template.request, prepared.plan.schema)
            return self._search_by_ids(prepared, started_s, timeout_s, finish)
        body = prepared.body_of(queries)
        return self._scatter(prepared, body, started_s, started_s + timeout_s, finish)

    async def _search_by_ids(
        self,
        prepared: PreparedSearch,
        started_s: float,
        timeout_s: float,
        finish: Callable[[SearchResult], T],
    ) -> T:
        stored = await self._stored_vectors(prepared.request, prepared.plan.schema, timeout_s)
        body = stored.data.cast("B")
        return await self._scatter(prepared, body, started_s, started_s + timeout_s, finish)

    def _scatter(
        self,
        prepared: PreparedSearch,
        body: memoryview,
        started_s: float,
        deadline_s: float,
        finish: Callable[[SearchResult], T],
    ) -> "asyncio.Future[T]":
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        search = _Search(prepared, body, future, finish, self._clock, started_s, deadline_s)
        future.add_done_callback(self._ended)
        batches, queries = self._batches, search.queries
        for number, read in enumerate(prepared.reads):
            batches.ask(Waiting(search, number, read, body, queries))
        if not prepared.reads:
            search.gathered()
        return future

    def _ended(self, future: "asyncio.Future[Any]") -> None:
        if future.cancelled() or future.exception() is not None:
            self._batches.abandon()

    async def _stored_vectors(
        self, request: SearchRequest, schema: CollectionSchema, timeout_s: float
    ) -> Vectors:
        """Returns the vectors of the ids to search by, as stored, in their order."""
        found = await self._rows.get(
            request.collection,
            list(dict.fromkeys(request.ids)),
            with_vector=True,
            with_payload=False,
            freshness=request.freshness,
            timeout_s=timeout_s,
        )
        position = {point_id: i for i, point_id in enumerate(found.ids)}
        for i, point_id in enumerate(request.ids):
            if point_id not in position:
                raise NotFound(
                    f"point {point_id.decode()!r} does not exist in {schema.name!r}",
                    field=f"ids[{i}]",
                )
        assert found.vectors is not None, "asked for"
        return np.ascontiguousarray(found.vectors[[position[i] for i in request.ids]])


class _Search(Generic[T]):
    """A search under way: an `Asker` (batching.py). planned_s: when its shards were asked."""

    __slots__ = (
        "_answers",
        "_clock",
        "_finish",
        "_future",
        "_missing",
        "_prepared",
        "_started_s",
        "deadline_s",
        "planned_s",
        "queries",
        "topology",
    )

    def __init__(
        self,
        prepared: PreparedSearch,
        body: memoryview,
        future: "asyncio.Future[T]",
        finish: Callable[[SearchResult], T],
        clock: Clock,
        started_s: float,
        deadline_s: float,
    ) -> None:
        self.topology = prepared.topology
        self.deadline_s = deadline_s
        self.queries = len(body) // (4 * prepared.plan.schema.dimension)
        self.planned_s = clock.monotonic_s()
        self._prepared = prepared
        self._future = future
        self._finish = finish
        self._clock = clock
        self._started_s = started_s
        self._missing = len(prepared.reads)
        self._answers: list[ShardAnswer[Parsed] | None] = [None] * self._missing

    @property
    def done(self) -> bool:
        return self._future.done()

    def answered(self, number: int, answer: ShardAnswer[Parsed]) -> None:
        if self._future.done():
            return
        self._answers[number] = answer
        self._missing -= 1
        if not self._missing:
            self.gathered()

    def failed(self, error: BaseException) -> None:
        if self._future.done():
            return
        if isinstance(error, asyncio.CancelledError):
            self._future.cancel()
        else:
            self._future.set_exception(error)

    def gathered(self) -> None:
        """Every shard has answered."""
        try:
            self._future.set_result(self._finish(self._result()))
        except Exception as error:  # noqa: BLE001  it belongs to whoever awaits the search
            self._future.set_exception(error)

    def _result(self) -> SearchResult:
        plan, request = self._prepared.plan, self._prepared.request
        answers = cast(Sequence[ShardAnswer[Parsed]], self._answers)
        gathered_s = self._clock.monotonic_s() if request.explain else 0.0
        if answers:
            hits = merge_top_k(
                [answer.reply[1] for answer in answers], request.k, excluded=request.ids or None
            )
        else:
            hits = no_hits(self.queries)
        _require_answer_size(hits)
        explain = None
        if request.explain:
            stages_us = {
                "plan": round((self.planned_s - self._started_s) * MICROSECONDS),
                "scatter": round((gathered_s - self.planned_s) * MICROSECONDS),
                "merge": round((self._clock.monotonic_s() - gathered_s) * MICROSECONDS),
            }
            explain = _explained(plan, request, answers, stages_us)
        as_of: dict[ShardNumber, Position] = {}
        staleness_ms = 0.0
        for shard, answer in zip(plan.shards, answers, strict=True):
            reflected = answer.reply[0].as_of
            as_of[shard] = reflected.position
            staleness_ms = max(staleness_ms, reflected.staleness_ms)
        return SearchResult(
            schema=plan.schema,
            hits=hits,
            as_of=as_of,
            staleness_ms=staleness_ms,
            explain=explain,
        )


def _require_answer_size(hits: Hits) -> None:
    """Raises: InvalidRequest when hits of many shards together hold too much."""
    if hits.tails is None:
        return
    size_bytes = sum(map(len, hits.tails))
    if size_bytes > GATHERED_BYTES_MAX:
        raise InvalidRequest(
            f"the payloads and attributes of {len(hits.ids)} hits have {size_bytes} bytes; ask for "
            "fewer hits, or without payload and get the points by id",
            field="with_payload",
            limit=f"{GATHERED_BYTES_MAX} bytes",
        )


def _explained(
    plan: SearchPlan,
    request: SearchRequest,
    answers: Sequence[ShardAnswer[Parsed]],
    stages_us: Mapping[str, int],
) -> SearchExplain:
    return SearchExplain(
        recall_target=_target(plan, request),
        searched=tuple(
            SearchedShard(
                shard=shard,
                server=answer.server,
                primary=answer.primary,
                reason=answer.reason,
                position=answer.reply[0].as_of.position,
                explain=answer.reply[0].explain or {},
            )
            for shard, answer in zip(plan.shards, answers, strict=True)
        ),
        pruned=plan.pruned,
        stages_us=stages_us,
    )


def _target(plan: SearchPlan, request: SearchRequest) -> float:
    """Returns the recall that was aimed at; 0: the best that a budget pays for."""
    if request.max_cost_ms is not None:
        return 0.0
    return plan.schema.recall_target if request.recall_target is None else request.recall_target
