"""Counts rows by the value of an attribute over all shards. Exact: shards send every value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.limits import FACET_VALUES_MAX, FACETS_MAX
from shoal_cluster.domain.schema import AttributeType, CollectionSchema
from shoal_cluster.domain.session import Position
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.filtering.validation import validate
from shoal_cluster.filtering.wire import to_wire
from shoal_cluster.query.asked import require_attribute, require_range
from shoal_cluster.query.execute import SearchExplain
from shoal_cluster.query.explanation import explained
from shoal_cluster.query.plan import Freshness
from shoal_cluster.query.pruning import reachable_shards
from shoal_cluster.query.scatter import Scatter
from shoal_cluster.shard.exploring_calls import FacetsCall, FacetsReply
from shoal_cluster.shard.facets import too_many_values

KINDS = frozenset(AttributeType) - {AttributeType.FLOAT}


@dataclass(frozen=True, slots=True, kw_only=True)
class FacetsRequest:
    """limit: how many values, the most frequent first."""

    collection: str
    attribute: str
    limit: int
    filter: Expression | None = None
    freshness: Freshness = field(default_factory=Freshness)
    explain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FacetsResult:
    """counts: by count descending, then by value. rows: that match; missing: without a value.

    distinct: how many values there are in all.
    """

    schema: CollectionSchema
    kind: AttributeType
    counts: Sequence[tuple[Scalar, int]]
    rows: int
    missing: int
    distinct: int
    as_of: Mapping[ShardNumber, Position]
    staleness_ms: float
    explain: SearchExplain | None = None


async def count_facets(
    scatter: Scatter, request: FacetsRequest, *, timeout_s: float
) -> FacetsResult:
    """Raises: InvalidRequest, NotFound (the collection), Overloaded, Unavailable."""
    reading = scatter.begin(request.collection, timeout_s)
    schema = reading.schema
    kind = require_attribute(schema, request.attribute, KINDS, field="attribute")
    require_range(request.limit, 1, FACETS_MAX, field="limit")
    filter = None if request.filter is None else validate(request.filter, schema.attributes)
    wire = None if filter is None else to_wire(filter)
    shards, pruned = reachable_shards(schema, filter)
    calls = [
        FacetsCall(
            collection=schema.id,
            shard=shard,
            attribute=request.attribute,
            filter=wire,
            explain=request.explain,
            level=request.freshness.level(shard, schema),
        )
        for shard in shards
    ]
    answers = await reading.ask(calls, _parse, stage="scatter")
    began_s = scatter.clock.monotonic_s()
    counts = merge_counts([answer.reply for answer in answers], request.attribute)
    top = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[: request.limit]
    reading.note("merge", began_s)
    return FacetsResult(
        schema=schema,
        kind=kind,
        counts=top,
        rows=sum(answer.reply.rows for answer in answers),
        missing=sum(answer.reply.missing for answer in answers),
        distinct=len(counts),
        as_of=reading.positions,
        staleness_ms=reading.staleness_ms,
        explain=explained(reading, shards, answers, pruned) if request.explain else None,
    )


def merge_counts(replies: Sequence[FacetsReply], attribute: str) -> dict[Scalar, int]:
    """Returns the counts of all shards together.

    Raises: InvalidRequest when the shards together have too many values.
    """
    total: dict[Scalar, int] = {}
    for reply in replies:
        for value, count in zip(reply.values, reply.counts, strict=True):
            total[value] = total.get(value, 0) + count
        if len(total) > FACET_VALUES_MAX:
            raise too_many_values(attribute)
    return total


def _parse(header: Any, body: memoryview) -> FacetsReply:
    return FacetsReply.from_wire(header)
