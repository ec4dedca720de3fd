"""Both clients against a scripted server on loopback: retries, deadlines, sessions, uploads."""

import asyncio
import inspect
import itertools
import time
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest

import shoal
from shoal import F, Point
from shoal_protos.v1 import types_pb2
from tests.unit.client.conftest import Connect
from tests.unit.client.fake_server import (
    FakeServer,
    break_off,
    break_stream,
    fail_chunk,
    hang,
    ignore,
    refuse,
)

FAST = shoal.RetryPolicy(backoff_first_s=0.001, backoff_max_s=0.01)
LOST = grpc.StatusCode.UNAVAILABLE


def request_ids(server: FakeServer, name: str) -> list[tuple[str, int]]:
    return [(r.request_id.client_id, r.request_id.request_no) for r in server.requests[name]]


# ----------------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "failure",
    [
        refuse("unavailable"),
        refuse("not_primary"),
        refuse("overloaded", retry_after_ms=1),
        refuse("indeterminate", maybe_applied=True),
        break_off(LOST),
        break_off(grpc.StatusCode.CANCELLED),
        break_off(grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_a_write_is_retried_with_the_same_request_id(
    connect: Connect, server: FakeServer, failure: Any
) -> None:
    server.script["Upsert"].extend([failure] * 3)
    notes = connect(server.address, retries=FAST).collection("notes")
    result = notes.upsert(ids=["a"], vectors=[[1, 0]])
    assert len(result.seqs) == 1
    ids = request_ids(server, "Upsert")
    assert len(ids) == 4
    assert len(set(ids)) == 1


def test_request_numbers_increase_from_write_to_write(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    for n in range(3):
        notes.upsert(Point(id=str(n), vector=[1, 0]))
    notes.delete(["0"])
    ids = request_ids(server, "Upsert") + request_ids(server, "Delete")
    assert [number for _, number in ids] == [1, 2, 3, 4]
    assert len({client_id for client_id, _ in ids}) == 1


def test_two_clients_never_share_request_ids(connect: Connect, server: FakeServer) -> None:
    for _ in range(2):
        connect(server.address).collection("notes").delete("a")
    assert len(set(request_ids(server, "Delete"))) == 2


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("invalid_request", shoal.InvalidRequest),
        ("unauthenticated", shoal.Unauthenticated),
        ("permission_denied", shoal.PermissionDenied),
        ("not_found", shoal.NotFound),
        ("already_exists", shoal.AlreadyExists),
        ("conflict", shoal.Conflict),
        ("corrupt", shoal.Corrupt),
        ("internal", shoal.Internal),
    ],
)
def test_a_definite_refusal_is_raised_at_once_as_its_kind(
    connect: Connect, server: FakeServer, kind: str, raised: type[shoal.ShoalError]
) -> None:
    server.script["Search"].append(refuse(kind, field="k", limit="1 to 1000"))
    with pytest.raises(raised) as caught:
        connect(server.address).collection("notes").search([1, 0])
    error = caught.value
    assert type(error) is raised
    assert (error.field, error.limit, error.outcome) == ("k", "1 to 1000", "not_applied")
    assert f"scripted {kind}" in str(error)
    assert len(server.requests["Search"]) == 1


def test_the_servers_outcome_is_kept(connect: Connect, server: FakeServer) -> None:
    server.script["Upsert"].append(refuse("conflict", maybe_applied=True))
    with pytest.raises(shoal.Conflict) as caught:
        connect(server.address).collection("notes").upsert(ids=["a"], vectors=[[1, 0]])
    assert caught.value.outcome == "maybe_applied"


def test_overloaded_is_waited_out_as_long_as_the_server_asks(
    connect: Connect, server: FakeServer
) -> None:
    server.script["Search"].append(refuse("overloaded", retry_after_ms=150))
    notes = connect(server.address, retries=FAST).collection("notes")
    start_s = time.monotonic()
    notes.search([1, 0])
    assert time.monotonic() - start_s >= 0.15
    assert len(server.requests["Search"]) == 2


def test_overloaded_for_longer_than_the_deadline_is_raised_at_once(
    connect: Connect, server: FakeServer
) -> None:
    server.script["Search"].append(refuse("overloaded", retry_after_ms=60_000))
    start_s = time.monotonic()
    with pytest.raises(shoal.Overloaded) as caught:
        connect(server.address).collection("notes").search([1, 0], timeout_s=20)
    assert caught.value.retry_after_ms == 60_000
    assert time.monotonic() - start_s < 5


# ----------------------------------------------------------------------------- deadlines


def test_a_read_that_is_never_answered_ends_unavailable_in_time(
    connect: Connect, server: FakeServer
) -> None:
    server.script["Search"].extend([hang] * 10)
    start_s = time.monotonic()
    with pytest.raises(shoal.Unavailable) as caught:
        connect(server.address).collection("notes").search([1, 0], timeout_s=0.7)
    assert 0.4 < time.monotonic() - start_s < 2.0
    assert caught.value.outcome == "not_applied"
    assert "deadline_exceeded" in str(caught.value)


def test_a_write_that_is_never_answered_ends_indeterminate_with_one_request_id(
    connect: Connect, server: FakeServer
) -> None:
    server.script["Upsert"].extend([hang] * 10)
    start_s = time.monotonic()
    with pytest.raises(shoal.Indeterminate) as caught:
        connect(server.address).collection("notes").upsert(
            ids=["a"], vectors=[[1, 0]], timeout_s=1.2
        )
    assert time.monotonic() - start_s < 2.5
    assert caught.value.outcome == "maybe_applied"
    assert caught.value.attempts >= 2
    assert len(set(request_ids(server, "Upsert"))) == 1


def test_a_write_lost_on_the_way_and_then_refused_stays_uncertain(
    connect: Connect, server: FakeServer
) -> None:
    server.script["Upsert"].append(break_off(LOST))
    server.script["Upsert"].extend([refuse("unavailable")] * 500)
    with pytest.raises(shoal.Indeterminate):
        connect(server.address, retries=FAST, timeout_s=0.3).collection("notes").upsert(
            ids=["a"], vectors=[[1, 0]]
        )


def test_the_server_is_told_how_long_the_client_waits(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address, timeout_s=8).collection("notes")
    notes.search([1, 0])
    notes.search([1, 0], timeout_s=2)
    first_s, second_s = server.times_left_s["Search"]
    assert 2 < first_s <= 4.1
    assert 0.5 < second_s <= 1.1


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(
    connect: Connect, server: FakeServer, timeout_s: float
) -> None:
    with pytest.raises(shoal.InvalidRequest, match="timeout_s"):
        connect(server.address).collection("notes").count(timeout_s=timeout_s)


def test_nobody_at_the_address_is_unavailable(connect: Connect, server: FakeServer) -> None:
    server.stop()
    with pytest.raises(shoal.Unavailable, match=server.address):
        connect(server.address, timeout_s=0.3).list_collections()


# ----------------------------------------------------------------------------- failover


def test_a_call_fails_over_to_the_next_address_and_stays_there(
    connect: Connect, server: FakeServer, other_server: FakeServer
) -> None:
    server.script["Upsert"].append(break_off(LOST))
    notes = connect([server.address, other_server.address], retries=FAST).collection("notes")
    notes.upsert(ids=["a"], vectors=[[1, 0]])
    notes.upsert(ids=["b"], vectors=[[1, 0]])
    assert len(server.requests["Upsert"]) == 1
    first, second = request_ids(other_server, "Upsert")
    assert [first] == request_ids(server, "Upsert")
    assert second[1] == first[1] + 1


def test_a_hung_coordinator_is_left_for_another_within_the_deadline(
    connect: Connect, server: FakeServer, other_server: FakeServer
) -> None:
    server.script["Search"].append(hang)
    notes = connect([server.address, other_server.address]).collection("notes")
    assert notes.search([1, 0], timeout_s=2).ids == ["a", "b"]


def test_a_stopped_coordinator_is_left_for_another(
    connect: Connect, server: FakeServer, other_server: FakeServer
) -> None:
    notes = connect([server.address, other_server.address], retries=FAST).collection("notes")
    notes.count()
    server.stop()
    assert notes.count() == 42


# ----------------------------------------------------------------------------- sessions


def test_a_client_reads_its_own_writes(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    notes.search([1, 0])
    written = notes.upsert(ids=["a"], vectors=[[1, 0]])
    notes.search([1, 0])
    before, after = server.requests["Search"]
    assert before.consistency == types_pb2.CONSISTENCY_SESSION
    (position,) = after.session.positions
    assert (position.epoch, position.seq) == written.session.positions[0]


def test_reads_never_go_back(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    notes.delete(["a"])
    read = notes.get(["a"])
    notes.count()
    (position,) = server.requests["Count"][0].session.positions
    assert (position.epoch, position.seq) >= read.as_of.positions[0]
    assert notes.session.positions[0] == (position.epoch, position.seq)


@pytest.mark.parametrize("consistency", ["eventual", "strong"])
def test_the_other_levels_carry_no_token(
    connect: Connect, server: FakeServer, consistency: Any
) -> None:
    notes = connect(server.address).collection("notes")
    notes.delete(["a"])
    notes.search([1, 0], consistency=consistency)
    (request,) = server.requests["Search"]
    assert request.consistency == getattr(types_pb2, f"CONSISTENCY_{consistency.upper()}")
    assert not request.HasField("session")


def test_a_dropped_collection_takes_its_session_along(connect: Connect, server: FakeServer) -> None:
    client = connect(server.address)
    client.collection("notes").delete(["a"])
    client.drop_collection("notes")
    assert client.collection("notes").session == shoal.SessionToken()


# ----------------------------------------------------------------------------- requests


def test_create_collection_sends_the_schema_and_returns_a_handle(
    connect: Connect, server: FakeServer
) -> None:
    notes = connect(server.address).create_collection(
        "notes",
        dimension=2,
        attributes={"section": "keyword"},
        partition_by="section",
        shards=4,
        replicas=2,
        recall_target=0.98,
        model=("mini", "2"),
        storage="float16",
        tier="disk",
        recall_sample_share=0.5,
    )
    (request,) = server.requests["CreateCollection"]
    assert request.schema.metric == types_pb2.METRIC_COSINE
    assert (request.schema.shards, request.schema.recall_target) == (4, 0.98)
    assert request.schema.storage == types_pb2.VECTOR_STORAGE_FLOAT16
    assert request.schema.tier == types_pb2.MEMORY_TIER_DISK
    assert request.schema.recall_sample_share == 0.5
    notes.search([1, 0])
    assert server.requests["Search"][0].model == types_pb2.EmbeddingModel(name="mini", version="2")


def test_a_budget_is_sent_instead_of_a_recall(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    notes.search([1.0, 2.0], max_cost_ms=0.25)
    notes.search([1.0, 2.0], max_cost_ms=0.5)
    notes.search_batch([[1.0, 2.0]], max_cost_ms=0.5)
    notes.search_by_id("a", max_cost_ms=2)
    notes.search([1.0, 2.0])
    sent = server.requests["Search"]
    assert [request.max_cost_ms for request in sent] == [0.25, 0.5, 0.5, 2.0, 0.0]
    assert not sent[-1].HasField("max_cost_ms")
    assert not any(request.HasField("recall_target") for request in sent)


def test_a_search_sends_everything_it_was_asked_with(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    result = notes.search(
        np.float64([1, 2]),
        k=7,
        filter=F("year") >= 2020,
        exact=True,
        recall_target=0.99,
        with_payload=False,
        with_vector=True,
        explain=True,
    )
    (request,) = server.requests["Search"]
    assert request.vectors == np.float32([1, 2]).tobytes() and request.dimension == 2
    assert (request.k, request.exact, request.recall_target) == (7, True, 0.99)
    assert (request.with_payload, request.with_vector, request.explain) == (False, True, True)
    assert request.filter.comparison.attribute == "year"
    assert [hit.id for hit in result] == ["a", "b"] and result.staleness_ms == 3


def test_batch_and_stored_queries_travel_in_one_request(
    connect: Connect, server: FakeServer
) -> None:
    notes = connect(server.address).collection("notes")
    assert len(notes.search_batch(np.ones((5, 3), dtype=np.float16))) == 5
    assert len(notes.search_batch(ids=["a", "b"])) == 2
    assert notes.search_by_id("a").ids == ["a", "b"]
    batch, stored, single = server.requests["Search"]
    assert len(batch.vectors) == 5 * 3 * 4
    assert (list(stored.ids), stored.vectors) == (["a", "b"], b"")
    assert list(single.ids) == ["a"]


def test_scroll_follows_the_cursor_to_the_end(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    assert [point.id for point in notes.scroll(page_size=2)] == ["p0", "p1", "p2", "p3", "p4"]
    assert [request.cursor for request in server.requests["Scroll"]] == [b"", b"2", b"4"]


def test_patch_sets_and_removes(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    result = notes.patch_attributes(["a", "b"], {"year": 2024}, remove=["draft"])
    (request,) = server.requests["PatchAttributes"]
    assert list(request.set[0].int.values) == [2024, 2024]
    assert list(request.remove) == ["draft"]
    assert result.missing_ids == ["b"]


def test_delete_where_sends_the_filter(connect: Connect, server: FakeServer) -> None:
    assert connect(server.address).collection("notes").delete_where(F("a") == 1).deleted == 2
    assert server.requests["DeleteByFilter"][0].filter.comparison.attribute == "a"


@pytest.mark.parametrize(
    "ask",
    [
        lambda notes: notes.search([[1, 0]]),
        lambda notes: notes.search([1, 0], k="ten"),
        lambda notes: notes.search([1, 0], k=-1),
        lambda notes: notes.search([1, 0], filter="year > 2"),
        lambda notes: notes.search([1, 0], consistency="linear"),
        lambda notes: notes.search_batch(),
        lambda notes: notes.search_batch([[1, 0]], ids=["a"]),
        lambda notes: notes.upsert(ids=["a"], vectors=[[1, 0], [1, 0]]),
        lambda notes: notes.upsert(ids=["\ud800"], vectors=[[1, 0]]),
        lambda notes: notes.get([1]),
        lambda notes: notes.patch_attributes(["a"], [{}, {}]),
        lambda notes: notes.bulk_upsert(ids=["a"], vectors=[[1, 0]], batch_size=0),
    ],
)
def test_what_cannot_be_sent_is_refused_before_sending(
    connect: Connect, server: FakeServer, ask: Any
) -> None:
    with pytest.raises(shoal.InvalidRequest) as caught:
        ask(connect(server.address).collection("notes"))
    assert caught.value.field
    assert caught.value.outcome == "not_applied"
    assert not any(server.requests.values())


def test_a_request_above_the_size_limit_is_refused_with_the_limit(
    connect: Connect, server: FakeServer
) -> None:
    notes = connect(server.address).collection("notes")
    with pytest.raises(shoal.InvalidRequest) as caught:
        notes.upsert(ids=["a"], vectors=[[1, 0]], payloads=[b"x" * (33 * 1024 * 1024)])
    assert "33554432 bytes" in (caught.value.limit or "")


def test_a_closed_client_says_so(connect: Connect, server: FakeServer) -> None:
    client = connect(server.address)
    client.collection("notes").count()
    client.close()
    client.close()
    with pytest.raises(shoal.InvalidRequest, match="closed"):
        client.collection("notes").count()


def test_closing_the_client_ends_a_write_in_flight_as_indeterminate(server: FakeServer) -> None:
    server.script["Upsert"].append(hang)
    client = shoal.Client(server.address)
    with futures.ThreadPoolExecutor(max_workers=1) as pool:
        write = pool.submit(client.collection("notes").upsert, ids=["a"], vectors=[[1, 0]])
        server.wait_for("Upsert")
        client.close()
        assert isinstance(write.exception(timeout=5), shoal.Indeterminate)


def test_closing_the_asyncio_client_ends_a_write_in_flight_as_indeterminate(
    server: FakeServer,
) -> None:
    async def scenario() -> None:
        client = shoal.AsyncClient(server.address)
        notes = client.collection("notes")
        write = asyncio.create_task(notes.upsert(ids=["a"], vectors=[[1, 0]]))
        await asyncio.to_thread(server.wait_for, "Upsert")
        await client.close()
        with pytest.raises(shoal.Indeterminate):
            await asyncio.wait_for(write, 5)

    server.script["Upsert"].append(hang)
    asyncio.run(scenario())


def test_cancelling_an_asyncio_call_cancels_it(server: FakeServer) -> None:
    async def scenario() -> None:
        async with shoal.AsyncClient(server.address) as client:
            search = asyncio.create_task(client.collection("notes").search([1, 0]))
            await asyncio.to_thread(server.wait_for, "Search")
            search.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(search, 5)

    server.script["Search"].append(hang)
    asyncio.run(scenario())


# ----------------------------------------------------------------------------- bulk upload


def test_bulk_upsert_reports_progress_and_keeps_to_the_window(
    connect: Connect, server: FakeServer
) -> None:
    server.window, server.chunks_before_answer = 3, 3
    told: list[tuple[int, int | None]] = []
    notes = connect(server.address).collection("notes")
    done = notes.bulk_upsert(
        ids=[f"p{n}" for n in range(100)],
        vectors=np.ones((100, 2)),
        batch_size=10,
        in_flight=8,
        progress=lambda rows, total: told.append((rows, total)),
    )
    assert done == 100
    assert told == [(n, 100) for n in range(10, 101, 10)]
    assert server.chunks_unacknowledged_max == 3
    assert sorted(c.upsert.request_id.request_no for c in server.requests["chunk"]) == list(
        range(1, 11)
    )


def test_bulk_upsert_reads_an_endless_source_no_further_than_it_may(
    connect: Connect, server: FakeServer
) -> None:
    taken = itertools.count()
    points = (Point(id=f"p{next(taken)}", vector=[1, 0]) for _ in range(10**9))
    server.stream_chunks.extend([lambda _chunk: None] * 3 + [fail_chunk("invalid_request")] * 9)
    notes = connect(server.address).collection("notes")
    with pytest.raises(shoal.InvalidRequest, match="after 30 rows"):
        notes.bulk_upsert(points, batch_size=10, in_flight=2)
    assert next(taken) <= (3 + 1 + 2) * 10


def test_chunks_of_a_broken_stream_go_again_with_their_request_ids(
    connect: Connect, server: FakeServer, other_server: FakeServer
) -> None:
    server.stream_chunks.extend([lambda _chunk: None] * 2 + [break_stream])
    notes = connect([server.address, other_server.address], retries=FAST).collection("notes")
    points = [Point(id=f"p{n}", vector=[1, 0]) for n in range(60)]
    assert notes.bulk_upsert(points, batch_size=10) == 60
    chunks = server.requests["chunk"] + other_server.requests["chunk"]
    numbers: dict[int, set[int]] = {}
    for chunk in chunks:
        numbers.setdefault(chunk.chunk_no, set()).add(chunk.upsert.request_id.request_no)
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    assert all(len(request_nos) == 1 for request_nos in numbers.values())
    assert len(chunks) > 6
    assert other_server.requests["chunk"]


def test_refused_streams_are_opened_again(connect: Connect, server: FakeServer) -> None:
    server.script["UpsertStream"].extend([break_off(LOST), refuse("unavailable")])
    notes = connect(server.address, retries=FAST).collection("notes")
    assert notes.bulk_upsert([Point(id="a", vector=[1, 0])]) == 1
    assert len(server.requests["UpsertStream"]) == 3


def test_overloaded_chunks_wait_and_go_again(connect: Connect, server: FakeServer) -> None:
    server.stream_chunks.append(fail_chunk("overloaded", retry_after_ms=100))
    notes = connect(server.address, retries=FAST).collection("notes")
    start_s = time.monotonic()
    assert notes.bulk_upsert([Point(id="a", vector=[1, 0])]) == 1
    assert time.monotonic() - start_s >= 0.1
    assert len(server.requests["chunk"]) == 2


def test_a_silent_stream_is_given_up_and_the_upload_ends_in_time(
    connect: Connect, server: FakeServer
) -> None:
    server.stream_chunks.extend([ignore] * 20)
    notes = connect(server.address, retries=FAST).collection("notes")
    start_s = time.monotonic()
    with pytest.raises(shoal.Indeterminate) as caught:
        notes.bulk_upsert([Point(id="a", vector=[1, 0])], timeout_s=1.2)
    assert time.monotonic() - start_s < 4
    assert caught.value.outcome == "maybe_applied"
    assert len({c.upsert.request_id.request_no for c in server.requests["chunk"]}) == 1


def test_bulk_upsert_of_a_faulty_point_names_it(connect: Connect, server: FakeServer) -> None:
    points = [Point(id=str(n), vector=[1, 0]) for n in range(30)] + [Point(id="x")]
    with pytest.raises(shoal.InvalidRequest) as caught:
        connect(server.address).collection("notes").bulk_upsert(points, batch_size=10)
    assert caught.value.field == "points[30].vector"


def test_a_bulk_upload_is_part_of_the_session(connect: Connect, server: FakeServer) -> None:
    notes = connect(server.address).collection("notes")
    notes.bulk_upsert([Point(id="a", vector=[1, 0])])
    assert notes.session.positions


# ----------------------------------------------------------------------------- surface


@pytest.mark.parametrize(
    ("sync", "asyncio_twin"),
    [(shoal.Client, shoal.AsyncClient), (shoal.Collection, shoal.AsyncCollection)],
)
def test_both_clients_have_the_same_surface(sync: type, asyncio_twin: type) -> None:
    def surface(cls: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [
                (parameter.name, parameter.kind, parameter.default)
                for parameter in inspect.signature(member).parameters.values()
            ]
            for name, member in inspect.getmembers(cls, callable)
            if not name.startswith("_")
        }

    assert surface(sync) == surface(asyncio_twin)
    assert surface(sync)
