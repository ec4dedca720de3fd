"""A search like an earlier one is the earlier one's bytes around other vectors."""

from typing import Any

import numpy as np
import pytest

from shoal.calls import Calls
from shoal.errors import InvalidRequest
from shoal.filters import F
from shoal.search_templates import SEARCH_TEMPLATES_MAX
from shoal_protos.v1 import search_pb2, types_pb2

VECTOR = np.arange(1, 5, dtype=np.float32)


def request(calls: Calls, vector: Any = VECTOR, collection: str = "docs", **options: Any) -> Any:
    options = {"k": 3, "condition": None, "model": None, **options}
    return calls.search(collection, vector=vector, **options).request


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 1000, "exact": True, "with_payload": False, "with_vector": True, "explain": True},
        {"recall_target": 0.9, "consistency": "strong"},
        {"model": ("m", "1")},
        {"collection": "x" * 300},
        {"vector": np.ones(4096)},
    ],
)
def test_a_later_search_serialises_to_what_a_first_one_would(options: dict[str, Any]) -> None:
    calls = Calls()
    first = {"vector": VECTOR, **options}
    assert isinstance(request(calls, **first), search_pb2.SearchRequest)
    other = {**first, "vector": np.asarray(first["vector"])[::-1] * 2}
    later = request(calls, **other)
    assert isinstance(later, bytes)
    assert later == request(Calls(), **other).SerializeToString()


def test_batches_have_templates_by_shape() -> None:
    calls = Calls()

    def batch(vectors: Any) -> Any:
        return calls.search("docs", vectors=vectors, k=3, condition=None, model=None).request

    batch(np.ones((2, 4)))
    assert isinstance(batch(np.ones((3, 4))), search_pb2.SearchRequest)
    later = batch(np.zeros((2, 4)))
    assert search_pb2.SearchRequest.FromString(later).vectors == bytes(32)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"exact": True}, {"exact": 1}), ({"k": 1}, {"k": True}), ({}, {"k": [3]})],
)
def test_a_wrong_option_is_refused_though_it_equals_a_right_one(
    options: dict[str, Any], wrong: dict[str, Any]
) -> None:
    calls = Calls()
    request(calls, **options)
    with pytest.raises(InvalidRequest):
        request(calls, **wrong)


def test_what_the_session_has_seen_is_sent_at_once() -> None:
    calls = Calls()
    request(calls)
    token = types_pb2.SessionToken(
        collection_id="c", positions=[types_pb2.ShardPosition(shard=0, epoch=1, seq=5)]
    )
    calls.sessions.observe("docs", token)
    assert request(calls).session == token
    later = search_pb2.SearchRequest.FromString(request(calls, VECTOR * 2))
    assert later.session == token
    assert not request(calls, collection="dogs").HasField("session")


def test_filtered_searches_and_those_by_ids_are_built_each_time() -> None:
    calls = Calls()
    for _ in range(2):
        assert request(calls, condition=F("year") > 2020).HasField("filter")
        by_ids = calls.search("docs", ids=["a"], k=3, condition=None, model=None)
        assert isinstance(by_ids.request, search_pb2.SearchRequest)


def test_templates_are_bounded() -> None:
    calls = Calls()
    for k in range(1, 2 * SEARCH_TEMPLATES_MAX):
        request(calls, k=k)
    assert len(calls._searches._parts) <= SEARCH_TEMPLATES_MAX
