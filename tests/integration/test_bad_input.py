"""Every kind of bad input ends as a typed error that names field and limit, and harms nothing else.

Through the SDK over real gRPC. What the SDK itself would refuse is sent past it, as other clients
would (`raw` below), where that is possible.
"""

import datetime
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import shoal
from chaos import cluster as clusters
from shoal import F, Point
from shoal_cluster import bootstrap
from shoal_cluster.bootstrap import RunningCluster
from shoal_cluster.bucket import envelope
from shoal_cluster.domain.errors import Conflict

DIMENSION = 8


@pytest.fixture(scope="module")
def collection(cluster: RunningCluster) -> Iterator[shoal.Collection]:
    """A collection with one row that every test must leave alone."""
    with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
        made = client.create_collection(
            "bad-input",
            dimension=DIMENSION,
            attributes={"word": "keyword", "words": "keyword_list", "number": "int"},
            shards=2,
            replicas=2,
            model=("a-model", "1"),
        )
        made.upsert(_point("witness"))
        yield made
        witness = made.get("witness").points
        assert [point.id for point in witness] == ["witness"]
        status = client.status()
        assert {actor.state for actor in status.actors} == {"ready"}
        assert made.count() == 1
        client.drop_collection("bad-input")


def _point(point_id: str, **changes: object) -> Point:
    fields: dict[str, object] = {
        "id": point_id,
        "vector": np.ones(DIMENSION, dtype=np.float32),
        "attributes": {"word": "a"},
        "payload": {"text": "x"},
    }
    return Point(**{**fields, **changes})  # type: ignore[arg-type]


def _vector(**places: float) -> np.ndarray:
    vector = np.ones(DIMENSION, dtype=np.float32)
    for place, value in places.items():
        vector[int(place[1:])] = value
    return vector


WRITES: dict[str, tuple[Callable[[shoal.Collection], object], str]] = {
    "wrong dimension": (
        lambda c: c.upsert(_point("p", vector=np.ones(DIMENSION + 1, dtype=np.float32))),
        "vector",
    ),
    "nan": (lambda c: c.upsert(_point("p", vector=_vector(_3=float("nan")))), "vector"),
    "infinity": (lambda c: c.upsert(_point("p", vector=_vector(_3=float("inf")))), "vector"),
    "zero under cosine": (
        lambda c: c.upsert(_point("p", vector=np.zeros(DIMENSION, dtype=np.float32))),
        "vector",
    ),
    "unknown attribute": (lambda c: c.upsert(_point("p", attributes={"wrod": "a"})), "attributes"),
    "wrongly typed attribute": (
        lambda c: c.upsert(_point("p", attributes={"number": "seven"})),
        "attributes",
    ),
    "boolean for an int": (
        lambda c: c.upsert(_point("p", attributes={"number": True})),
        "attributes",
    ),
    "empty id": (lambda c: c.upsert(_point("")), "id"),
    "long id": (lambda c: c.upsert(_point("é" * 129)), "id"),
    "duplicate id in a batch": (lambda c: c.upsert([_point("p"), _point("p")]), "id"),
    "batch over the limit": (
        lambda c: c.upsert([_point(f"p{i}") for i in range(1001)]),
        "points",
    ),
    "payload over the limit": (
        lambda c: c.upsert(_point("p", payload={"text": "x" * 300_000})),
        "payload",
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_bad_write_is_refused_naming_the_field(name: str, collection: shoal.Collection) -> None:
    write, field = WRITES[name]
    with pytest.raises(shoal.InvalidRequest) as refused:
        write(collection)
    assert field in (refused.value.field or ""), refused.value
    assert refused.value.outcome == "not_applied"
    assert collection.get("p").points == []


SEARCHES: dict[str, tuple[Callable[[shoal.Collection], object], str]] = {
    "wrong dimension": (lambda c: c.search(np.ones(DIMENSION - 1, dtype=np.float32)), "vectors"),
    "nan": (lambda c: c.search(_vector(_0=float("nan"))), "vectors"),
    "zero under cosine": (lambda c: c.search(np.zeros(DIMENSION, dtype=np.float32)), "vectors"),
    "k of 0": (lambda c: c.search(_vector(), k=0), "k"),
    "k over the limit": (lambda c: c.search(_vector(), k=1001), "k"),
    "undeclared attribute": (lambda c: c.search(_vector(), filter=F("wrod") == "a"), "filter"),
    "wrong literal": (lambda c: c.search(_vector(), filter=F("number") == "a"), "filter"),
    "equality on a list": (lambda c: c.search(_vector(), filter=F("words") == "a"), "filter"),
    "range on a keyword": (lambda c: c.search(_vector(), filter=F("word") < "a"), "filter"),
    "no values": (lambda c: c.search(_vector(), filter=F("word").in_([])), "filter"),
    "recall target": (lambda c: c.search(_vector(), recall_target=1.5), "recall_target"),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_bad_search_is_refused_naming_the_field(name: str, collection: shoal.Collection) -> None:
    search, field = SEARCHES[name]
    with pytest.raises(shoal.InvalidRequest) as refused:
        search(collection)
    assert field in (refused.value.field or ""), refused.value


def test_undeclared_attribute_error_lists_the_declared_ones(collection: shoal.Collection) -> None:
    with pytest.raises(shoal.InvalidRequest, match=r"number.*word.*words|word.*words.*number"):
        collection.search(_vector(), filter=F("wrod") == "a")


def test_too_deep_a_filter_is_refused(collection: shoal.Collection) -> None:
    deep = F("word") == "a"
    for _ in range(40):
        deep = ~deep
    with pytest.raises(shoal.InvalidRequest) as refused:
        collection.search(_vector(), filter=deep)
    assert refused.value.limit is not None


def test_another_model_is_refused_for_writes_and_queries(
    collection: shoal.Collection, client: shoal.Client
) -> None:
    other = client.collection("bad-input", model=("a-model", "2"))
    with pytest.raises((shoal.InvalidRequest, shoal.Conflict), match="a-model"):
        other.upsert(_point("p"))
    with pytest.raises((shoal.InvalidRequest, shoal.Conflict), match="a-model"):
        other.search(_vector())


def test_unknown_collection_is_named(client: shoal.Client) -> None:
    with pytest.raises(shoal.NotFound, match="nowhere"):
        client.collection("nowhere").search(_vector())
    with pytest.raises(shoal.NotFound, match="nowhere"):
        client.collection("nowhere").upsert(_point("p"))
    with pytest.raises(shoal.NotFound, match="nowhere"):
        client.drop_collection("nowhere")


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a" * 65, "-x", "a b", "ä"])
def test_collection_name_with_path_characters_is_refused(name: str, client: shoal.Client) -> None:
    with pytest.raises(shoal.InvalidRequest) as refused:
        client.create_collection(name, dimension=2)
    assert "name" in (refused.value.field or "")
    assert refused.value.limit is not None


def test_second_create_is_refused(collection: shoal.Collection, client: shoal.Client) -> None:
    with pytest.raises(shoal.AlreadyExists, match="bad-input"):
        client.create_collection("bad-input", dimension=DIMENSION)


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"dimension": 1}, "dimension"),
        ({"dimension": 5000}, "dimension"),
        ({"dimension": 4, "shards": 5000}, "shards"),
        ({"dimension": 4, "replicas": 99}, "replicas"),
        ({"dimension": 4, "partition_by": "nothing"}, "partition_by"),
        ({"dimension": 4, "recall_target": 0.1}, "recall_target"),
        ({"dimension": 4, "recall_sample_share": 1.5}, "recall_sample_share"),
        ({"dimension": 4, "attributes": {"a-b": "int"}}, "attributes"),
    ],
)
def test_bad_schema_is_refused(schema: dict[str, object], field: str, client: shoal.Client) -> None:
    with pytest.raises(shoal.InvalidRequest) as refused:
        client.create_collection("never-made", **schema)  # type: ignore[arg-type]
    assert field in (refused.value.field or "")
    assert "never-made" not in [schema.name for schema in client.list_collections()]


def test_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Conflict, match="port") as refused:
            clusters.start(tmp_path, port=taken.getsockname()[1])
    assert "listen" in refused.value.message


def test_bucket_that_another_cluster_serves_is_refused(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    with pytest.raises(Conflict, match="another cluster") as refused:
        clusters.start(tmp_path, bucket=cluster.bucket)
    assert cluster.grpc_address in refused.value.message
    assert bootstrap.running("test", tmp_path / "state") is None


def test_bucket_of_a_newer_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    with monkeypatch.context() as newer:
        newer.setattr(envelope, "FORMAT_VERSION", envelope.FORMAT_VERSION + 1)
        body = envelope.encode(envelope.EnvelopeKind.CLUSTER, {"put_id": os.urandom(16)})
    (bucket / "cluster").write_bytes(body)
    with pytest.raises(Conflict, match=r"format.*2") as refused:
        clusters.start(tmp_path, bucket=str(bucket))
    assert "upgrade" in refused.value.message
    assert [path.name for path in bucket.iterdir()] == ["cluster"]


def test_timestamps_must_be_timestamps(client: shoal.Client) -> None:
    made = client.create_collection("bad-times", dimension=2, attributes={"at": "timestamp"})
    try:
        at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        made.upsert(Point(id="a", vector=[1.0, 0.0], attributes={"at": at}))
        with pytest.raises(shoal.InvalidRequest):
            made.upsert(Point(id="b", vector=[1.0, 0.0], attributes={"at": "yesterday"}))
        assert made.count(F("at") >= at) == 1
    finally:
        client.drop_collection("bad-times")
