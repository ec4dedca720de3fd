"""Get, scroll and count against a fake cluster."""

import asyncio
from typing import Any

import pytest

from shoal_cluster.domain.errors import InvalidRequest, Outcome
from shoal_cluster.domain.ids import CollectionId, ServerId
from shoal_cluster.domain.partition import shard_of_id, shard_of_value
from shoal_cluster.domain.point import decode_tail
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.filtering.expression import Comparison, Expression, Operator
from shoal_cluster.query.execute import Searcher
from shoal_cluster.query.plan import Freshness
from shoal_cluster.query.rows import RowReader
from tests.unit.query.fake_cluster import FakeClock, FakeCluster, a_schema, store

ANY = Freshness()


def a_cluster(shards: int, points: int = 0, **changes: Any) -> tuple[FakeCluster, Any, RowReader]:
    cluster = FakeCluster(FakeClock())
    schema = a_schema(shards=shards, metric=Metric.L2, **changes)
    cluster.add_collection(schema, [["a", "b"]] * shards)
    for number in range(points):
        point_id, section = f"p{number:03}", f"s{number % 3}"
        if schema.partition_by:
            shard = shard_of_value(section, shards)
        else:
            shard = shard_of_id(point_id, shards)  # type: ignore[arg-type]
        store(cluster, schema, shard, point_id, [number, 0, 0, 0], section=section, size=number)
    searcher = Searcher(caller=cluster, topology=cluster, clock=cluster.clock)
    return cluster, schema, searcher.rows


async def scroll_all(
    reader: RowReader, limit: int, filter: Expression | None = None
) -> list[list[bytes]]:
    pages, cursor = [], b""
    while True:
        page = await reader.scroll(
            "docs",
            filter=filter,
            limit=limit,
            cursor=cursor,
            with_vector=False,
            freshness=ANY,
            timeout_s=5,
        )
        pages.append(list(page.ids))
        cursor = page.next_cursor
        if not cursor:
            return pages


@pytest.mark.parametrize("partition_by", [None, "section"])
def test_get_returns_rows_in_the_order_asked_and_leaves_out_what_is_missing(
    partition_by: str | None,
) -> None:
    async def scenario() -> None:
        _, _, reader = a_cluster(4, 20, partition_by=partition_by)
        rows = await reader.get(
            "docs",
            [b"p010", b"none", b"p003", b"p004"],
            with_vector=True,
            freshness=ANY,
            timeout_s=5,
        )
        assert list(rows.ids) == [b"p010", b"p003", b"p004"]
        assert rows.vectors is not None
        assert rows.vectors[:, 0].tolist() == [10, 3, 4]

    asyncio.run(scenario())


def test_get_asks_only_the_shard_of_each_id() -> None:
    async def scenario() -> None:
        cluster, _, reader = a_cluster(4, 20)
        await reader.get("docs", [b"p001"], with_vector=False, freshness=ANY, timeout_s=5)
        assert len(cluster.calls) == 1
        partitioned, _, reader = a_cluster(4, 20, partition_by="section")
        await reader.get("docs", [b"p001"], with_vector=False, freshness=ANY, timeout_s=5)
        assert len(partitioned.calls) == 4, "the id alone does not tell its shard"

    asyncio.run(scenario())


def test_get_asks_again_for_what_did_not_fit_a_reply() -> None:
    async def scenario() -> None:
        cluster, schema, reader = a_cluster(3, 40)
        for number in range(3):
            cluster.shard(schema, number).rows_per_reply_max = 4
        wanted = [b"p%03d" % number for number in range(39, -1, -1)]
        rows = await reader.get("docs", wanted, with_vector=True, freshness=ANY, timeout_s=5)
        assert list(rows.ids) == wanted
        assert rows.vectors is not None and rows.tails is not None
        assert rows.vectors[:, 0].tolist() == list(range(39, -1, -1))
        assert [decode_tail(tail)[1]["size"] for tail in rows.tails] == list(range(39, -1, -1))

    asyncio.run(scenario())


def test_a_get_of_too_much_is_refused_naming_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        cluster, schema, reader = a_cluster(1, 40)
        cluster.shard(schema, 0).rows_per_reply_max = 4
        monkeypatch.setattr("shoal_cluster.query.rows.GATHERED_BYTES_MAX", 500)
        ids = [b"p%03d" % number for number in range(40)]
        with pytest.raises(InvalidRequest, match="fewer at a time") as refused:
            await reader.get("docs", ids, with_vector=False, freshness=ANY, timeout_s=5)
        assert (refused.value.field, refused.value.limit) == (
            "ids",
            "500 bytes of payloads, attributes and vectors",
        )
        assert refused.value.outcome is Outcome.NOT_APPLIED
        assert len(cluster.calls) < 10, "it stops there"

    asyncio.run(scenario())


def test_payloads_that_nobody_asked_for_stay_where_they_are() -> None:
    async def scenario() -> None:
        cluster, _, reader = a_cluster(1, 4)
        page = await reader.scroll(
            "docs", filter=None, limit=9, cursor=b"", with_vector=True, with_payload=False,
            freshness=ANY, timeout_s=5,
        )  # fmt: skip
        assert page.tails is None and page.vectors is not None
        assert not any(call.message.with_tails for call in cluster.calls)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("ids", "field"),
    [([], "ids"), ([b"x"] * 2, "ids[1]"), ([b""], "ids[0]"), ([b"a", b"x" * 257], "ids[1]")],
)
def test_bad_ids_are_named(ids: list[bytes], field: str) -> None:
    async def scenario() -> None:
        _, _, reader = a_cluster(1)
        with pytest.raises(InvalidRequest) as caught:
            await reader.get("docs", ids, with_vector=False, freshness=ANY, timeout_s=5)
        assert caught.value.field == field

    asyncio.run(scenario())


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 1000])
def test_scroll_returns_every_row_once_shard_by_shard_and_by_id(limit: int) -> None:
    async def scenario() -> None:
        cluster, schema, reader = a_cluster(3, 20)
        pages = await scroll_all(reader, limit)
        expected = [i for shard in range(3) for i in sorted(cluster.shard(schema, shard).rows)]
        assert [point_id for page in pages for point_id in page] == expected
        assert all(len(page) <= limit for page in pages)

    asyncio.run(scenario())


def test_a_short_reply_of_a_shard_is_not_taken_for_its_end() -> None:
    async def scenario() -> None:
        cluster, schema, reader = a_cluster(2, 20)
        for shard in range(2):
            cluster.shard(schema, shard).rows_per_reply_max = 2
        assert sum(map(len, await scroll_all(reader, 15))) == 20

    asyncio.run(scenario())


def test_scroll_survives_a_dead_server_between_pages() -> None:
    async def scenario() -> None:
        cluster, _, reader = a_cluster(2, 20)
        page = await reader.scroll(
            "docs", filter=None, limit=5, cursor=b"", with_vector=False, freshness=ANY, timeout_s=5
        )
        cluster.dead.add(ServerId("a"))
        rest = await reader.scroll(
            "docs",
            filter=None,
            limit=1000,
            cursor=page.next_cursor,
            with_vector=True,
            freshness=ANY,
            timeout_s=5,
        )
        assert len(set(page.ids) | set(rest.ids)) == 20
        assert rest.vectors is not None and rest.vectors.shape == (15, 4)

    asyncio.run(scenario())


def test_scroll_and_count_ask_only_the_shards_a_filter_reaches() -> None:
    async def scenario() -> None:
        cluster, _, reader = a_cluster(4, 30, partition_by="section")
        filter = Comparison("section", Operator.EQ, "s1")
        pages = await scroll_all(reader, 100, filter)
        assert len(pages[0]) == 10
        count = await reader.count("docs", filter=filter, freshness=ANY, timeout_s=5)
        assert count.rows == 10
        assert {call.message.shard for call in cluster.calls} == {shard_of_value("s1", 4)}
        everything = await reader.count("docs", filter=None, freshness=ANY, timeout_s=5)
        assert everything.rows == 30 and len(everything.as_of) == 4

    asyncio.run(scenario())


def test_a_damaged_or_foreign_cursor_is_refused() -> None:
    async def scenario() -> None:
        cluster, _, reader = a_cluster(2, 20)

        async def page(collection: str, cursor: bytes, filter: Expression | None = None) -> bytes:
            rows = await reader.scroll(
                collection,
                filter=filter,
                limit=5,
                cursor=cursor,
                with_vector=False,
                freshness=ANY,
                timeout_s=5,
            )
            return rows.next_cursor

        good = await page("docs", b"")
        other: CollectionSchema = a_schema(id=CollectionId("e" * 32), name="other", shards=2)
        cluster.add_collection(other, [["a"]] * 2)
        filter = Comparison("size", Operator.GT, 3)
        for collection, cursor, with_filter in [
            ("other", good, None),
            ("docs", good, filter),
            ("docs", b"\x00", None),
            ("docs", b"x" * 10_000, None),
            ("docs", good[:-1], None),
            ("docs", good + b"x", None),
        ]:
            with pytest.raises(InvalidRequest) as caught:
                await page(collection, cursor, with_filter)
            assert caught.value.field == "cursor"

    asyncio.run(scenario())


@pytest.mark.parametrize("limit", [0, 1001])
def test_scroll_limits_are_checked(limit: int) -> None:
    async def scenario() -> None:
        _, _, reader = a_cluster(1)
        with pytest.raises(InvalidRequest) as caught:
            await reader.scroll(
                "docs",
                filter=None,
                limit=limit,
                cursor=b"",
                with_vector=False,
                freshness=ANY,
                timeout_s=5,
            )
        assert (caught.value.field, caught.value.limit) == ("limit", "1 to 1000")

    asyncio.run(scenario())
