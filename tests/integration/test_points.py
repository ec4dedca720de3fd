"""The data API end to end: SDK, gRPC, coordinator, links, shard servers, bucket."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import shoal
from chaos.cluster import wait_until
from shoal import F, Point
from shoal_cluster.bootstrap import RunningCluster

DIMENSION = 16


@pytest.fixture(params=["auto", "grpc"])
def client(cluster: RunningCluster, request: pytest.FixtureRequest) -> Iterator[shoal.Client]:
    """Over fast lanes and over gRPC: what the SDK promises holds for both."""
    with shoal.Client(cluster.grpc_address, timeout_s=60.0, transport=request.param) as connected:
        yield connected


@pytest.fixture
def collection(client: shoal.Client) -> shoal.Collection:
    for schema in client.list_collections():
        if schema.name == "points":
            client.drop_collection("points")
    return client.create_collection(
        "points",
        dimension=DIMENSION,
        attributes={"color": "keyword", "size": "int", "tags": "keyword_list"},
        shards=3,
        replicas=2,
    )


def _points(count: int, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, DIMENSION)).astype(np.float32)
    return [
        Point(
            id=f"p{i:05}",
            vector=vectors[i],
            attributes={"color": ("red", "green", "blue")[i % 3], "size": i, "tags": [f"t{i % 7}"]},
            payload={"n": i},
        )
        for i in range(count)
    ]


def test_what_was_written_is_read_back_unchanged(collection: shoal.Collection) -> None:
    points = _points(50)
    collection.upsert(points)
    read = collection.get([point.id for point in points], with_vector=True).points
    assert [point.id for point in read] == [point.id for point in points]
    for wrote, found in zip(points, read, strict=True):
        assert found.attributes == wrote.attributes
        assert found.payload == wrote.payload
        np.testing.assert_allclose(found.vector, wrote.vector, rtol=1e-5, atol=1e-6)


def test_search_equals_brute_force_over_memtable_and_segments(
    collection: shoal.Collection, client: shoal.Client
) -> None:
    points = _points(6000)
    assert collection.bulk_upsert(points) == 6000
    vectors = np.stack([point.vector for point in points])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    wait_until(
        lambda: all(shard.segments for shard in client.status("points").collections[0].shards),
        timeout_s=60,
        what="every shard sealed a segment",
    )
    queries = np.random.default_rng(1).standard_normal((20, DIMENSION)).astype(np.float32)
    for query in queries:
        scores = unit @ (query / np.linalg.norm(query))
        expected = np.argsort(-scores)[:10]
        found = collection.search(query, k=10, exact=True)
        assert set(found.ids) == {points[i].id for i in expected}
        np.testing.assert_allclose(found.scores, scores[expected], atol=1e-4)
        wanted = [i for i in np.argsort(-scores) if points[i].attributes["size"] < 600][:10]
        filtered = collection.search(query, k=10, exact=True, filter=F("size") < 600)
        assert set(filtered.ids) == {points[i].id for i in wanted}


def test_delete_patch_count_and_scroll(collection: shoal.Collection) -> None:
    collection.upsert(_points(90))
    assert collection.count() == 90
    assert collection.count(F("color") == "red") == 30
    assert collection.delete(["p00000", "p00003", "nobody"]).deleted == 2
    assert collection.count(F("color") == "red") == 28
    result = collection.patch_attributes(["p00001", "nobody"], {"color": "black"}, remove=["tags"])
    assert list(result.missing_ids) == ["nobody"]
    patched = collection.get("p00001").points[0]
    assert patched.attributes == {"color": "black", "size": 1}
    assert patched.payload == {"n": 1}
    assert collection.delete_where(F("color") == "blue").deleted == 30
    left = [point.id for point in collection.scroll(page_size=7)]
    assert len(left) == len(set(left)) == 58
    assert {point.id for point in collection.scroll(F("color") == "black")} == {"p00001"}


@pytest.mark.parametrize("consistency", ["session", "strong"])
def test_a_client_reads_its_own_writes(consistency: str, collection: shoal.Collection) -> None:
    for i, point in enumerate(_points(60)):
        collection.upsert(point)
        assert collection.count(consistency=consistency) == i + 1  # type: ignore[arg-type]


def test_conditional_writes(collection: shoal.Collection) -> None:
    point = _points(1)[0]
    (seq,) = collection.upsert(point, if_absent=True).seqs
    with pytest.raises(shoal.Conflict):
        collection.upsert(point, if_absent=True)
    collection.upsert(point, if_seq=[seq])
    with pytest.raises(shoal.Conflict):
        collection.upsert(point, if_seq=[seq])


def test_search_by_id_leaves_out_the_point_itself(collection: shoal.Collection) -> None:
    collection.upsert(_points(40))
    found = collection.search_by_id("p00007", k=5)
    assert len(found) == 5
    assert "p00007" not in found.ids


def test_explain_tells_pruned_shards_and_plans(client: shoal.Client) -> None:
    made = client.create_collection(
        "parted",
        dimension=DIMENSION,
        attributes={"color": "keyword", "size": "int"},
        partition_by="color",
        shards=4,
    )
    try:
        points = [
            Point(id=p.id, vector=p.vector, attributes={"color": p.attributes["color"]})
            for p in _points(60)
        ]
        made.upsert(points)
        found = made.search(points[0].vector, filter=F("color") == "red", explain=True)
        assert found.explain is not None
        searched = [shard for shard in found.explain.shards if shard.searched]
        assert len(searched) == 1
        assert len(found.explain.shards) == 4
        assert all(shard.reason for shard in found.explain.shards if not shard.searched)
        assert len(found) == 10
    finally:
        client.drop_collection("parted")


def test_a_budget_finds_the_best_that_it_pays_for(client: shoal.Client) -> None:
    made = client.create_collection("budget", dimension=DIMENSION, shards=2)
    try:
        points = _points(60)
        made.upsert([Point(id=p.id, vector=p.vector) for p in points])
        plenty = made.search(points[0].vector, max_cost_ms=50, explain=True)
        assert plenty.ids == made.search(points[0].vector, exact=True).ids
        assert plenty.explain is not None
        assert (plenty.explain.recall_target, plenty.explain.expected_recall) == (0.0, 1.0)
        assert len(made.search(points[0].vector, max_cost_ms=0.000_001)) == 10, "never nothing"
        with pytest.raises(shoal.InvalidRequest) as refused:
            made.search(points[0].vector, max_cost_ms=1, recall_target=0.9)
        assert refused.value.field == "max_cost_ms"
    finally:
        client.drop_collection("budget")


def test_a_point_moves_with_its_partition_value(client: shoal.Client) -> None:
    made = client.create_collection(
        "moving",
        dimension=DIMENSION,
        attributes={"color": "keyword"},
        partition_by="color",
        shards=4,
    )
    try:
        vector = np.ones(DIMENSION, dtype=np.float32)
        for color in ("red", "green", "blue", "black", "white"):
            made.upsert(Point(id="one", vector=vector, attributes={"color": color}))
            assert made.count() == 1
            assert made.get("one").points[0].attributes == {"color": color}
    finally:
        client.drop_collection("moving")


def test_replicas_agree_by_set_checksum(collection: shoal.Collection, client: shoal.Client) -> None:
    collection.bulk_upsert(_points(3000))
    collection.delete_where(F("size") < 500)
    collection.upsert(_points(700, seed=5))

    def agreed() -> bool:
        shards = client.status("points").collections[0].shards
        return all(
            len(shard.replicas) == 2
            and len({replica.position.seq for replica in shard.replicas}) == 1
            and len({replica.set_checksum for replica in shard.replicas}) == 1
            and shard.replicas[0].set_checksum != 0
            for shard in shards
        )

    wait_until(agreed, timeout_s=30, what="replicas at one position with one checksum")
    assert collection.count() == 2500 + 500


def test_half_precision_vectors_move_between_memory_tiers(client: shoal.Client) -> None:
    """Rounded once: what is read back, before and after a seal, is what is compared."""
    halves = client.create_collection("halves", dimension=8, storage="float16", tier="disk")
    vectors = np.random.default_rng(1).standard_normal((1500, 8)).astype(np.float32)
    rounded = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    for start in range(0, 1500, 500):
        halves.upsert(
            shoal.Point(id=f"h{i:04d}", vector=vectors[i]) for i in range(start, start + 500)
        )

    def sealed() -> bool:
        (shard,) = client.status("halves").collections[0].shards
        return shard.memtable_rows == 0 and shard.segments > 0

    wait_until(sealed, timeout_s=60, what="all rows in segments")
    before = halves.search(vectors[7], k=5, exact=True)
    assert before.ids[0] == "h0007"
    (stored,) = halves.get(["h0007"], with_vector=True).points
    length = np.linalg.norm(vectors[7])
    assert np.allclose(stored.vector, rounded[7].astype(np.float32) * length, rtol=1e-5)
    assert client.alter_collection("halves", tier="full").tier == "full"

    def held() -> bool:
        (shard,) = client.status("halves").collections[0].shards
        return shard.replicas[0].memory_bytes >= 1500 * 8 * 2

    wait_until(held, timeout_s=30, what="vectors in memory")
    after = halves.search(vectors[7], k=5, exact=True)
    assert list(after.ids) == list(before.ids)
    assert list(after.scores) == list(before.scores)
    client.drop_collection("halves")


def test_alter_adds_attributes_to_a_living_collection(
    collection: shoal.Collection, client: shoal.Client
) -> None:
    collection.upsert(_points(10))
    client.alter_collection("points", add_attributes={"owner": "keyword"}, recall_target=0.9)
    collection.patch_attributes("p00001", {"owner": "me"})
    assert collection.count(F("owner") == "me") == 1
    assert collection.count(F("owner").exists()) == 1


def test_dropped_collection_leaves_nothing_in_the_bucket(
    client: shoal.Client, cluster: RunningCluster
) -> None:
    from pathlib import Path

    client.create_collection("brief", dimension=4).upsert(Point(id="a", vector=[1, 0, 0, 0]))
    schema = next(s for s in client.list_collections() if s.name == "brief")
    folder = Path(cluster.bucket) / "c" / schema.id
    assert any(path.is_file() for path in folder.rglob("*"))
    client.drop_collection("brief")
    wait_until(
        lambda: not any(path.is_file() for path in folder.rglob("*")),
        timeout_s=20,
        what="objects of the dropped collection are deleted",
    )


def test_grpc_health_and_reflection(cluster: RunningCluster) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with grpc.insecure_channel(cluster.grpc_address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "shoal.v1.Search"):
            reply = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"shoal.v1.Collections", "shoal.v1.Points", "shoal.v1.Search"} <= set(services)
