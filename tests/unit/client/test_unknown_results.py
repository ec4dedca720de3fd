"""A write whose result is unknown: what later attempts say, and how it is resolved."""

from typing import Any

import grpc
import pytest

import shoal
from shoal.retry import RetryPolicy
from tests.unit.client.conftest import Connect
from tests.unit.client.fake_server import FakeServer, break_off, hang, refuse

FAST = RetryPolicy(backoff_first_s=0.001, backoff_max_s=0.01)
LOST = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (refuse("unavailable"), False),
        (refuse("overloaded", retry_after_ms=1), False),
        (refuse("indeterminate", maybe_applied=True), True),
        (break_off(LOST), True),
    ],
)
def test_an_attempt_after_one_that_may_have_been_applied_says_so(
    connect: Connect, server: FakeServer, failure: Any, again: bool
) -> None:
    server.script["Upsert"].extend([failure, refuse("unavailable")])
    connect(server.address, retries=FAST).collection("notes").upsert(ids=["a"], vectors=[[1, 0]])
    told = [request.request_id.again for request in server.requests["Upsert"]]
    assert told == [False, again, again]


def test_a_request_that_the_cluster_has_forgotten_is_not_sent_until_the_deadline(
    connect: Connect, server: FakeServer
) -> None:
    server.script["Upsert"].append(
        refuse("indeterminate", maybe_applied=True, field="request_id.client_id")
    )
    notes = connect(server.address, retries=FAST).collection("notes")
    with pytest.raises(shoal.Indeterminate) as caught:
        notes.upsert(ids=["a"], vectors=[[1, 0]])
    assert caught.value.field == "request_id.client_id"
    assert len(server.requests["Upsert"]) == 1


def test_a_write_whose_result_is_unknown_is_resolved_by_the_same_request(
    connect: Connect, server: FakeServer
) -> None:
    server.script["Upsert"].extend([hang] * 2)
    client = connect(server.address, retries=FAST)
    with pytest.raises(shoal.Indeterminate) as caught:
        client.collection("notes").upsert(ids=["a"], vectors=[[1, 0]], timeout_s=0.3)
    server.script["Upsert"].clear()
    server.script["Upsert"].extend([refuse("unavailable")] * 1000)
    with pytest.raises(shoal.ShoalError) as still:
        client.resolve(caught.value, timeout_s=0.1)
    assert still.value.outcome == "maybe_applied", "no later verdict denies the first attempt"
    server.script["Upsert"].clear()
    result = client.resolve(still.value)
    assert len(result.seqs) == 1
    assert client.collection("notes").session.positions, "it is part of the session"
    assert len({request.request_id.request_no for request in server.requests["Upsert"]}) == 1
    assert [request.request_id.again for request in server.requests["Upsert"]][-1]


def test_an_error_about_no_unknown_write_cannot_be_resolved(
    connect: Connect, server: FakeServer
) -> None:
    server.script["Upsert"].append(refuse("conflict"))
    client = connect(server.address)
    with pytest.raises(shoal.Conflict) as caught:
        client.collection("notes").upsert(ids=["a"], vectors=[[1, 0]])
    assert caught.value.request is None
    with pytest.raises(shoal.InvalidRequest, match="carries no write"):
        client.resolve(caught.value)
