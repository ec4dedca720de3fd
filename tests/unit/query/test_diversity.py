"""Diverse searches, against choosing by the definition with plain Python."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_cluster.domain.errors import InvalidRequest, NotFound
from shoal_cluster.domain.schema import Metric
from shoal_cluster.query import diversity
from shoal_cluster.query.diversity import DiverseRequest, mmr_order
from shoal_cluster.query.examples import Example
from shoal_cluster.query.execute import SearchResult
from shoal_cluster.query.explore import Explorer
from tests.unit.query.exploring_cases import SMALL, a_cluster, a_search, ranked, stored

QUERY = np.array([1, 1, 0, 0], np.float32)


def similarity(left: Any, right: Any, metric: Metric) -> float:
    if metric is Metric.L2:
        return -math.dist(left, right)
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def by_definition(
    query: Any, vectors: list[Any], k: int, mmr_lambda: float, metric: Metric
) -> list[int]:
    """vectors: nearest first."""
    chosen: list[int] = []
    while len(chosen) < min(k, len(vectors)):
        best, best_value = -1, -math.inf
        for i, vector in enumerate(vectors):
            if i in chosen:
                continue
            value = mmr_lambda * similarity(query, vector, metric)
            if chosen:
                nearest = max(similarity(vector, vectors[c], metric) for c in chosen)
                value -= (1 - mmr_lambda) * nearest
            if value > best_value:
                best, best_value = i, value
        if not chosen:
            best = 0
        chosen.append(best)
    return chosen


NUMBERS = st.integers(-3, 3).map(float)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=12),
    st.integers(1, 14),
    # Powers of two, so that no rounding decides a tie.
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([Metric.DOT, Metric.COSINE]),
)
def test_the_order_is_that_of_the_definition(
    vectors: list[tuple[float, ...]], k: int, mmr_lambda: float, metric: Metric
) -> None:
    query = (1.0, 2.0, -1.0)
    ordered = sorted(vectors, key=lambda v: -similarity(query, v, metric))
    keys = np.array([-similarity(query, v, metric) for v in ordered], np.float32)
    found = mmr_order(np.array(ordered, np.float32), keys, k, mmr_lambda, metric)
    assert found == by_definition(query, ordered, k, mmr_lambda, metric)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12),
    st.integers(1, 14),
    st.floats(0, 1),
)
def test_every_choice_under_l2_is_a_best_one(
    vectors: list[tuple[float, float]], k: int, mmr_lambda: float
) -> None:
    """Roots round, so ties may fall either way: each choice must only be as good as any other."""
    query = (0.5, 0.25)
    ordered = sorted(vectors, key=lambda v: math.dist(query, v))
    keys = np.array([math.dist(query, v) ** 2 for v in ordered], np.float32)
    found = mmr_order(np.array(ordered, np.float32), keys, k, mmr_lambda, Metric.L2)
    assert len(found) == len(set(found)) == min(k, len(vectors)) and found[0] == 0
    for step in range(1, len(found)):
        values = {
            i: mmr_lambda * similarity(query, ordered[i], Metric.L2)
            - (1 - mmr_lambda)
            * max(similarity(ordered[i], ordered[c], Metric.L2) for c in found[:step])
            for i in range(len(ordered))
            if i not in found[:step]
        }
        assert values[found[step]] >= max(values.values()) - 1e-5


def ask(explorer: Explorer, **changes: Any) -> SearchResult:
    options: dict[str, Any] = {"query": Example(vector=QUERY, field="query")}
    options |= {name: changes.pop(name) for name in ("query", "candidates", "mmr_lambda")
                if name in changes}  # fmt: skip
    request = DiverseRequest(search=a_search(**changes), **options)
    return asyncio.run(explorer.search_diverse(request, timeout_s=5))


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.L2, Metric.COSINE])
@pytest.mark.parametrize("threaded", [False, True])
def test_hits_are_chosen_among_the_candidates_of_all_shards(
    metric: Metric, threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "INLINE_FLOATS_MAX", 0 if threaded else 10**9)
    cluster, schema, explorer = a_cluster(metric)
    query = QUERY / np.linalg.norm(QUERY) if metric is Metric.COSINE else QUERY
    candidates = ranked(cluster, schema, query, SMALL)[:20]
    vectors = np.array([stored(cluster, schema, p) for _, p in candidates])
    keys = np.array([key for key, _ in candidates], np.float32)
    wanted = [candidates[i] for i in mmr_order(vectors, keys, 5, 0.5, metric)]
    found = ask(explorer, k=5, filter=SMALL, explain=True).hits
    assert list(found.ids) == [point_id for _, point_id in wanted]
    assert found.keys.tolist() == [np.float32(key) for key, _ in wanted]
    assert found.vectors is None and found.tails is None


def test_lambda_one_is_the_plain_order_and_lower_spreads_the_hits() -> None:
    cluster, schema, explorer = a_cluster(Metric.DOT)
    plain = [point_id for _, point_id in ranked(cluster, schema, QUERY)[:10]]
    assert list(ask(explorer, mmr_lambda=1.0).hits.ids) == plain
    spread = ask(explorer, mmr_lambda=0.2, candidates=100, with_vector=True).hits
    near = np.array([stored(cluster, schema, point_id) for point_id in plain])
    assert spread.vectors is not None
    assert np.ptp(spread.vectors @ spread.vectors.T) > np.ptp(near @ near.T)


def test_a_stored_point_is_left_out_of_its_own_hits() -> None:
    _, _, explorer = a_cluster()
    query = Example(id=b"p007", field="query")
    found = ask(explorer, query=query, k=99, candidates=1000, with_payload=True).hits
    assert b"p007" not in found.ids and len(found.ids) == 99
    assert found.tails is not None and len(found.tails) == 99
    with pytest.raises(NotFound) as caught:
        ask(explorer, query=Example(id=b"nobody", field="query"))
    assert caught.value.field == "query"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"k": 0}, "k"),
        ({"mmr_lambda": 1.5}, "mmr_lambda"),
        ({"mmr_lambda": math.nan}, "mmr_lambda"),
        ({"candidates": 9}, "candidates"),
        ({"candidates": 1001}, "candidates"),
        ({"query": Example(field="query")}, "query"),
    ],
)
def test_bad_requests_name_the_field(changes: dict[str, Any], field: str) -> None:
    _, _, explorer = a_cluster()
    with pytest.raises(InvalidRequest) as caught:
        ask(explorer, **changes)
    assert caught.value.field == field
