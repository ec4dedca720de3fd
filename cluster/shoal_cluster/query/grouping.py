"""Finds the nearest groups of points that share an attribute's value, each with its best points.

Two rounds. First each shard names its nearest groups; the nearest of all are among them, since a
group has fewer than `groups` better ones in the shard of its own best hit. Then the shards that can
hold them give each chosen group's best hits, of which the first round may have seen but a few.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.limits import GROUPS_MAX, SEARCH_K_MAX
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.domain.session import Position
from shoal_cluster.filtering.expression import And, Comparison, Operator
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.filtering.validation import validate
from shoal_cluster.query.asked import require_attribute, require_range
from shoal_cluster.query.examples import Example, example_vectors
from shoal_cluster.query.execute import SearchExplain
from shoal_cluster.query.explanation import explained
from shoal_cluster.query.merge import Hits, hits_of, merge_top_k
from shoal_cluster.query.nearest import ShardHits, picked
from shoal_cluster.query.plan import (
    SearchPlan,
    SearchRequest,
    check_search,
    plan_search,
    prepare_queries,
)
from shoal_cluster.query.pruning import reachable_shards
from shoal_cluster.query.replica_reads import ShardAnswer
from shoal_cluster.query.scatter import Reading, Scatter
from shoal_cluster.shard.calls import SearchReply
from shoal_cluster.shard.exploring_calls import FindGroupsCall, FindGroupsReply, GroupHitsCall

KINDS = frozenset(
    {AttributeType.KEYWORD, AttributeType.INT, AttributeType.TIMESTAMP, AttributeType.BOOL}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupsRequest:
    """search: everything but the query; its k is the number of hits wanted of each group."""

    search: SearchRequest
    query: Example
    group_by: str
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupsResult:
    """groups: values and their hits, by the best hit. bounded: a group may be missing."""

    schema: CollectionSchema
    kind: AttributeType
    groups: Sequence[tuple[Scalar, Hits]]
    bounded: bool
    as_of: Mapping[ShardNumber, Position]
    staleness_ms: float
    explain: SearchExplain | None = None


async def search_groups(
    scatter: Scatter, request: GroupsRequest, *, timeout_s: float
) -> GroupsResult:
    """Raises: InvalidRequest, NotFound (collection or the id), Overloaded, Unavailable."""
    reading = scatter.begin(request.search.collection, timeout_s)
    schema = reading.schema
    kind = require_attribute(schema, request.group_by, KINDS, field="group_by")
    _check_sizes(request, schema)
    query = await example_vectors(reading, [request.query], request.search.freshness)
    body = prepare_queries(query, schema).data.cast("B")
    plan = plan_search(request.search, schema)
    answers = await _find(reading, request, plan, body)
    began_s = scatter.clock.monotonic_s()
    values = nearest_groups([answer.reply for answer in answers], request.groups)
    reading.note("choose", began_s)
    groups = await _fill(reading, request, plan, body, values) if values else []
    target = request.search.recall_target
    return GroupsResult(
        schema=schema,
        kind=kind,
        groups=groups,
        bounded=any(answer.reply.bounded for answer in answers),
        as_of=reading.positions,
        staleness_ms=reading.staleness_ms,
        explain=explained(
            reading,
            plan.shards,
            answers,
            plan.pruned,
            recall_target=schema.recall_target if target is None else target,
        )
        if request.search.explain
        else None,
    )


def nearest_groups(replies: Sequence[FindGroupsReply], groups: int) -> list[Scalar]:
    """Returns the values whose best hits are nearest over all shards, nearest first."""
    best: dict[Scalar, tuple[float, bytes]] = {}
    for reply in replies:
        keys = np.frombuffer(reply.keys, np.float32).tolist()
        for value, *hit in zip(reply.values, keys, reply.ids, strict=True):
            here = (hit[0], hit[1])
            best[value] = min(best.get(value, here), here)
    return sorted(best, key=lambda value: best[value])[:groups]


async def _find(
    reading: Reading, request: GroupsRequest, plan: SearchPlan, body: memoryview
) -> Sequence[ShardAnswer[FindGroupsReply]]:
    search, schema = request.search, reading.schema
    calls = [
        FindGroupsCall(
            collection=schema.id,
            shard=shard,
            group_by=request.group_by,
            groups=request.groups,
            excluded=request.query.id,
            filter=plan.filter_wire,
            exact=search.exact,
            recall_target=search.recall_target,
            explain=search.explain,
            level=search.freshness.level(shard, schema),
        )
        for shard in plan.shards
    ]
    return await reading.ask(calls, _parse_groups, body=body, stage="find")


async def _fill(
    reading: Reading,
    request: GroupsRequest,
    plan: SearchPlan,
    body: memoryview,
    values: Sequence[Scalar],
) -> list[tuple[Scalar, Hits]]:
    """Returns the groups with their hits; one whose points are gone meanwhile is left out."""
    search, schema = request.search, reading.schema
    freshness = reading.continued(search.freshness)
    asked = _values_by_shard(request, schema, values)
    calls = [
        GroupHitsCall(
            collection=schema.id,
            shard=shard,
            group_by=request.group_by,
            values=[values[i] for i in of_shard],
            size=search.k,
            excluded=request.query.id,
            filter=plan.filter_wire,
            exact=search.exact,
            recall_target=search.recall_target,
            with_tails=search.with_payload
            or (search.with_vector and schema.metric is Metric.COSINE),
            with_vector=search.with_vector,
            level=freshness.level(shard, schema),
        )
        for shard, of_shard in asked.items()
    ]
    parse = functools.partial(
        _parse_hits, dimension=schema.dimension, with_vector=search.with_vector
    )
    answers = await reading.ask(calls, parse, body=body, stage="fill")
    began_s = reading.scatter.clock.monotonic_s()
    parts = [
        replace(answer.reply.hits, counts=_spread(answer.reply.hits.counts, of_shard, len(values)))
        for answer, of_shard in zip(answers, asked.values(), strict=True)
    ]
    merged = merge_top_k(parts, search.k)
    filled: list[tuple[Scalar, Hits]] = []
    start = 0
    for value, count in zip(values, merged.counts, strict=True):
        if count:
            filled.append((value, picked(merged, range(start, start + count))))
        start += count
    # A wider search of each group may have found a nearer hit than the first round did.
    filled.sort(key=lambda group: (float(group[1].keys[0]), group[1].ids[0]))
    reading.note("merge", began_s)
    return filled


def _values_by_shard(
    request: GroupsRequest, schema: CollectionSchema, values: Sequence[Scalar]
) -> dict[ShardNumber, list[int]]:
    """Returns which of the values each shard can hold; one at least."""
    filter = request.search.filter
    conditions = () if filter is None else (validate(filter, schema.attributes),)
    asked: dict[ShardNumber, list[int]] = {}
    for i, value in enumerate(values):
        of_value = Comparison(request.group_by, Operator.EQ, value)
        for shard in reachable_shards(schema, And((*conditions, of_value)))[0]:
            asked.setdefault(shard, []).append(i)
    return asked


def _spread(counts: Sequence[int], positions: Sequence[int], length: int) -> list[int]:
    """Returns the counts at their positions, 0 elsewhere: one for each value, as merging wants."""
    spread = [0] * length
    for position, count in zip(positions, counts, strict=True):
        spread[position] = count
    return spread


def _check_sizes(request: GroupsRequest, schema: CollectionSchema) -> None:
    size = request.search.k
    require_range(request.groups, 1, GROUPS_MAX, field="groups")
    require_range(size, 1, SEARCH_K_MAX, field="group_size")
    if request.groups * size > SEARCH_K_MAX:
        raise InvalidRequest(
            f"{request.groups} groups of {size} are {request.groups * size} hits",
            field="group_size",
            limit=f"{SEARCH_K_MAX} hits in all",
        )
    placeholder = np.zeros((1, schema.dimension), np.float32)
    check_search(replace(request.search, k=request.groups * size, queries=placeholder), schema)


def _parse_groups(header: Any, body: memoryview) -> FindGroupsReply:
    return FindGroupsReply.from_wire(header)


def _parse_hits(header: Any, body: memoryview, *, dimension: int, with_vector: bool) -> ShardHits:
    reply = SearchReply.from_wire(header, body)
    return ShardHits(reply, hits_of(reply, body, dimension=dimension, with_vector=with_vector))
