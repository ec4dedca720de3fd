"""Range searches over several shards, against ranking every row."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_cluster.domain.errors import InvalidRequest, NotFound
from shoal_cluster.domain.schema import Metric
from shoal_cluster.domain.session import Consistency
from shoal_cluster.edge.rows_codec import scores_of
from shoal_cluster.filtering.expression import Comparison, Operator
from shoal_cluster.query import range_search
from shoal_cluster.query.examples import Example
from shoal_cluster.query.explore import Explorer
from shoal_cluster.query.plan import Freshness
from shoal_cluster.query.range_search import RangeHits, RangeRequest, greatest_key
from tests.unit.query.exploring_cases import NOBODY, SMALL, a_cluster, a_search, ranked, stored

QUERY = np.array([3, 1, 1, 0], np.float32)


def a_request(metric: Metric, bound: float, **changes: Any) -> RangeRequest:
    options: dict[str, Any] = {"query": Example(vector=QUERY, field="query")}
    options["distance_max" if metric is Metric.L2 else "score_min"] = bound
    for name in ("query", "limit", "cursor", "distance_max", "score_min"):
        if name in changes:
            options[name] = changes.pop(name)
    return RangeRequest(search=a_search(**changes), **options)


def ask(explorer: Explorer, request: RangeRequest, items_max: int = 10_000) -> list[RangeHits]:
    async def collect() -> list[RangeHits]:
        items = []
        async for item in explorer.search_range(request, timeout_s=5):
            items.append(item)
            if len(items) == items_max:
                break
        return items

    return asyncio.run(collect())


def pairs(items: list[RangeHits]) -> list[tuple[float, bytes]]:
    return [hit for i in items for hit in zip(i.hits.keys.tolist(), i.hits.ids, strict=True)]


BOUNDS = {Metric.DOT: (20.0, 9.0, -100.0, 100.0), Metric.L2: (0.0, 2.0, 2.5, 100.0)}


@pytest.mark.parametrize("metric", BOUNDS)
@pytest.mark.parametrize("rows_per_reply", [3, 10_000])
@pytest.mark.parametrize("filter", [None, SMALL, NOBODY])
def test_a_range_is_every_row_within_it_nearest_first(
    metric: Metric, rows_per_reply: int, filter: Any
) -> None:
    cluster, schema, explorer = a_cluster(metric)
    for shard in cluster.shards.values():
        shard.rows_per_reply_max = rows_per_reply
    for bound in BOUNDS[metric]:
        wanted = [
            hit
            for hit in ranked(cluster, schema, QUERY, filter)
            if (math.sqrt(hit[0]) <= bound if metric is Metric.L2 else -hit[0] >= bound)
        ]
        items = ask(explorer, a_request(metric, bound, filter=filter))
        assert pairs(items) == wanted
        assert not any(item.truncated for item in items)
        assert [bool(item.cursor) for item in items] == [True] * (len(items) - 1) + [False]
        assert not items[-1].hits.ids


def test_messages_are_bounded_by_hits_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, explorer = a_cluster(Metric.DOT)
    monkeypatch.setattr(range_search, "MESSAGE_HITS_MAX", 7)
    items = ask(explorer, a_request(Metric.DOT, -100.0))
    assert [len(item.hits.ids) for item in items[:-1]] == [7] * 14 + [2]
    monkeypatch.setattr(range_search, "SHARD_PAGE_BYTES_MAX", 60)
    items = ask(explorer, a_request(Metric.DOT, -100.0, with_vector=True))
    assert {len(item.hits.ids) for item in items[:-1]} == {4}  # of 16 bytes each
    assert all(item.hits.vectors is not None for item in items)


@pytest.mark.parametrize("limit", [1, 10, 99, 100, 101])
def test_a_limit_gives_the_nearest_and_says_whether_there_are_more(limit: int) -> None:
    cluster, schema, explorer = a_cluster(Metric.DOT)
    items = ask(explorer, a_request(Metric.DOT, -100.0, limit=limit))
    assert pairs(items) == ranked(cluster, schema, QUERY)[:limit]
    assert items[-1].truncated == (limit < 100)


@pytest.mark.parametrize("limit", [50, 1000])
def test_a_stream_goes_on_behind_any_of_its_cursors(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_search, "MESSAGE_HITS_MAX", 9)
    cluster, schema, explorer = a_cluster(Metric.DOT)
    found: list[RangeHits] = []
    cursor = b""
    while True:
        items = ask(explorer, a_request(Metric.DOT, -100.0, limit=limit, cursor=cursor), 2)
        found += items
        cursor = items[-1].cursor
        if not cursor:
            break
    assert pairs(found) == ranked(cluster, schema, QUERY)[:limit]
    assert found[-1].truncated == (limit < 100)


def test_a_stored_point_is_left_out_of_its_own_range() -> None:
    cluster, schema, explorer = a_cluster()
    query = Example(id=b"p007", field="query")
    items = ask(explorer, a_request(Metric.COSINE, -2.0, query=query, limit=99))
    wanted = ranked(cluster, schema, stored(cluster, schema, b"p007"), None, {b"p007"})
    assert pairs(items) == wanted and not items[-1].truncated
    with pytest.raises(NotFound) as caught:
        ask(explorer, a_request(Metric.COSINE, 0, query=Example(id=b"nobody", field="query")))
    assert caught.value.field == "query"


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(Metric)),
    st.floats(-1e18, 1e18).filter(lambda x: x == 0 or abs(x) > 1e-30),
    st.integers(-4, 4),
    st.booleans(),
)
def test_the_key_bound_lets_through_exactly_the_scores_within(
    metric: Metric, near: float, steps: int, a_score: bool
) -> None:
    """Where rounding decides: bounds that are scores or lie between two, keys next to the bound."""
    near = abs(near) if metric is Metric.L2 else near
    bound = scores_of(np.array([near], np.float32), metric)[0] if a_score else near
    greatest = np.float32(greatest_key(metric, bound))
    tried = greatest
    for _ in range(abs(steps)):
        tried = np.nextafter(tried, np.float32(math.copysign(np.inf, steps)))
    [score] = scores_of(np.array([tried]), metric)
    within = score <= bound if metric is Metric.L2 else score >= bound
    assert (tried <= greatest) == within


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("bound", [0.0, 1e-300, 1e300, 0.1])
def test_extreme_bounds_give_keys(metric: Metric, bound: float) -> None:
    """No score may qualify, as 1e300 does not fit a float32; but there always is an answer."""
    assert not math.isnan(greatest_key(metric, bound))


@pytest.mark.parametrize(
    ("metric", "changes", "field"),
    [
        (Metric.COSINE, {"score_min": None}, "score_min"),
        (Metric.COSINE, {"score_min": None, "distance_max": 1.0}, "distance_max"),
        (Metric.COSINE, {"distance_max": 1.0}, "distance_max"),
        (Metric.COSINE, {"score_min": math.nan}, "score_min"),
        (Metric.L2, {"distance_max": -1.0}, "distance_max"),
        (Metric.L2, {"distance_max": math.inf}, "distance_max"),
        (Metric.L2, {"distance_max": None, "score_min": 1.0}, "score_min"),
        (Metric.L2, {"limit": 0}, "limit"),
        (Metric.L2, {"limit": 100_001}, "limit"),
        (Metric.L2, {"cursor": b"nonsense"}, "cursor"),
        (Metric.L2, {"cursor": b"x" * 5000}, "cursor"),
        (Metric.L2, {"query": Example(vector=np.ones(3, np.float32), field="query")}, "query"),
    ],
)
def test_bad_requests_name_the_field(metric: Metric, changes: dict[str, Any], field: str) -> None:
    _, _, explorer = a_cluster(metric)
    with pytest.raises(InvalidRequest) as caught:
        ask(explorer, a_request(metric, 1.0, **changes))
    assert caught.value.field == field


def test_a_cursor_of_another_range_is_refused() -> None:
    _, _, explorer = a_cluster(Metric.DOT)
    cursor = ask(explorer, a_request(Metric.DOT, 0.0), 1)[0].cursor
    others: list[tuple[float, dict[str, Any]]] = [(1.0, {}), (0.0, {"filter": SMALL})]
    others.append((0.0, {"query": Example(vector=QUERY[::-1].copy(), field="query")}))
    for bound, changes in others:
        with pytest.raises(InvalidRequest, match="belongs to another") as caught:
            ask(explorer, a_request(Metric.DOT, bound, cursor=cursor, **changes))
        assert caught.value.field == "cursor"


def test_pruning_explain_and_levels_of_the_rounds() -> None:
    cluster, _, explorer = a_cluster(Metric.DOT, shards=4, partition_by="section")
    for shard in cluster.shards.values():
        shard.rows_per_reply_max = 2
    pinned = Comparison("section", Operator.EQ, "s3")
    strong = Freshness(consistency=Consistency.STRONG)
    items = ask(
        explorer, a_request(Metric.DOT, -100.0, filter=pinned, explain=True, freshness=strong)
    )
    last = items[-1]
    assert last.explain is not None and len(last.explain.pruned) == 3
    first, *later = [call.message for call in cluster.calls]
    assert first.level.consistency is Consistency.STRONG and first.explain
    assert later and all(call.level.consistency is Consistency.SESSION for call in later)
    assert all(call.level.at_least == last.as_of[call.shard] for call in later)
