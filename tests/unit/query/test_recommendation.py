"""Recommendations over several shards, against ranking every row by the mean of the examples."""

import asyncio
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.errors import InvalidRequest, NotFound
from shoal_cluster.domain.schema import EmbeddingModel, Metric
from shoal_cluster.query.examples import Example
from shoal_cluster.query.execute import SearchResult
from shoal_cluster.query.explore import Explorer
from shoal_cluster.query.recommendation import RecommendRequest
from tests.unit.query.exploring_cases import NOBODY, SMALL, a_cluster, a_search, ranked, stored


def of(*examples: Any, side: str = "positive") -> list[Example]:
    """Bytes are ids, lists vectors."""
    return [
        Example(id=each, field=f"{side}[{i}]")
        if isinstance(each, bytes)
        else Example(vector=np.array(each, np.float32), field=f"{side}[{i}]")
        for i, each in enumerate(examples)
    ]


def ask(explorer: Explorer, positive: Any, negative: Any = (), **changes: Any) -> SearchResult:
    request = RecommendRequest(
        search=a_search(**changes),
        positive=of(*positive),
        negative=of(*negative, side="negative"),
    )
    return asyncio.run(explorer.recommend(request, timeout_s=5))


def unit(vector: Any, metric: Metric) -> np.ndarray:
    wide = np.array(vector, np.float64)
    return wide / np.linalg.norm(wide) if metric is Metric.COSINE else wide


EXAMPLES: dict[str, tuple[list[Any], list[Any]]] = {
    "one id": ([b"p007"], []),
    "ids": ([b"p007", b"p031", b"p044"], []),
    "ids and vectors, both sides": ([b"p007", [3, 1, 0, 2]], [[1, 2, 2, 0], b"p050", b"p003"]),
    "a vector alone": ([[1, 2, 0, 1]], []),
}


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("filter", [None, SMALL, NOBODY])
def test_a_recommendation_equals_ranking_by_the_mean(
    metric: Metric, name: str, filter: Any
) -> None:
    cluster, schema, explorer = a_cluster(metric)
    positive, negative = EXAMPLES[name]

    def mean(examples: list[Any]) -> np.ndarray:
        vectors = [
            stored(cluster, schema, e).astype(np.float64)
            if isinstance(e, bytes)
            else unit(e, metric)
            for e in examples
        ]
        return np.mean(np.array(vectors, np.float64), axis=0)

    query = mean(positive)
    if negative:
        query = query + (query - mean(negative))
    given = {e for e in positive + negative if isinstance(e, bytes)}
    wanted = ranked(cluster, schema, unit(query, metric), filter, given)
    for k in (1, 10, 1000):
        found = ask(explorer, positive, negative, k=k, filter=filter).hits
        keys = [key for key, _ in wanted[:k]]
        np.testing.assert_allclose(found.keys, keys, rtol=1e-4, atol=1e-5)
        # Rounding may order what ties for us differently, but never lets in what is farther.
        assert not given & set(found.ids)
        farthest = keys[-1] if keys else 0.0
        near = {p for key, p in wanted if key <= farthest + 1e-4}
        assert set(found.ids) <= near and len(set(found.ids)) == len(keys)


def test_the_answer_carries_positions_explain_and_rows() -> None:
    _, _, explorer = a_cluster(shards=4, partition_by="section")
    found = ask(
        explorer, [b"p001"], k=3, filter=NOBODY, explain=True, with_payload=True, with_vector=True
    )
    assert found.explain is not None and len(found.explain.pruned) == 3
    assert {"get", "scatter", "merge"} <= set(found.explain.stages_us)
    rows = ask(explorer, [b"p001"], k=3, with_payload=True, with_vector=True)
    assert rows.hits.tails is not None and len(rows.hits.tails) == 3
    assert rows.hits.vectors is not None and rows.hits.vectors.shape == (3, 4)
    assert set(rows.as_of) == set(range(4))


@pytest.mark.parametrize(
    ("positive", "negative", "changes", "field"),
    [
        ([], [[1, 0, 0, 0]], {}, "positive"),
        ([[1, 0, 0]], [], {}, "positive[0]"),
        ([[1, 0, 0, 0], [0, float("nan"), 0, 0]], [], {}, "positive[1]"),
        ([b"p001"], [[0, 0, 0, 0]], {}, "negative[0]"),
        ([b"p001"], [b"p001"], {}, "negative[0]"),
        ([b""], [], {}, "positive[0]"),
        ([[1, 0, 0, 0]] * 101, [], {}, "positive"),
        ([[1, 0, 0, 0]], [], {"k": 0}, "k"),
        ([[1, 0, 0, 0]], [], {"k": 1001}, "k"),
        ([[1, 0, 0, 0], [-1, 0, 0, 0]], [], {}, "positive"),
        ([[1, 0, 0, 0]], [], {"recall_target": 0.1}, "recall_target"),
    ],
)
def test_bad_requests_name_the_field(
    positive: Any, negative: Any, changes: Any, field: str
) -> None:
    _, _, explorer = a_cluster()
    with pytest.raises(InvalidRequest) as caught:
        ask(explorer, positive, negative, **changes)
    assert caught.value.field == field


def test_an_unknown_id_and_another_model_are_refused() -> None:
    model = EmbeddingModel(name="m", version="1")
    _, _, explorer = a_cluster(model=model)
    with pytest.raises(NotFound) as caught:
        ask(explorer, [b"p001"], [b"p002", b"nobody"])
    assert caught.value.field == "negative[1]"
    with pytest.raises(InvalidRequest) as refused:
        ask(explorer, [b"p001"], model=EmbeddingModel(name="m", version="2"))
    assert refused.value.field == "model"
