"""What searches that differ in their vectors only have in common, worked out once.

Applications send the same search again and again with other vectors. So everything that does not
depend on them (checks, the plan, the calls to the shards) is kept with the template, for as long as
the topology it was made for is the current one. Between plan.py and execute.py.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.topology import Topology
from shoal_cluster.query.merge import Hits, hits_of
from shoal_cluster.query.plan import (
    SearchPlan,
    SearchRequest,
    check_queries,
    check_settings,
    collection_of,
    plan_search,
    prepare_queries,
)
from shoal_cluster.query.replica_reads import ShardRead
from shoal_cluster.shard.calls import ReadLevel, SearchCall, SearchReply

Parsed = tuple[SearchReply, Hits]
"""A shard's reply, and its hits as arrays."""

_pack = msgpack.Packer(autoreset=True).pack


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRead:
    """What one shard is asked for, but for the vectors.

    fields: of the call, as on the wire, without its level.
    line: equal for reads that one call can answer together; None: this one goes alone.
    """

    shard: ShardNumber
    schema: CollectionSchema
    level: ReadLevel
    fields: tuple[Any, ...]
    line: bytes | None
    kind: str
    parse: Callable[[Any, memoryview], Parsed]

    def read(self, at_least: Position, body: bytes | memoryview) -> ShardRead[Parsed]:
        """Returns the read with these vectors, (n, dimension) float32 as the index wants them."""
        level = ReadLevel(consistency=self.level.consistency, at_least=at_least)
        return ShardRead(
            collection=self.schema.name,
            collection_id=self.schema.id,
            shard=self.shard,
            method=SearchCall.METHOD,
            header=(*self.fields, level.to_wire()),
            body=body,
            parse=self.parse,
            consistency=level.consistency,
            kind=self.kind,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSearch:
    """A search that passed `check_settings`, planned for a topology."""

    request: SearchRequest
    topology: Topology
    plan: SearchPlan
    reads: tuple[PreparedRead, ...]

    def body_of(self, queries: Vectors | None) -> memoryview:
        """Returns the vectors as the shards want them.

        Raises: InvalidRequest naming the field, e.g. `vectors[2]`.
        """
        request, schema = self.request, self.plan.schema
        if queries is None or len(queries) != 1 or request.with_payload or request.with_vector:
            check_queries(queries, request, schema)
            assert queries is not None, "searches by id come with what is stored"
        return prepare_queries(queries, schema).data.cast("B")


class SearchTemplate:
    """A search without its vectors, and the last preparation of it."""

    __slots__ = ("_prepared", "request")

    def __init__(self, request: SearchRequest) -> None:
        self.request = request
        self._prepared: PreparedSearch | None = None

    def prepared(self, topology: Topology) -> PreparedSearch:
        """Raises: InvalidRequest naming the field and the limit; NotFound; Unavailable."""
        prepared = self._prepared
        if prepared is None or prepared.topology is not topology:
            prepared = self._prepared = prepare_search(self.request, topology)
        return prepared


def prepare_search(request: SearchRequest, topology: Topology) -> PreparedSearch:
    """Raises: InvalidRequest naming the field and the limit; NotFound naming the collection;
    Unavailable before the first topology has come.
    """
    schema = collection_of(topology, request.collection).schema
    check_settings(request, schema)
    plan = plan_search(request, schema)
    parse = functools.partial(_parse, dimension=schema.dimension, with_vector=request.with_vector)
    reads = []
    for shard in plan.shards:
        call = plan.call(shard, request)
        fields = tuple(call.to_wire()[:-1])  # its level is last
        line: bytes = _pack((fields, call.level.consistency.value))
        reads.append(
            PreparedRead(
                shard=shard,
                schema=schema,
                level=call.level,
                fields=fields,
                line=None if request.explain else line,
                kind="search_exact" if request.exact else "search",
                parse=parse,
            )
        )
    return PreparedSearch(request=request, topology=topology, plan=plan, reads=tuple(reads))


def _parse(header: Any, body: memoryview, *, dimension: int, with_vector: bool) -> Parsed:
    reply = SearchReply.from_wire(header, body)
    return reply, hits_of(reply, body, dimension=dimension, with_vector=with_vector)
