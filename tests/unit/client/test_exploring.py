"""The calls beside plain search, by both clients, against a scripted server."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import shoal
from shoal import F
from shoal_protos.v1 import search_pb2
from tests.unit.client.conftest import Connect
from tests.unit.client.fake_server import FakeServer, break_off, hang, refuse

FAST = shoal.RetryPolicy(backoff_first_s=0.001, backoff_max_s=0.01)
LOST = break_off(grpc.StatusCode.UNAVAILABLE)


def test_examples_are_sent_as_ids_and_vectors(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes", model=("m", "1"))
    found = notes.recommend(["a", [1.0, 2.0]], [[0.5, 0.5]], k=7, filter=F("n") > 1, exact=True)
    assert found.ids == ["a", "b"]
    [sent] = server.requests["Recommend"]
    assert [each.WhichOneof("example") for each in sent.positive] == ["id", "vector"]
    assert len(sent.negative[0].vector) == 8
    assert (sent.k, sent.exact, sent.with_payload, sent.model.name) == (7, True, True, "m")
    assert sent.HasField("filter") and not sent.HasField("recall_target")
    notes.recommend("only")
    assert [each.id for each in server.requests["Recommend"][1].positive] == ["only"]
    with pytest.raises(shoal.InvalidRequest) as refused:
        notes.recommend(["a", ["no number"]])
    assert refused.value.field == "positive[1]"


def test_a_diverse_search_sends_what_it_was_told(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    assert notes.search_diverse("a", k=3, mmr_lambda=0.0, candidates=9).ids == ["a", "b"]
    notes.search_diverse([1.0, 0.0])
    first, second = server.requests["SearchDiverse"]
    assert (first.query.id, first.k, first.candidates) == ("a", 3, 9)
    assert first.HasField("mmr_lambda") and first.mmr_lambda == 0.0
    assert (second.candidates, second.mmr_lambda) == (0, 0.5)
    with pytest.raises(shoal.InvalidRequest) as refused:
        notes.search_diverse("a", candidates=0)
    assert refused.value.field == "candidates"


def test_groups_are_read_with_their_values(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    found = notes.search_groups([1.0, 0.0], group_by="section", groups=4, group_size=2)
    assert found.bounded and [group.value for group in found] == ["net"]
    assert [hit.id for hit in found.groups[0]] == ["a", "b"]
    [sent] = server.requests["SearchGroups"]
    assert (sent.group_by, sent.groups, sent.group_size) == ("section", 4, 2)


def test_facets_are_read_with_typed_values(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    found = notes.facets("section", limit=4, filter=F("n") > 1, consistency="strong")
    assert [facet.value for facet in found] == ["net", -3, False, 7]
    assert found.as_dict()["net"] == 9
    assert (found.rows, found.missing, found.distinct) == (40, 4, 5)
    [sent] = server.requests["Facets"]
    assert (sent.attribute, sent.limit, sent.HasField("session")) == ("section", 4, False)


def test_an_ordered_scroll_follows_its_cursors(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    points = notes.scroll(order_by="size", descending=True, page_size=5)
    assert [point.id for point in points] == ["o0", "o1"]
    first, second = server.requests["ScrollOrdered"]
    assert (first.order_by, first.descending, first.limit) == ("size", True, 5)
    assert (first.cursor, second.cursor) == (b"", b"1")
    assert not server.requests["Scroll"]


def test_sessions_grow_with_every_kind_of_read(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    seq = notes.upsert(ids=["a"], vectors=[[1, 0]]).session.positions[0].seq
    notes.facets("section")
    notes.recommend("a")
    notes.search_groups("a", group_by="section")
    notes.search_diverse("a")
    notes.scroll_page(order_by="size")
    for name in ("Facets", "Recommend", "SearchGroups", "SearchDiverse", "ScrollOrdered"):
        [sent] = server.requests[name]
        assert sent.session.positions[0].seq >= seq, name


# ----------------------------------------------------------------------------- range streams

Ask = Callable[..., list[str]]
"""Runs a range search on a collection of a client with these options; returns the ids."""


@pytest.fixture(params=["sync", "asyncio"])
def within(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Ask]:
    def ask_sync(*addresses: str, hits: list[Any] | None = None, **options: Any) -> list[str]:
        timeout_s = options.pop("timeout_s", 20)
        addresses = addresses or (server.address,)
        with shoal.Client(addresses, retries=FAST, timeout_s=timeout_s) as client:
            notes = client.collection("notes")
            found = notes.search_range([1.0, 0.0], **{"distance_max": 2.0, **options})
            ids = [hit.id for hit in found]
            assert found.truncated
            if hits is not None:
                hits.extend([found, notes.session])
            return ids

    def ask_asyncio(*addresses: str, hits: list[Any] | None = None, **options: Any) -> list[str]:
        async def ask() -> list[str]:
            timeout_s = options.pop("timeout_s", 20)
            known = addresses or (server.address,)
            async with shoal.AsyncClient(known, retries=FAST, timeout_s=timeout_s) as client:
                notes = client.collection("notes")
                found = notes.search_range([1.0, 0.0], **{"distance_max": 2.0, **options})
                ids = [hit.id async for hit in found]
                assert found.truncated
                if hits is not None:
                    hits.extend([found, notes.session])
                return ids

        return asyncio.run(ask())

    yield ask_sync if request.param == "sync" else ask_asyncio


EVERYTHING = [f"r{n}" for n in range(5)]


def test_a_range_yields_its_hits_and_what_was_asked_is_sent(
    within: Ask, server: FakeServer
) -> None:
    seen: list[Any] = []
    assert within(hits=seen, limit=50, filter=F("n") > 1, with_vector=True) == EVERYTHING
    sent = server.requests["SearchRange"][0]
    assert sent.WhichOneof("bound") == "distance_max"
    assert (sent.limit, sent.with_vector, sent.HasField("filter")) == (50, True, True)
    found, session = seen
    assert found.as_of.positions[0].seq == 9 and session.positions[0].seq == 9
    assert found.explain is None and found.staleness_ms == 0
    assert within(distance_max=None, score_min=0.0) == EVERYTHING
    assert server.requests["SearchRange"][-1].WhichOneof("bound") == "score_min"


@pytest.mark.parametrize("broken", [0, 1, 3])
def test_a_lost_stream_goes_on_behind_the_last_message(
    within: Ask, server: FakeServer, broken: int
) -> None:
    def fine(_request: Any, _context: Any) -> None:
        return None

    server.script["SearchRange"].extend([*[fine] * broken, LOST, LOST])
    assert within() == EVERYTHING
    cursors = [sent.cursor for sent in server.requests["SearchRange"]]
    assert (str(broken).encode() if broken else b"") in cursors
    resumed = [sent for sent in server.requests["SearchRange"] if sent.cursor]
    assert all(sent.session.positions[0].seq >= int(sent.cursor) for sent in resumed)


def test_a_stream_goes_on_at_another_coordinator(
    within: Ask, server: FakeServer, other_server: FakeServer
) -> None:
    server.script["SearchRange"].extend([lambda *_: None, LOST])
    assert within(server.address, other_server.address) == EVERYTHING
    assert other_server.requests["SearchRange"][0].cursor == b"1"


def test_a_refused_range_is_raised_at_once(within: Ask, server: FakeServer) -> None:
    server.script["SearchRange"].append(refuse("invalid_request", field="distance_max"))
    with pytest.raises(shoal.InvalidRequest) as refused:
        within()
    assert refused.value.field == "distance_max"
    assert len(server.requests["SearchRange"]) == 1


def test_a_range_that_is_never_answered_ends_in_time(within: Ask, server: FakeServer) -> None:
    server.script["SearchRange"].extend([hang] * 10)
    with pytest.raises(shoal.Unavailable):
        within(timeout_s=0.7)


def test_a_range_must_be_bounded_once_and_by_a_limit_that_exists(
    within: Ask, server: FakeServer
) -> None:
    for options, field in (
        ({"distance_max": None}, "score_min"),
        ({"score_min": 1.0}, "score_min"),
        ({"limit": 0}, "limit"),
        ({"limit": 100_001}, "limit"),
    ):
        with pytest.raises(shoal.InvalidRequest) as refused:
            within(**options)  # type: ignore[arg-type]
        assert refused.value.field == field
    assert not server.requests["SearchRange"]


def test_a_range_may_be_left_early(server: FakeServer) -> None:
    with shoal.Client(server.address) as client:
        found = client.collection("notes").search_range([1.0, 0.0], distance_max=2.0)
        assert next(found).id == "r0"

    async def leave() -> None:
        async with shoal.AsyncClient(server.address) as client:
            found = client.collection("notes").search_range([1.0, 0.0], distance_max=2.0)
            assert (await anext(found)).id == "r0"
            await found.aclose()

    asyncio.run(leave())


def test_a_stream_that_ends_without_its_last_message_is_not_taken_for_complete(
    within: Ask, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that cuts streams off cleanly must not cut off hits."""
    from tests.unit.client import fake_server

    whole = fake_server._Search.SearchRange
    cut = [2, 1]

    def short(self: Any, request: Any, context: Any) -> Iterator[search_pb2.SearchRangeResponse]:
        messages = list(whole(self, request, context))
        yield from messages[: cut.pop(0)] if cut else messages

    monkeypatch.setattr(fake_server._Search, "SearchRange", short)
    other = FakeServer()
    try:
        assert within(other.address) == EVERYTHING
    finally:
        other.stop()
