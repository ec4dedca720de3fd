"""Ordered scrolls over several shards, against sorting everything, while rows change or not."""

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.session import Consistency
from shoal_cluster.filtering.expression import Comparison, Expression, Operator, matches
from shoal_cluster.query import ordered_scroll
from shoal_cluster.query.explore import Explorer
from shoal_cluster.query.ordered_scroll import OrderedRows, OrderedScrollRequest, sort_key
from shoal_cluster.query.plan import Freshness
from shoal_cluster.query.sorted_shards import SortedPage, merged
from tests.unit.filtering.strategies import KEYWORDS
from tests.unit.query.fake_cluster import store
from tests.unit.query.test_facets import FILTERS, a_cluster

BY_ID = [f"p{number:03}" for number in range(120)]


def page(explorer: Explorer, **changes: Any) -> OrderedRows:
    fields: dict[str, Any] = {"collection": "docs", "order_by": "size", "limit": 7}
    request = OrderedScrollRequest(**{**fields, **changes})
    return asyncio.run(explorer.scroll_ordered(request, timeout_s=5))


def all_pages(explorer: Explorer, **changes: Any) -> list[OrderedRows]:
    pages, cursor = [], b""
    while True:
        pages.append(page(explorer, cursor=cursor, **changes))
        cursor = pages[-1].rows.next_cursor
        if not cursor:
            return pages


def ids_of(pages: list[OrderedRows]) -> list[str]:
    return [point_id.decode() for each in pages for point_id in each.rows.ids]


def expected(
    rows: dict[str, dict[str, Any]], order_by: str, descending: bool, expression: Expression | None
) -> list[str]:
    passing = [p for p in sorted(rows) if expression is None or matches(expression, rows[p])]
    present = [p for p in passing if order_by in rows[p]]
    present.sort(key=lambda p: rows[p][order_by], reverse=descending)
    return present + [p for p in passing if order_by not in rows[p]]


@pytest.mark.parametrize("order_by", ["section", "size"])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("limit", [1, 7, 40, 1000])
def test_pages_together_are_everything_in_order(
    order_by: str, descending: bool, limit: int
) -> None:
    cluster, explorer, attributes = a_cluster()
    for shard in cluster.shards.values():
        shard.rows_per_reply_max = 5
    rows = dict(zip(BY_ID, attributes, strict=True))
    for expression in FILTERS:
        pages = all_pages(
            explorer, order_by=order_by, descending=descending, limit=limit, filter=expression
        )
        assert ids_of(pages) == expected(rows, order_by, descending, expression)
        assert all(len(each.rows.ids) == limit for each in pages[:-1])


def test_rows_come_with_what_was_asked_for() -> None:
    _, explorer, _ = a_cluster()
    found = page(explorer, with_payload=True, with_vector=True, limit=50).rows
    assert found.vectors is not None and found.vectors.shape == (50, 4)
    assert len(found.tails) == len(found.seqs) == 50
    numbers = found.vectors[:, 1] / found.vectors[:, 0]
    np.testing.assert_allclose(numbers, [int(p[1:]) for p in found.ids], rtol=1e-4)
    bare = page(explorer).rows
    assert bare.vectors is None and not bare.tails


def test_a_page_ends_when_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_scroll, "PAGE_BYTES_MAX", 200)
    _, explorer, attributes = a_cluster()
    pages = all_pages(explorer, limit=1000, with_payload=True)
    assert len(pages) > 10
    rows = dict(zip(BY_ID, attributes, strict=True))
    assert ids_of(pages) == expected(rows, "size", False, None)


def test_most_pages_ask_each_shard_once_and_not_for_everything() -> None:
    cluster, explorer, _ = a_cluster(4)
    page(explorer, limit=40)
    assert len(cluster.calls) <= 5
    assert {call.message.limit for call in cluster.calls} == {36}


def test_rows_that_keep_their_value_come_once_whatever_happens_to_the_others() -> None:
    cluster, explorer, attributes = a_cluster()
    schema = cluster.topology.collections["docs"].schema
    rows = dict(zip(BY_ID, attributes, strict=True))
    steady = set(BY_ID[::3])
    rng = np.random.default_rng(2)
    found: list[str] = []
    cursor = b""
    while True:
        one = page(explorer, cursor=cursor, limit=5)
        found += ids_of([one])
        cursor = one.rows.next_cursor
        if not cursor:
            break
        # The row the cursor names goes away, others change, new ones come before and behind it.
        last = found[-1]
        for number, of_shard in ((n, cluster.shard(schema, n)) for n in range(3)):
            if last not in steady:
                of_shard.rows.pop(last.encode(), None)
            store(cluster, schema, number, f"x{len(found)}-{number}", [1, 0, 0, 0],
                  size=int(rng.integers(0, 8)))  # fmt: skip
    assert len(found) == len(set(found))
    assert [p for p in found if p in steady] == [
        p for p in expected(rows, "size", False, None) if p in steady
    ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"order_by": "wrod"}, "order_by"),
        ({"order_by": "tags"}, "order_by"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"cursor": b"nonsense"}, "cursor"),
        ({"cursor": b"x" * 5000}, "cursor"),
    ],
)
def test_bad_requests_name_the_field(changes: dict[str, Any], field: str) -> None:
    _, explorer, _ = a_cluster()
    with pytest.raises(InvalidRequest) as caught:
        page(explorer, **changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "changes",
    [{"order_by": "section"}, {"descending": True}, {"filter": FILTERS[1]}],
)
def test_a_cursor_of_another_scroll_is_refused(changes: dict[str, Any]) -> None:
    _, explorer, _ = a_cluster()
    cursor = page(explorer).rows.next_cursor
    with pytest.raises(InvalidRequest, match="belongs to another") as caught:
        page(explorer, cursor=cursor, **changes)
    assert caught.value.field == "cursor"


def test_explain_and_levels_are_those_of_the_first_round() -> None:
    cluster, explorer, _ = a_cluster(4, partition_by="section")
    for shard in cluster.shards.values():
        shard.rows_per_reply_max = 2
    pinned = Comparison("section", Operator.EQ, "web")
    strong = Freshness(consistency=Consistency.STRONG)
    found = page(explorer, filter=pinned, explain=True, freshness=strong)
    assert found.explain is not None
    assert (len(found.explain.searched), len(found.explain.pruned)) == (1, 3)
    first, *later = [call.message for call in cluster.calls]
    assert first.level.consistency is Consistency.STRONG and first.explain
    assert later and all(call.level.consistency is Consistency.SESSION for call in later)
    assert all(call.level.at_least == found.rows.as_of[call.shard] for call in later)


@given(st.lists(st.tuples(st.none() | st.sampled_from(KEYWORDS), st.binary(max_size=2))))
def test_descending_words_are_those_that_ascend_turned_around(
    places: list[tuple[str | None, bytes]],
) -> None:
    present = sorted((p for p in places if p[0] is not None), key=lambda p: p[1])
    present.sort(key=lambda p: p[0] or "", reverse=True)
    wanted = present + sorted((p for p in places if p[0] is None), key=lambda p: p[1])
    assert sorted(places, key=lambda p: sort_key(p, descending=True)) == wanted


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 60), unique=True).map(sorted), max_size=4),
    st.integers(1, 6),
)
def test_merging_pages_gives_every_entry_once_and_none_too_early(
    shards: list[list[int]], page_size: int
) -> None:
    """Q-4. An entry in two shards comes once."""

    async def ask(wanted: Any) -> list[SortedPage]:
        pages = []
        for shard, before in wanted:
            rest = [n for n in shards[shard] if before is None or n > before.order[-1]]
            chosen = rest[:page_size]
            pages.append(
                SortedPage(
                    order=chosen,
                    places=chosen,
                    ids=[b"%d" % n for n in chosen],
                    seqs=chosen,
                    tails=None,
                    vectors=None,
                    more=len(rest) > page_size,
                )
            )
        return pages

    async def collect() -> list[int]:
        numbers = list(map(ShardNumber, range(len(shards))))
        return [entry[0] async for entries in merged(numbers, ask) for entry in entries]

    assert asyncio.run(collect()) == sorted({n for shard in shards for n in shard})
