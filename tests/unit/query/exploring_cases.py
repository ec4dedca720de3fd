"""A filled fake cluster, and what plain numpy finds in it."""

from collections.abc import Collection
from typing import Any

import numpy as np

from shoal_cluster.domain.partition import shard_of_id, shard_of_value
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.filtering.expression import Comparison, Expression, Operator, matches
from shoal_cluster.query.execute import Searcher
from shoal_cluster.query.explore import Explorer
from shoal_cluster.query.plan import SearchRequest
from tests.unit.query.fake_cluster import FakeClock, FakeCluster, a_schema, store
from tests.unit.query.fake_exploring import attributes_of

SMALL = Comparison("size", Operator.LT, 40)
NOBODY = Comparison("section", Operator.EQ, "nobody")


def a_cluster(
    metric: Metric = Metric.COSINE, shards: int = 3, rows: int = 100, **changes: Any
) -> tuple[FakeCluster, CollectionSchema, Explorer]:
    """Vectors of few small whole numbers, so that scores tie; a fifth has no section."""
    cluster = FakeCluster(FakeClock())
    schema = a_schema(metric=metric, shards=shards, **changes)
    cluster.add_collection(schema, [["a", "b"]] * shards)
    rng = np.random.default_rng(9)
    for number in range(rows):
        attributes: dict[str, Any] = {"size": number}
        if schema.partition_by or number % 5:
            attributes["section"] = f"s{rng.integers(0, 8)}"
        point_id = f"p{number:03}"
        shard = (
            shard_of_value(attributes["section"], shards)
            if schema.partition_by
            else shard_of_id(point_id, shards)  # type: ignore[arg-type]
        )
        vector = rng.integers(-2, 3, 4)
        vector[0] += 3  # never zero
        store(cluster, schema, shard, point_id, vector.tolist(), **attributes)
    searcher = Searcher(caller=cluster, topology=cluster, clock=cluster.clock)
    return cluster, schema, Explorer(searcher.scatter)


def a_search(**changes: Any) -> SearchRequest:
    return SearchRequest(**{"collection": "docs", "k": 10, **changes})


def stored(cluster: FakeCluster, schema: CollectionSchema, point_id: bytes) -> np.ndarray:
    for number in range(schema.shards):
        row = cluster.shard(schema, number).rows.get(point_id)
        if row is not None:
            return row.vector
    raise KeyError(point_id)


def ranked(
    cluster: FakeCluster,
    schema: CollectionSchema,
    query: np.ndarray,
    filter: Expression | None = None,
    excluded: Collection[bytes] = (),
) -> list[tuple[float, bytes]]:
    """Every (key, id) that matches, ascending. query: as the index wants it."""
    found = []
    for number in range(schema.shards):
        shard = cluster.shard(schema, number)
        for point_id, row in shard.rows.items():
            if point_id in excluded:
                continue
            if filter is None or matches(filter, attributes_of(shard, point_id)):
                found.append((shard.key(query.astype(np.float32), row.vector), point_id))
    return sorted(found)
