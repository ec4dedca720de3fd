"""The rpcs beside plain search through a real gRPC server and back."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.edge.admission import Admission
from shoal_protos.v1 import points_pb2, points_pb2_grpc, search_pb2, search_pb2_grpc, types_pb2
from tests.unit.edge.loopback import Loopback, detail_of, loopback, run
from tests.unit.edge.test_services import attributes_of, create, load

QUERY = np.array([1, 0, 0, 0], np.float32).tobytes()
NEAR = search_pb2.Example(vector=QUERY)


def search_at(at: Loopback) -> Any:
    return search_pb2_grpc.SearchStub(at.channel)


def points_at(at: Loopback) -> Any:
    return points_pb2_grpc.PointsStub(at.channel)


def hits_of(found: search_pb2.QueryHits) -> list[tuple[str, float]]:
    return [(i, round(score, 4)) for i, score in zip(found.rows.ids, found.scores, strict=True)]


def test_every_kind_answers_with_rows_positions_and_explain() -> None:
    """Three points: a and ç in section x, b in y; a near, ç between, b far."""

    async def scenario() -> None:
        async with loopback() as at:
            await create(at)
            await load(at)
            all_of_it: dict[str, Any] = {
                "collection": "docs",
                "with_payload": True,
                "with_vector": True,
                "explain": True,
            }
            recommended = await search_at(at).Recommend(
                search_pb2.RecommendRequest(positive=[search_pb2.Example(id="a")], k=5, **all_of_it)
            )
            assert hits_of(recommended.hits) == [("ç", 0.7071), ("b", 0.0)]
            assert attributes_of(recommended.hits.rows)[1]["section"] == "y"
            assert len(recommended.hits.rows.vectors) == 2 * 16
            vectors = np.frombuffer(recommended.hits.rows.vectors, np.float32).reshape(2, 4)
            np.testing.assert_allclose(vectors, [[1, 1, 0, 0], [0, 2, 0, 0]], rtol=1e-6)

            diverse = await search_at(at).SearchDiverse(
                search_pb2.SearchDiverseRequest(query=NEAR, k=3, mmr_lambda=1.0, **all_of_it)
            )
            assert hits_of(diverse.hits) == [("a", 1.0), ("ç", 0.7071), ("b", 0.0)]

            grouped = await search_at(at).SearchGroups(
                search_pb2.SearchGroupsRequest(
                    query=NEAR, group_by="section", groups=2, group_size=2, **all_of_it
                )
            )
            assert [(g.value.keyword, list(g.hits.rows.ids)) for g in grouped.groups] == [
                ("x", ["a", "ç"]),
                ("y", ["b"]),
            ]
            assert not grouped.bounded

            counted = await points_at(at).Facets(
                points_pb2.FacetsRequest(collection="docs", attribute="section", explain=True)
            )
            assert [(f.value.keyword, f.count) for f in counted.facets] == [("x", 2), ("y", 1)]
            assert (counted.rows, counted.missing, counted.distinct) == (3, 0, 2)
            flags = await points_at(at).Facets(
                points_pb2.FacetsRequest(collection="docs", attribute="good")
            )
            assert [(f.value.bool, f.count) for f in flags.facets] == [(True, 1)]
            assert flags.missing == 2 and not flags.HasField("explain")

            page = await points_at(at).ScrollOrdered(
                points_pb2.ScrollOrderedRequest(
                    order_by="size", descending=True, limit=2, **all_of_it
                )
            )
            assert list(page.rows.ids) == ["b", "ç"] and page.next_cursor
            page = await points_at(at).ScrollOrdered(
                points_pb2.ScrollOrderedRequest(
                    order_by="size", descending=True, limit=2, cursor=page.next_cursor, **all_of_it
                )
            )
            assert list(page.rows.ids) == ["a"] and not page.next_cursor

            messages = [
                message
                async for message in search_at(at).SearchRange(
                    search_pb2.SearchRangeRequest(query=NEAR, score_min=0.5, **all_of_it)
                )
            ]
            found = [hit for message in messages for hit in hits_of(message.hits)]
            assert found == [("a", 1.0), ("ç", 0.7071)]
            last = messages[-1]
            assert not last.cursor and not last.truncated
            for reply in (recommended, diverse, grouped, counted, page, last):
                assert len(reply.explain.shards) == 3 and reply.explain.stages
                assert reply.as_of.collection_id and len(reply.as_of.positions) >= 1

    run(scenario())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"query": search_pb2.Example()}, "query"),
        ({"query": search_pb2.Example(vector=QUERY[:7])}, "query"),
        ({"score_min": None}, "score_min"),
        ({"limit": 100_001}, "limit"),
        ({"consistency": 9}, "consistency"),
        ({"filter": types_pb2.Filter()}, "filter"),
    ],
)
def test_a_refused_stream_says_what_is_wrong(changes: dict[str, Any], field: str) -> None:
    async def scenario() -> None:
        async with loopback() as at:
            await create(at)
            fields = {"collection": "docs", "query": NEAR, "score_min": 0.5, **changes}
            stream = search_at(at).SearchRange(search_pb2.SearchRangeRequest(**fields))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert detail_of(caught.value).field == field

    run(scenario())


class Endless:
    """An Exploring whose ranges go on until somebody stops them, or fail."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.closed = asyncio.Event()

    async def search_range(self, request: Any, *, timeout_s: float) -> Any:
        from shoal_cluster.query.merge import no_hits
        from shoal_cluster.query.range_search import RangeHits
        from tests.unit.query.fake_cluster import a_schema

        try:
            for _ in range(10_000):
                yield RangeHits(
                    schema=a_schema(), hits=no_hits(1), cursor=b"c", as_of={}, staleness_ms=0
                )
                if self.failure is not None:
                    raise self.failure
        finally:
            self.closed.set()


ASKED = search_pb2.SearchRangeRequest(collection="docs", query=NEAR, score_min=0.5)


def test_a_caller_that_leaves_a_stream_ends_the_search() -> None:
    async def scenario() -> None:
        endless = Endless()
        async with loopback(exploring=endless) as at:
            stream = search_at(at).SearchRange(ASKED)
            assert (await stream.read()).cursor == b"c"
            stream.cancel()
            await endless.closed.wait()

    run(scenario())


def test_admission_counts_the_work_on_a_message_and_not_the_reading_of_it() -> None:
    async def scenario() -> None:
        admission = Admission(requests_max=1)
        async with loopback(admission, exploring=Endless()) as at:
            slow = search_at(at).SearchRange(ASKED)
            await slow.read()
            # Nobody reads `slow` now: flow control stops it between two messages, and others go on.
            for _ in range(3):
                other = search_at(at).SearchRange(ASKED)
                assert (await other.read()).cursor == b"c"
                other.cancel()
            with admission.admit(0), pytest.raises(grpc.aio.AioRpcError) as caught:
                while True:
                    await slow.read()
            assert detail_of(caught.value).kind == "overloaded"

    run(scenario())


@pytest.mark.parametrize(
    ("failure", "kind"), [(Unavailable("gone"), "unavailable"), (ValueError("bug"), "internal")]
)
def test_a_stream_that_fails_half_way_ends_with_a_typed_error(
    failure: Exception, kind: str
) -> None:
    async def scenario() -> None:
        async with loopback(exploring=Endless(failure)) as at:
            stream = search_at(at).SearchRange(ASKED)
            assert (await stream.read()).cursor == b"c"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert detail_of(caught.value).kind == kind

    run(scenario())
