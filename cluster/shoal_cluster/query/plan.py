"""Turns a search request into what the shards are asked. Pure; second step of the search path.

Everything that can be refused is refused here, before a shard is touched.
"""

from dataclasses import dataclass, field
from typing import Any

from shoal_cluster.domain.errors import InvalidRequest, NotFound
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.limits import (
    MIB,
    POINT_ID_BYTES_MAX,
    RECALL_TARGET_MAX,
    RECALL_TARGET_MIN,
    SEARCH_BATCH_MAX,
    SEARCH_COST_MS_MAX,
    SEARCH_K_MAX,
)
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import CollectionSchema, EmbeddingModel, Metric
from shoal_cluster.domain.session import ORIGIN, Consistency, SessionToken
from shoal_cluster.domain.topology import CollectionPlace, Topology, require_topology
from shoal_cluster.domain.vectors import prepare_vectors, require_dimension, require_model
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.validation import validate
from shoal_cluster.filtering.wire import to_wire
from shoal_cluster.query.pruning import PrunedShard, reachable_shards
from shoal_cluster.shard.calls import ReadLevel, SearchCall

HITS_WITH_ROWS_MAX = 10_000
"""Hits of all queries together when payloads or vectors are asked for."""

HITS_VECTOR_BYTES_MAX = 32 * MIB
"""Vectors in one answer; half of what a frame between actors holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """How fresh a read must be. collection_id: whose positions the token holds, "" if unknown."""

    consistency: Consistency = Consistency.SESSION
    token: SessionToken = field(default_factory=dict)
    collection_id: str = ""

    def level(self, shard: ShardNumber, schema: CollectionSchema) -> ReadLevel:
        """Returns what one shard is asked for.

        A token of another collection is ignored: the name was dropped and created anew since.
        """
        if self.consistency is not Consistency.SESSION:
            return ReadLevel(consistency=self.consistency)
        stranger = self.collection_id not in ("", schema.id)
        position = ORIGIN if stranger else self.token.get(shard, ORIGIN)
        return ReadLevel(consistency=Consistency.SESSION, at_least=position)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """One to SEARCH_BATCH_MAX queries under one filter, by vector or by stored point.

    queries: (n, dimension) float32 as the caller gave them, or None. ids: UTF-8, () with queries.
    recall_target: None means the collection's. max_cost_ms: instead of a recall, what a query may
    be expected to cost of one processor, in all shards together. With neither queries nor ids it is
    a template, what searches that differ in their vectors have in common (query/prepared.py).
    """

    collection: str
    k: int
    queries: Vectors | None = None
    ids: tuple[bytes, ...] = ()
    filter: Expression | None = None
    exact: bool = False
    recall_target: float | None = None
    max_cost_ms: float | None = None
    freshness: Freshness = field(default_factory=Freshness)
    with_payload: bool = False
    with_vector: bool = False
    explain: bool = False
    model: EmbeddingModel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """Whom to ask for what, whatever the queries. k: what each shard is asked for.

    shards: those to ask, ascending.
    """

    schema: CollectionSchema
    k: int
    filter_wire: Any
    shards: tuple[ShardNumber, ...]
    pruned: tuple[PrunedShard, ...]
    with_tails: bool

    def call(self, shard: ShardNumber, request: SearchRequest) -> SearchCall:
        """Returns the message for one shard; shards share the budget evenly."""
        budget_ms = request.max_cost_ms
        return SearchCall(
            collection=self.schema.id,
            shard=shard,
            k=self.k,
            filter=self.filter_wire,
            exact=request.exact,
            recall_target=request.recall_target,
            max_cost_ms=None if budget_ms is None else budget_ms / len(self.shards),
            with_payload=self.with_tails,
            with_vector=request.with_vector,
            explain=request.explain,
            level=request.freshness.level(shard, self.schema),
        )


def collection_of(topology: Topology, name: str) -> CollectionPlace:
    """Returns where a collection is.

    Raises: NotFound naming the collection; Unavailable before the first topology has come.
    """
    place = topology.collections.get(name)
    if place is None:
        require_topology(topology)
        raise NotFound(f"collection {name[:80]!r} does not exist", field="collection")
    return place


def check_search(request: SearchRequest, schema: CollectionSchema) -> None:
    """Checks everything but the vectors' values and the filter.

    Raises: InvalidRequest naming the field and the limit.
    """
    check_settings(request, schema)
    check_queries(request.queries, request, schema)


def check_queries(
    queries: Vectors | None, request: SearchRequest, schema: CollectionSchema
) -> None:
    """Checks what is searched by, but for the vectors' values, and how much could be found.

    queries: of the request, or of a search that is like it but for them.

    Raises: InvalidRequest naming the field and the limit.
    """
    by_vector = queries is not None
    if by_vector == bool(request.ids):
        raise InvalidRequest(
            "a search takes either vectors or ids"
            + (", this one names both" if by_vector else ", this one names neither"),
            field="vectors",
        )
    count = len(request.ids) if queries is None else len(queries)
    if not 1 <= count <= SEARCH_BATCH_MAX:
        raise InvalidRequest(
            f"the search holds {count} queries",
            field="vectors" if by_vector else "ids",
            limit=f"1 to {SEARCH_BATCH_MAX} queries",
        )
    if request.with_payload or request.with_vector:
        _check_answer_size(request.k * count, request, schema)
    for i, point_id in enumerate(request.ids):
        if not 1 <= len(point_id) <= POINT_ID_BYTES_MAX:
            raise InvalidRequest(
                f"the id has {len(point_id)} bytes",
                field=f"ids[{i}]",
                limit=f"1 to {POINT_ID_BYTES_MAX} bytes",
            )


def check_settings(request: SearchRequest, schema: CollectionSchema) -> None:
    """Checks what does not depend on the queries, but for the filter.

    Raises: InvalidRequest naming the field and the limit.
    """
    if not 1 <= request.k <= SEARCH_K_MAX:
        raise InvalidRequest(
            f"k {request.k} is out of range", field="k", limit=f"1 to {SEARCH_K_MAX}"
        )
    target = request.recall_target
    if target is not None and not RECALL_TARGET_MIN <= target <= RECALL_TARGET_MAX:
        raise InvalidRequest(
            f"recall_target {target} is out of range",
            field="recall_target",
            limit=f"{RECALL_TARGET_MIN} to {RECALL_TARGET_MAX}",
        )
    _check_max_cost(request)
    require_model(request.model, schema.model, schema.name)


def _check_max_cost(request: SearchRequest) -> None:
    cost_ms = request.max_cost_ms
    if cost_ms is None:
        return
    if request.exact or request.recall_target is not None:
        raise InvalidRequest(
            "a search takes max_cost_ms, recall_target or exact, one of the three",
            field="max_cost_ms",
        )
    if not 0 < cost_ms <= SEARCH_COST_MS_MAX:
        raise InvalidRequest(
            f"max_cost_ms {cost_ms} is out of range",
            field="max_cost_ms",
            limit=f"above 0 to {SEARCH_COST_MS_MAX:g}",
        )


def _check_answer_size(hits: int, request: SearchRequest, schema: CollectionSchema) -> None:
    if hits > HITS_WITH_ROWS_MAX:
        raise InvalidRequest(
            f"up to {hits} hits with payloads or vectors are asked for; ask for fewer, or get them "
            "by id afterwards",
            field="k",
            limit=f"{HITS_WITH_ROWS_MAX} hits of all queries together",
        )
    vector_bytes = hits * schema.dimension * 4
    if request.with_vector and vector_bytes > HITS_VECTOR_BYTES_MAX:
        raise InvalidRequest(
            f"up to {vector_bytes} bytes of vectors are asked for; ask for fewer hits, or get them "
            "by id afterwards",
            field="with_vector",
            limit=f"{HITS_VECTOR_BYTES_MAX} bytes",
        )


def plan_search(request: SearchRequest, schema: CollectionSchema) -> SearchPlan:
    """Returns what to ask which shards, whatever the queries.

    request: passed `check_settings`. With ids, each is left out of its own hits, so one hit more is
    asked for.

    Raises: InvalidRequest naming the field, e.g. `filter.and[0].attribute`.
    """
    filter = None
    if request.filter is not None:
        filter = validate(request.filter, schema.attributes)
    shards, pruned = reachable_shards(schema, filter)
    return SearchPlan(
        schema=schema,
        k=request.k + 1 if request.ids else request.k,
        filter_wire=None if filter is None else to_wire(filter),
        shards=shards,
        pruned=pruned,
        # Under cosine vectors are stored with unit length; the caller's length is in the tail.
        with_tails=request.with_payload or (request.with_vector and schema.metric is Metric.COSINE),
    )


def prepare_queries(queries: Vectors, schema: CollectionSchema) -> Vectors:
    """Returns the queries, (n, dimension) float32, as the index wants them.

    Raises: InvalidRequest naming the field, e.g. `vectors[2]`.
    """
    require_dimension(queries, schema.dimension, schema.name, field="vectors[0]")
    prepared, _ = prepare_vectors(queries, schema.metric, field=_query_field)
    return prepared


def _query_field(row: int) -> str:
    return f"vectors[{row}]"
