"""Chooses hits that differ from each other: maximal marginal relevance over the nearest points.

Source: Carbonell and Goldstein, The Use of MMR, Diversity-Based Reranking (1998), with the score
as the similarity of both kinds, and minus the distance for l2.
"""

import asyncio
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import DIVERSE_CANDIDATES_MAX
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.query.asked import require_range
from shoal_cluster.query.examples import Example, example_vectors, excluded_ids
from shoal_cluster.query.execute import SearchResult
from shoal_cluster.query.nearest import nearest, picked
from shoal_cluster.query.plan import SearchRequest, check_search
from shoal_cluster.query.scatter import Scatter

CANDIDATES_PER_HIT = 4

INLINE_FLOATS_MAX = 4_000_000
"""Multiplications done on the loop: about 2 ms. More go to a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiverseRequest:
    """search: everything but the query; k hits are chosen. candidates: None for 4k.

    mmr_lambda: 1 is nearness alone, 0 difference alone.
    """

    search: SearchRequest
    query: Example
    candidates: int | None = None
    mmr_lambda: float = 0.5


async def search_diverse(
    scatter: Scatter, request: DiverseRequest, *, timeout_s: float
) -> SearchResult:
    """Returns k hits in the order they were chosen.

    Raises: InvalidRequest, NotFound (collection or the id), Overloaded, Unavailable.
    """
    reading = scatter.begin(request.search.collection, timeout_s)
    schema, k = reading.schema, request.search.k
    placeholder = np.zeros((1, schema.dimension), np.float32)
    check_search(replace(request.search, queries=placeholder), schema)
    if not 0 <= request.mmr_lambda <= 1:  # also refuses nan
        raise InvalidRequest(
            f"mmr_lambda {request.mmr_lambda} is out of range", field="mmr_lambda", limit="0 to 1"
        )
    candidates = request.candidates
    if candidates is None:
        candidates = min(CANDIDATES_PER_HIT * k, DIVERSE_CANDIDATES_MAX)
    require_range(candidates, k, DIVERSE_CANDIDATES_MAX, field="candidates")
    query = await example_vectors(reading, [request.query], request.search.freshness)
    search = replace(request.search, queries=query, k=candidates, with_vector=True)
    found = await nearest(
        reading,
        search,
        excluded=excluded_ids([request.query]),
        keep_vectors=request.search.with_vector,
    )
    began_s = scatter.clock.monotonic_s()
    hits = found.hits
    if hits.ids:
        assert hits.vectors is not None, "asked for"
        arguments = (hits.vectors, hits.keys, k, request.mmr_lambda, schema.metric)
        if k * hits.vectors.size <= INLINE_FLOATS_MAX:
            chosen = mmr_order(*arguments)
        else:
            chosen = await asyncio.to_thread(mmr_order, *arguments)
        hits = picked(hits, chosen)
    if not request.search.with_vector:
        hits = replace(hits, vectors=None)
    reading.note("choose", began_s)
    return SearchResult(
        schema=schema,
        hits=hits,
        as_of=reading.positions,
        staleness_ms=reading.staleness_ms,
        explain=found.explain(reading, search),
    )


def mmr_order(
    vectors: Vectors, keys: npt.NDArray[np.float32], k: int, mmr_lambda: float, metric: Metric
) -> list[int]:
    """Returns the positions of up to k candidates, in the order of choice.

    vectors: (n, d) as stored. keys: (n,), those of a search, ascending. Ties go to the nearer, then
    to the one that stands first. O(k · n · d).
    """
    wide = vectors.astype(np.float64)
    nearness = -keys.astype(np.float64)
    if metric is Metric.L2:
        nearness = -np.sqrt(np.maximum(keys.astype(np.float64), 0))
    greatest = np.full(len(vectors), -np.inf)
    chosen = [0]
    while len(chosen) < min(k, len(vectors)):
        last = wide[chosen[-1]]
        if metric is Metric.L2:
            similarity = -np.sqrt(((wide - last) ** 2).sum(axis=1))
        else:
            similarity = wide @ last
        np.maximum(greatest, similarity, out=greatest)
        value = mmr_lambda * nearness - (1 - mmr_lambda) * greatest
        value[chosen] = -np.inf
        chosen.append(int(np.argmax(value)))
    return chosen
