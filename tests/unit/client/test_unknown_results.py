"""A write whose result is unknown: what later attempts say."""

from typing import Any

import grpc
import pytest

import shoal
from shoal.retry import RetryPolicy
from tests.unit.client.conftest import Connect
from tests.unit.client.fake_server import FakeServer, break_off, refuse

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
