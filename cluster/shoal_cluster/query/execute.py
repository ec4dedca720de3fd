"""Runs a search: plan, scatter to shards, gather, merge. Third step of the search path."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import InvalidRequest, NotFound
from shoal_cluster.domain.ids import ServerId, ShardNumber
from shoal_cluster.domain.limits import GATHERED_BYTES_MAX
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.shard_caller import ShardCaller, TopologySource
from shoal_cluster.domain.topology import Topology
from shoal_cluster.query.batching import Parsed, SearchBatches
from shoal_cluster.query.gather import gather
from shoal_cluster.query.merge import Hits, hits_of, merge_top_k, no_hits
from shoal_cluster.query.plan import (
    SearchPlan,
    SearchRequest,
    check_search,
    collection_of,
    plan_search,
)
from shoal_cluster.query.pruning import PrunedShard
from shoal_cluster.query.replica_reads import ReplicaReads, ShardAnswer, ShardRead
from shoal_cluster.query.rows import RowReader
from shoal_cluster.query.scatter import Scatter
from shoal_cluster.shard.calls import SearchCall, SearchReply

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
    """stages_us: time in the coordinator, in the order of the path."""

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

        Raises: InvalidRequest, NotFound (collection, or an id to search by), Overloaded,
        Unavailable. A failed shard fails the search: hits are never left out silently.
        """
        started_s = self._clock.monotonic_s()
        deadline_s = started_s + timeout_s
        topology = self._topology.current()
        schema = collection_of(topology, request.collection).schema
        check_search(request, schema)
        stored = None
        if request.ids:
            stored = await self._stored_vectors(request, schema, timeout_s)
        plan = plan_search(request, schema, stored=stored)
        planned_s = self._clock.monotonic_s()
        answers = await self._scatter(plan, request, topology, deadline_s)
        gathered_s = self._clock.monotonic_s()
        hits = no_hits(len(plan.queries))
        if answers:
            hits = merge_top_k(
                [answer.reply[1] for answer in answers], request.k, excluded=plan.excluded
            )
        _require_answer_size(hits)
        explain = None
        if request.explain:
            merged_s = self._clock.monotonic_s()
            stages_us = {
                "plan": round((planned_s - started_s) * MICROSECONDS),
                "scatter": round((gathered_s - planned_s) * MICROSECONDS),
                "merge": round((merged_s - gathered_s) * MICROSECONDS),
            }
            explain = _explained(plan, request, answers, stages_us)
        return SearchResult(
            schema=schema,
            hits=hits,
            as_of={
                shard: answer.reply[0].as_of.position
                for shard, answer in zip(plan.shards, answers, strict=True)
            },
            staleness_ms=max(
                (answer.reply[0].as_of.staleness_ms for answer in answers), default=0.0
            ),
            explain=explain,
        )

    async def _scatter(
        self, plan: SearchPlan, request: SearchRequest, topology: Topology, deadline_s: float
    ) -> Sequence[ShardAnswer[Parsed]]:
        body = plan.queries.data.cast("B")
        parse = functools.partial(
            _parse, dimension=plan.schema.dimension, with_vector=request.with_vector
        )
        reads = []
        for shard in plan.shards:
            call = plan.call(shard, request)
            read = ShardRead(
                collection=plan.schema.name,
                collection_id=plan.schema.id,
                shard=shard,
                method=SearchCall.METHOD,
                header=call.to_wire(),
                body=body,
                parse=parse,
                consistency=request.freshness.consistency,
                kind="search_exact" if request.exact else "search",
            )
            reads.append(
                self._batches.read(read, call, len(plan.queries), topology, deadline_s=deadline_s)
            )
        return await gather(reads)

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


def _parse(header: Any, body: memoryview, *, dimension: int, with_vector: bool) -> Parsed:
    reply = SearchReply.from_wire(header, body)
    return reply, hits_of(reply, body, dimension=dimension, with_vector=with_vector)


def _explained(
    plan: SearchPlan,
    request: SearchRequest,
    answers: Sequence[ShardAnswer[Parsed]],
    stages_us: Mapping[str, int],
) -> SearchExplain:
    target = request.recall_target
    return SearchExplain(
        recall_target=plan.schema.recall_target if target is None else target,
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
