"""Rows as large as they may be, through the SDK over real sockets, over lanes and over gRPC."""

from collections.abc import Iterator

import numpy as np
import pytest

import shoal
from shoal import Point
from shoal_cluster.bootstrap import RunningCluster
from shoal_cluster.domain.limits import PAYLOAD_BYTES_MAX

DIMENSION = 16
COUNT = 130
TEXT = "x" * (PAYLOAD_BYTES_MAX - 100)


@pytest.fixture(scope="module")
def filled(cluster: RunningCluster) -> Iterator[str]:
    """A collection of one shard with 130 rows of nearly the largest payload, uploaded in bulk."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((COUNT, DIMENSION)).astype(np.float32)
    points = [
        Point(
            id=f"p{i:03}",
            vector=vectors[i],
            attributes={"color": "red"},
            payload={"n": i, "text": TEXT},
        )
        for i in range(COUNT)
    ]
    with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
        made = client.create_collection(
            "large-rows", dimension=DIMENSION, attributes={"color": "keyword"}, replicas=2
        )
        assert made.bulk_upsert(points) == COUNT
        yield made.name
        client.drop_collection(made.name)


@pytest.fixture(params=["auto", "grpc"])
def collection(
    cluster: RunningCluster, filled: str, request: pytest.FixtureRequest
) -> Iterator[shoal.Collection]:
    with shoal.Client(cluster.grpc_address, timeout_s=60.0, transport=request.param) as client:
        yield client.collection(filled)


def test_large_rows_are_scrolled_in_pages_that_fit(collection: shoal.Collection) -> None:
    found = list(collection.scroll())
    assert [point.payload["n"] for point in found if point.payload] == list(range(COUNT))
    assert all(point.payload and point.payload["text"] == TEXT for point in found)
    assert len(list(collection.scroll(page_size=1000, with_payload=False))) == COUNT


def test_large_rows_are_got_together(collection: shoal.Collection) -> None:
    wanted = [f"p{i:03}" for i in reversed(range(COUNT))]
    found = collection.get(wanted, with_vector=True).points
    assert [point.id for point in found] == wanted
    assert all(point.payload and point.payload["text"] == TEXT for point in found)


def test_a_search_gives_large_rows_or_says_what_is_too_much(collection: shoal.Collection) -> None:
    query = np.ones(DIMENSION, dtype=np.float32)
    found = collection.search(query, k=100)
    assert len(found) == 100
    assert all(hit.payload and hit.payload["text"] == TEXT for hit in found)
    with pytest.raises(shoal.InvalidRequest, match="ask for fewer hits") as refused:
        collection.search(query, k=COUNT)
    assert refused.value.field == "with_payload"
    assert refused.value.limit and refused.value.outcome == "not_applied"
    assert len(collection.search(query, k=COUNT, with_payload=False)) == COUNT


def test_a_patch_of_many_large_rows_is_refused_or_carried_out(collection: shoal.Collection) -> None:
    ids = [f"p{i:03}" for i in range(COUNT)]
    with pytest.raises(shoal.InvalidRequest, match="fewer than 32 points at a time") as refused:
        collection.patch_attributes(ids, {"color": "blue"})
    assert (refused.value.field, refused.value.outcome) == ("ids", "not_applied")
    for start in range(0, COUNT, 31):
        some = ids[start : start + 31]
        assert list(collection.patch_attributes([*some, "nobody"], {"color": "blue"}).missing_ids)
    assert collection.count(shoal.F("color") == "blue") == COUNT
    for start in range(0, COUNT, 31):
        collection.patch_attributes(ids[start : start + 31], {"color": "red"})
