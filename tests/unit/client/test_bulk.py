"""The bulk upload's state machine: window, retries and count. Nothing here sleeps or sends."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.bulk import BulkUpload, Upload
from shoal.errors import Indeterminate, InvalidRequest, ShoalError
from shoal.retry import Retries
from shoal_protos.v1 import points_pb2, types_pb2
from tests.unit.client.fake_server import detail

LOST = Indeterminate("stream lost", outcome="maybe_applied")


def requests(count: int, taken: list[int] | None = None) -> Iterator[points_pb2.UpsertRequest]:
    for number in range(1, count + 1):
        if taken is not None:
            taken.append(number)
        yield points_pb2.UpsertRequest(
            request_id=types_pb2.RequestId(client_id="me", request_no=number),
            rows=types_pb2.Rows(ids=[f"{number}-{row}" for row in range(10)]),
        )


def upload(
    count: int,
    *,
    in_flight: int = 4,
    timeout_s: float = 10.0,
    taken: list[int] | None = None,
    told: list[tuple[int, int | None]] | None = None,
) -> BulkUpload:
    work = Upload(
        requests=requests(count, taken),
        rows_total=count * 10,
        on_reply=lambda reply: None,
        progress=None if told is None else lambda done, total: told.append((done, total)),
    )
    retries = Retries(random=Random(1))
    return BulkUpload(work, in_flight=in_flight, timeout_s=timeout_s, retries=retries)


def ack(chunk_no: int, window: int = 4) -> points_pb2.UpsertStreamResponse:
    return points_pb2.UpsertStreamResponse(
        chunk_no=chunk_no, upserted=points_pb2.UpsertResponse(), window=window
    )


def drain(bulk: BulkUpload, now_s: float) -> list[points_pb2.UpsertStreamRequest]:
    chunks = []
    while (chunk := bulk.next_chunk(now_s)) is not None:
        chunks.append(chunk)
    return chunks


def test_one_chunk_goes_before_the_server_tells_its_window() -> None:
    bulk = upload(10)
    assert [c.chunk_no for c in drain(bulk, 0.0)] == [1]
    bulk.replied(ack(1, window=3), 0.0)
    assert [c.chunk_no for c in drain(bulk, 0.0)] == [2, 3, 4]


def test_the_window_never_opens_wider_than_in_flight() -> None:
    bulk = upload(10, in_flight=2)
    drain(bulk, 0.0)
    bulk.replied(ack(1, window=100), 0.0)
    assert len(drain(bulk, 0.0)) == 2


def test_a_shrunk_window_holds_chunks_back() -> None:
    bulk = upload(10)
    drain(bulk, 0.0)
    bulk.replied(ack(1, window=4), 0.0)
    drain(bulk, 0.0)
    bulk.replied(ack(2, window=1), 0.0)
    bulk.replied(ack(3, window=1), 0.0)
    assert drain(bulk, 0.0) == []


def test_an_overloaded_chunk_goes_again_when_due_with_its_first_request_id() -> None:
    bulk = upload(1)
    (first,) = drain(bulk, 0.0)
    refusal = points_pb2.UpsertStreamResponse(
        chunk_no=1, error=detail("overloaded", retry_after_ms=200), window=4
    )
    bulk.replied(refusal, 0.0)
    assert drain(bulk, 0.0) == []
    assert 0.2 <= bulk.wait_s(0.0) <= 0.25
    (again,) = drain(bulk, 0.3)
    assert again == first
    bulk.replied(ack(1), 0.3)
    assert drain(bulk, 0.3) == []
    assert bulk.is_done and bulk.rows_done == 10


def test_a_lost_stream_sends_every_unacknowledged_chunk_again_with_its_request_id() -> None:
    bulk = upload(4)
    sent = drain(bulk, 0.0)
    bulk.replied(ack(1), 0.0)
    sent += drain(bulk, 0.0)
    bulk.stream_lost(LOST, 0.0)
    again = drain(bulk, 1.0)
    assert len(again) == 1, "a new stream starts with a window of 1"
    bulk.replied(ack(again[0].chunk_no), 1.0)
    again += drain(bulk, 1.0)
    numbers = {c.chunk_no: c.upsert.request_id.request_no for c in sent}
    assert {c.chunk_no: c.upsert.request_id.request_no for c in again} == {
        n: numbers[n] for n in (2, 3, 4)
    }
    assert all(c.upsert.request_id.again for c in again), "they may have been applied"
    assert not any(c.upsert.request_id.again for c in sent)


def test_waiting_chunks_count_against_in_flight_so_the_source_is_not_read_ahead() -> None:
    taken: list[int] = []
    bulk = upload(100, in_flight=4, taken=taken)
    drain(bulk, 0.0)
    bulk.replied(ack(1), 0.0)
    for chunk in drain(bulk, 0.0):
        bulk.replied(
            points_pb2.UpsertStreamResponse(
                chunk_no=chunk.chunk_no,
                error=detail("overloaded", retry_after_ms=500),
                window=4,
            ),
            0.0,
        )
    assert drain(bulk, 0.1) == []
    assert len(taken) == 5


def test_a_chunk_that_cannot_be_retried_ends_the_upload_and_says_how_far_it_came() -> None:
    bulk = upload(3)
    drain(bulk, 0.0)
    bulk.replied(ack(1), 0.0)
    drain(bulk, 0.0)
    refusal = points_pb2.UpsertStreamResponse(
        chunk_no=2, error=detail("invalid_request", field="points[1].id"), window=4
    )
    with pytest.raises(InvalidRequest, match="after 10 of 30 rows") as caught:
        bulk.replied(refusal, 0.0)
    assert caught.value.field == "points[1].id"


def test_a_chunk_whose_time_is_up_is_indeterminate() -> None:
    bulk = upload(1, timeout_s=5.0)
    drain(bulk, 0.0)
    with pytest.raises(Indeterminate) as caught:
        bulk.stream_lost(LOST, 4.999)
    assert caught.value.outcome == "maybe_applied"


def test_a_silent_server_is_noticed() -> None:
    bulk = upload(1, timeout_s=10.0)
    drain(bulk, 0.0)
    assert bulk.wait_s(0.0) == 5.0
    assert not bulk.is_stalled(4.9)
    assert bulk.is_stalled(5.0)


def test_a_second_acknowledgement_of_a_chunk_counts_nothing() -> None:
    told: list[tuple[int, int | None]] = []
    bulk = upload(2, told=told)
    drain(bulk, 0.0)
    bulk.replied(ack(1), 0.0)
    bulk.replied(ack(1), 0.0)
    drain(bulk, 0.0)
    bulk.replied(ack(2), 0.0)
    assert told == [(10, 20), (20, 20)]


def test_nothing_to_upload_is_done_at_once() -> None:
    bulk = upload(0)
    assert bulk.next_chunk(0.0) is None
    assert bulk.is_done


def test_a_number_in_flight_out_of_range_is_refused() -> None:
    for in_flight in (0, 17):
        with pytest.raises(InvalidRequest, match="in_flight"):
            upload(1, in_flight=in_flight)


@given(
    count=st.integers(0, 12),
    in_flight=st.integers(1, 5),
    choices=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=150),
)
@settings(max_examples=200, deadline=None)
def test_under_any_schedule_the_bounds_hold_and_every_row_is_counted_once(
    count: int, in_flight: int, choices: list[tuple[int, int]]
) -> None:
    """U-1, U-2, U-3: random acknowledgements, refusals, losses and windows, then peace."""
    bulk = upload(count, in_flight=in_flight, timeout_s=1e9)
    ids: dict[int, int] = {}
    outstanding: list[int] = []
    now_s, window = 0.0, 1

    def send() -> None:
        for chunk in drain(bulk, now_s):
            request_no = chunk.upsert.request_id.request_no
            assert ids.setdefault(chunk.chunk_no, request_no) == request_no
            outstanding.append(chunk.chunk_no)
            assert len(outstanding) <= min(window, in_flight)

    try:
        for action, pick in choices:
            now_s += 3.0
            send()
            if action == 0:
                bulk.stream_lost(LOST, now_s)
                outstanding.clear()
                window = 1
            elif outstanding:
                number = outstanding.pop(pick % len(outstanding))
                window = 1 + pick
                if action < 3:
                    reply = points_pb2.UpsertStreamResponse(
                        chunk_no=number, error=detail("unavailable"), window=window
                    )
                else:
                    reply = ack(number, window)
                bulk.replied(reply, now_s)
        while not bulk.is_done:
            now_s += 3.0
            send()
            while outstanding:
                bulk.replied(ack(outstanding.pop(), 4), now_s)
                window = 4
    except ShoalError as error:  # pragma: no cover - a failure of the test itself
        raise AssertionError(f"a retryable failure was raised: {error}") from error
    assert bulk.rows_done == count * 10
    assert sorted(ids) == list(range(1, count + 1))
