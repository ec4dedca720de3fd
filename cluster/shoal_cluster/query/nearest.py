"""One top-k search as a step of another read: the search of execute.py, with points left out."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shoal_cluster.domain.schema import Metric
from shoal_cluster.query.execute import SearchExplain
from shoal_cluster.query.explanation import explained
from shoal_cluster.query.merge import Hits, hits_of, merge_top_k, no_hits
from shoal_cluster.query.plan import SearchPlan, SearchRequest, plan_search, prepare_queries
from shoal_cluster.query.replica_reads import ShardAnswer
from shoal_cluster.query.scatter import Reading
from shoal_cluster.shard.calls import AsOf, SearchReply


@dataclass(frozen=True, slots=True)
class ShardHits:
    """One shard's reply and its hits as arrays."""

    reply: SearchReply
    hits: Hits

    @property
    def as_of(self) -> AsOf:
        return self.reply.as_of

    @property
    def explain(self) -> Mapping[str, Any] | None:
        return self.reply.explain


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    hits: Hits
    plan: SearchPlan
    answers: Sequence[ShardAnswer[ShardHits]]

    def explain(self, reading: Reading, request: SearchRequest) -> SearchExplain | None:
        """Returns how the search was answered, if the request asks for it."""
        if not request.explain:
            return None
        target = request.recall_target
        return explained(
            reading,
            self.plan.shards,
            self.answers,
            self.plan.pruned,
            recall_target=reading.schema.recall_target if target is None else target,
        )


async def nearest(
    reading: Reading,
    request: SearchRequest,
    *,
    excluded: Collection[bytes] = (),
    keep_vectors: bool = True,
) -> Nearest:
    """Returns the k nearest points of the one query that are not among the excluded.

    request: passed `check_search`, with one vector. keep_vectors: False when vectors are asked for
    to compute with only, so that no lengths have to come with them.

    Raises: as a search does.
    """
    plan = plan_search(request, reading.schema)
    assert request.queries is not None, "check_search refuses a search without queries"
    body = prepare_queries(request.queries, reading.schema).data.cast("B")
    with_tails = request.with_payload or (
        request.with_vector and keep_vectors and reading.schema.metric is Metric.COSINE
    )
    plan = replace(plan, k=request.k + len(excluded), with_tails=with_tails)
    parse = functools.partial(
        _parse, dimension=reading.schema.dimension, with_vector=request.with_vector
    )
    calls = [plan.call(shard, request) for shard in plan.shards]
    answers = await reading.ask(calls, parse, body=body, stage="scatter")
    began_s = reading.scatter.clock.monotonic_s()
    hits = no_hits(1)
    if answers:
        hits = merge_top_k([answer.reply.hits for answer in answers], plan.k)
    kept = [i for i, point_id in enumerate(hits.ids) if point_id not in excluded][: request.k]
    if len(kept) < len(hits.ids):
        hits = picked(hits, kept)
    reading.note("merge", began_s)
    return Nearest(hits=hits, plan=plan, answers=answers)


def picked(hits: Hits, positions: Sequence[int]) -> Hits:
    """Returns the hits of one query at these positions, in their order."""
    return Hits(
        counts=[len(positions)],
        ids=[hits.ids[i] for i in positions],
        keys=hits.keys[np.array(positions, np.int64)],
        seqs=[hits.seqs[i] for i in positions],
        tails=None if hits.tails is None else [hits.tails[i] for i in positions],
        vectors=None if hits.vectors is None else hits.vectors[np.array(positions, np.int64)],
    )


def _parse(header: Any, body: memoryview, *, dimension: int, with_vector: bool) -> ShardHits:
    reply = SearchReply.from_wire(header, body)
    return ShardHits(reply, hits_of(reply, body, dimension=dimension, with_vector=with_vector))
