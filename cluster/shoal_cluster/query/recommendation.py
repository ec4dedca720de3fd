"""Searches by several examples: near to what the positive have in common, away from the negative.

One strategy: the mean of the positive examples, moved away from the mean of the negative ones by
as much as they lie apart. Under cosine the examples have unit length, so each counts the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import RECOMMEND_EXAMPLES_MAX
from shoal_cluster.domain.point import Vector, Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.query.examples import Example, example_vectors, excluded_ids
from shoal_cluster.query.execute import SearchResult
from shoal_cluster.query.nearest import nearest
from shoal_cluster.query.plan import SearchRequest, check_search
from shoal_cluster.query.scatter import Scatter

_CANCELLED_MAX = 1e-6
"""Shorter means of unit vectors are rounding, and have no direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecommendRequest:
    """search: everything but the query, which has no vectors yet."""

    search: SearchRequest
    positive: Sequence[Example]
    negative: Sequence[Example] = ()


async def recommend(
    scatter: Scatter, request: RecommendRequest, *, timeout_s: float
) -> SearchResult:
    """Returns the k points nearest to the examples' mean; stored examples are left out.

    Raises: InvalidRequest naming the example, NotFound (collection or an id), Overloaded,
    Unavailable.
    """
    reading = scatter.begin(request.search.collection, timeout_s)
    schema = reading.schema
    examples = [*request.positive, *request.negative]
    _check_examples(request)
    placeholder = np.zeros((1, schema.dimension), np.float32)
    check_search(replace(request.search, queries=placeholder), schema)
    vectors = await example_vectors(reading, examples, request.search.freshness)
    count = len(request.positive)
    query = mean_of_examples(vectors[:count], vectors[count:])
    if schema.metric is Metric.COSINE and float(np.linalg.norm(query)) <= _CANCELLED_MAX:
        raise InvalidRequest(
            "the examples cancel out: their mean has no direction to search in", field="positive"
        )
    search = replace(request.search, queries=query.astype(np.float32)[np.newaxis])
    found = await nearest(reading, search, excluded=excluded_ids(examples))
    return SearchResult(
        schema=schema,
        hits=found.hits,
        as_of=reading.positions,
        staleness_ms=reading.staleness_ms,
        explain=found.explain(reading, search),
    )


def mean_of_examples(positive: Vectors, negative: Vectors) -> Vector:
    """Returns mean(positive) + (mean(positive) - mean(negative)), in float64."""
    mean: Vector = positive.mean(axis=0, dtype=np.float64)
    if len(negative):
        mean = 2 * mean - negative.mean(axis=0, dtype=np.float64)
    return mean


def _check_examples(request: RecommendRequest) -> None:
    if not request.positive:
        raise InvalidRequest(
            "a recommendation needs a positive example", field="positive", limit="at least 1"
        )
    examples = [*request.positive, *request.negative]
    if len(examples) > RECOMMEND_EXAMPLES_MAX:
        raise InvalidRequest(
            f"{len(examples)} examples given",
            field="positive" if not request.negative else "negative",
            limit=f"{RECOMMEND_EXAMPLES_MAX} examples in all",
        )
    seen: set[bytes] = set()
    for example in examples:
        if example.id is not None and example.id in seen:
            raise InvalidRequest(
                f"the id {example.id.decode()!r} is there twice", field=example.field
            )
        seen.add(example.id or b"")
