"""Every method through a real gRPC server and back."""

import json

import grpc
import grpc.aio
import numpy as np
import pytest

from shoal_cluster.domain.ids import Epoch, Seq, ServerId, ShardNumber
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.status import (
    ActorStatus,
    ClusterStatus,
    CollectionStatus,
    NodeStatus,
    ReplicaStatus,
    ShardStatus,
)
from shoal_protos.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    collections_pb2,
    collections_pb2_grpc,
    points_pb2,
    points_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
    types_pb2,
)
from tests.unit.edge.loopback import ESTIMATE, Loopback, detail_of, loopback, run
from tests.unit.query.fake_cluster import a_schema

KINDS = {
    "section": types_pb2.ATTRIBUTE_TYPE_KEYWORD,
    "tags": types_pb2.ATTRIBUTE_TYPE_KEYWORD_LIST,
    "size": types_pb2.ATTRIBUTE_TYPE_INT,
    "score": types_pb2.ATTRIBUTE_TYPE_FLOAT,
    "good": types_pb2.ATTRIBUTE_TYPE_BOOL,
    "changed": types_pb2.ATTRIBUTE_TYPE_TIMESTAMP,
}


def request_id(no: int) -> types_pb2.RequestId:
    return types_pb2.RequestId(client_id="client", request_no=no)


async def create(
    at: Loopback, metric: "types_pb2.Metric" = types_pb2.METRIC_COSINE, **changes: object
) -> collections_pb2.CollectionSchema:
    fields: dict[str, object] = {
        "name": "docs",
        "dimension": 4,
        "metric": metric,
        "attributes": [
            collections_pb2.AttributeDeclaration(name=name, type=kind)
            for name, kind in KINDS.items()
        ],
        "partition_by": "section",
        "shards": 3,
        **changes,
    }
    stub = collections_pb2_grpc.CollectionsStub(at.channel)
    request = collections_pb2.CreateCollectionRequest(
        request_id=request_id(1),
        schema=collections_pb2.CollectionSchema(**fields),  # type: ignore[arg-type]
    )
    return (await stub.CreateCollection(request)).schema


VECTORS = np.array([[3, 0, 0, 0], [0, 2, 0, 0], [1, 1, 0, 0]], np.float32)


def rows() -> types_pb2.Rows:
    """Three points; the second has no tags, the third no payload."""
    column = types_pb2.AttributeColumn
    return types_pb2.Rows(
        ids=["a", "b", "ç"],
        vectors=VECTORS.tobytes(),
        dimension=4,
        attributes=[
            column(name="section", keyword=types_pb2.KeywordValues(values=["x", "y", "x"])),
            column(
                name="tags",
                rows=[0, 2],
                keyword_list=types_pb2.KeywordListValues(values=["t", "u", "v"], lengths=[2, 1]),
            ),
            column(name="size", int=types_pb2.IntValues(values=[-1, 2**40, 3])),
            column(name="score", rows=[1], float=types_pb2.FloatValues(values=[0.5])),
            column(name="score", rows=[2], int=types_pb2.IntValues(values=[2])),
            column(name="good", rows=[0], bool=types_pb2.BoolValues(values=[True])),
            column(name="changed", rows=[0], timestamp=types_pb2.TimestampValues(values_ms=[5])),
        ],
        payloads=[b'{"n": 1}', b'{"n": 2}', b""],
        provenance=[
            types_pb2.Provenance(source_id="s", source_version="1", embedded_at_ms=9),
            types_pb2.Provenance(),
            types_pb2.Provenance(),
        ],
    )


async def load(at: Loopback, no: int = 2) -> points_pb2.UpsertResponse:
    stub = points_pb2_grpc.PointsStub(at.channel)
    request = points_pb2.UpsertRequest(collection="docs", request_id=request_id(no), rows=rows())
    return await stub.Upsert(request)


def attributes_of(batch: types_pb2.Rows) -> list[dict[str, object]]:
    """Rebuilds maps from columns, independently of the code under test."""
    maps: list[dict[str, object]] = [{} for _ in batch.ids]
    for column in batch.attributes:
        kind = column.WhichOneof("values")
        assert kind is not None
        if kind == "keyword_list":
            words = iter(column.keyword_list.values)
            values: list[object] = [
                [next(words) for _ in range(length)] for length in column.keyword_list.lengths
            ]
        elif kind == "timestamp":
            values = list(column.timestamp.values_ms)
        else:
            values = list(getattr(column, kind).values)
        for row, value in zip(column.rows or range(len(maps)), values, strict=True):
            maps[row][column.name] = value
    return maps


def test_every_write_says_whether_it_was_sent_before() -> None:
    """A shard that has forgotten clients takes the ones for first attempts, and not the others."""

    async def scenario() -> None:
        async with loopback() as at:
            await create(at, shards=1, partition_by="")
            shard = at.cluster.shard(at.cluster.topology.collections["docs"].schema, 0)
            stub = points_pb2_grpc.PointsStub(at.channel)
            columns = [
                types_pb2.AttributeColumn(
                    name="size", rows=[0], int=types_pb2.IntValues(values=[5])
                )
            ]
            size = types_pb2.Comparison(
                attribute="size",
                op=types_pb2.COMPARISON_OP_EQ,
                value=types_pb2.FilterValue(int=5),
            )
            writes = {
                stub.Upsert: points_pb2.UpsertRequest(rows=rows()),
                stub.PatchAttributes: points_pb2.PatchAttributesRequest(ids=["a"], set=columns),
                stub.Delete: points_pb2.DeleteRequest(ids=["a"]),
                stub.DeleteByFilter: points_pb2.DeleteByFilterRequest(
                    filter=types_pb2.Filter(comparison=size)
                ),
            }
            for again in (True, False):
                for write, request in writes.items():
                    shard.answered.clear()
                    shard.seq, shard.horizon = 50, 40
                    request.collection = "docs"
                    request.request_id.CopyFrom(request_id(7))
                    request.request_id.again = again
                    if not again:
                        await write(request)
                        continue
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await write(request)
                    assert detail_of(refused.value).field == "request_id.client_id"

    run(scenario())


def test_a_collection_is_created_described_listed_altered_and_dropped() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            stub = collections_pb2_grpc.CollectionsStub(at.channel)
            created = await create(
                at, recall_target=0.98, model=types_pb2.EmbeddingModel(name="m", version="1")
            )
            assert (created.version, created.shards, created.replicas) == (1, 3, 1)
            assert created.recall_target == 0.98 and created.model.name == "m"
            assert [(a.name, a.type) for a in created.attributes] == list(KINDS.items())
            described = await stub.DescribeCollection(
                collections_pb2.DescribeCollectionRequest(name="docs")
            )
            assert described.schema == created and described.rows_live == 42
            [estimate] = described.recall
            assert (estimate.filter_class, estimate.samples) == ("wide", 200)
            assert 0.9 < estimate.low < estimate.recall == 0.95 < estimate.high < 1
            altered = await stub.AlterCollection(
                collections_pb2.AlterCollectionRequest(
                    request_id=request_id(3),
                    name="docs",
                    add_attributes=[
                        collections_pb2.AttributeDeclaration(
                            name="colour", type=types_pb2.ATTRIBUTE_TYPE_KEYWORD
                        )
                    ],
                    replicas=2,
                    recall_sample_share=0.0,
                    tier=types_pb2.MEMORY_TIER_FULL,
                    if_version=1,
                )
            )
            assert (altered.schema.version, altered.schema.replicas) == (2, 2)
            assert created.tier == types_pb2.MEMORY_TIER_COMPACT
            assert created.storage == types_pb2.VECTOR_STORAGE_FLOAT32
            assert altered.schema.tier == types_pb2.MEMORY_TIER_FULL
            assert created.recall_sample_share == 0.01
            assert altered.schema.recall_sample_share == 0.0
            assert altered.schema.attributes[-1].name == "colour"
            assert altered.schema.recall_target == 0.98
            listed = await stub.ListCollections(collections_pb2.ListCollectionsRequest())
            assert list(listed.schemas) == [altered.schema]
            await stub.DropCollection(
                collections_pb2.DropCollectionRequest(request_id=request_id(4), name="docs")
            )
            listed = await stub.ListCollections(collections_pb2.ListCollectionsRequest())
            assert not listed.schemas

    run(scenario())


def test_points_come_back_as_they_were_written() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            schema = await create(at)
            written = await load(at)
            assert written.session.collection_id == schema.id
            assert len(written.seqs) == 3 and all(written.seqs)
            stub = points_pb2_grpc.PointsStub(at.channel)
            got = await stub.Get(
                points_pb2.GetRequest(
                    collection="docs",
                    ids=["ç", "nope", "a", "b"],
                    with_vector=True,
                    session=written.session,
                )
            )
            assert list(got.rows.ids) == ["ç", "a", "b"]
            vectors = np.frombuffer(got.rows.vectors, np.float32).reshape(-1, 4)
            assert np.allclose(vectors, VECTORS[[2, 0, 1]], rtol=1e-6)
            assert attributes_of(got.rows) == [
                {"section": "x", "tags": ["v"], "size": 3, "score": 2.0},
                {"section": "x", "tags": ["t", "u"], "size": -1, "good": True, "changed": 5},
                {"section": "y", "size": 2**40, "score": 0.5},
            ]
            assert list(got.rows.payloads) == [b"", b'{"n": 1}', b'{"n": 2}']
            assert got.rows.provenance[1].source_id == "s"
            assert got.rows.provenance[1].embedded_at_ms == 9
            assert [got.rows.seqs[i] for i in (1, 2, 0)] == list(written.seqs)
            assert got.staleness_ms == 3

    run(scenario())


def test_patch_delete_count_and_scroll() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            await create(at)
            await load(at)
            stub = points_pb2_grpc.PointsStub(at.channel)
            patched = await stub.PatchAttributes(
                points_pb2.PatchAttributesRequest(
                    collection="docs",
                    request_id=request_id(3),
                    ids=["a", "nope"],
                    set=[
                        types_pb2.AttributeColumn(
                            name="size", rows=[0], int=types_pb2.IntValues(values=[7])
                        )
                    ],
                    remove=["tags"],
                )
            )
            assert list(patched.missing_ids) == ["nope"]
            seen, cursor = [], b""
            while True:
                page = await stub.Scroll(
                    points_pb2.ScrollRequest(
                        collection="docs", limit=2, cursor=cursor, with_payload=True
                    )
                )
                seen += list(zip(page.rows.ids, attributes_of(page.rows), strict=True))
                cursor = page.next_cursor
                if not cursor:
                    break
            assert dict(seen)["a"] == {"section": "x", "size": 7, "good": True, "changed": 5}
            bare = await stub.Scroll(points_pb2.ScrollRequest(collection="docs"))
            assert len(bare.rows.ids) == 3 and not bare.rows.attributes and not bare.rows.vectors
            filter = types_pb2.Filter(
                comparison=types_pb2.Comparison(
                    attribute="size",
                    op=types_pb2.COMPARISON_OP_GT,
                    value=types_pb2.FilterValue(int=5),
                )
            )
            count = await stub.Count(points_pb2.CountRequest(collection="docs", filter=filter))
            assert count.count == 2
            deleted = await stub.DeleteByFilter(
                points_pb2.DeleteByFilterRequest(
                    collection="docs", request_id=request_id(4), filter=filter
                )
            )
            assert deleted.deleted == 2
            gone = await stub.Delete(
                points_pb2.DeleteRequest(
                    collection="docs", request_id=request_id(5), ids=["ç", "nope"]
                )
            )
            assert gone.deleted == 1 and gone.session.positions
            assert (await stub.Count(points_pb2.CountRequest(collection="docs"))).count == 0

    run(scenario())


@pytest.mark.parametrize(
    ("metric", "scores"),
    [
        (types_pb2.METRIC_COSINE, [1.0, 0.70710678, 0.0]),
        (types_pb2.METRIC_DOT, [6.0, 2.0, 0.0]),
        (types_pb2.METRIC_L2, [1.0, 2**0.5, 8**0.5]),
    ],
)
def test_scores_are_what_users_expect_of_a_metric(
    metric: "types_pb2.Metric", scores: list[float]
) -> None:
    async def scenario() -> None:
        async with loopback() as at:
            await create(at, metric)
            await load(at)
            stub = search_pb2_grpc.SearchStub(at.channel)
            query = np.array([[2, 0, 0, 0]], np.float32)
            found = await stub.Search(
                search_pb2.SearchRequest(
                    collection="docs", vectors=query.tobytes(), dimension=4, k=5
                )
            )
            [of_query] = found.results
            assert of_query.scores == pytest.approx(scores, abs=1e-6)
            assert sorted(of_query.rows.ids) == ["a", "b", "ç"]
            assert of_query.rows.ids[2] == "b"
            assert not of_query.rows.payloads and not of_query.rows.vectors
            assert len(found.as_of.positions) == 3

    run(scenario())


def test_a_batch_search_returns_payloads_vectors_and_explains_itself() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            await create(at)
            await load(at)
            stub = search_pb2_grpc.SearchStub(at.channel)
            found = await stub.Search(
                search_pb2.SearchRequest(
                    collection="docs",
                    vectors=VECTORS[:2].tobytes(),
                    dimension=4,
                    k=2,
                    with_payload=True,
                    with_vector=True,
                    explain=True,
                    filter=types_pb2.Filter(
                        comparison=types_pb2.Comparison(
                            attribute="section",
                            op=types_pb2.COMPARISON_OP_EQ,
                            value=types_pb2.FilterValue(keyword="x"),
                        )
                    ),
                )
            )
            first, second = found.results
            assert list(first.rows.ids) == ["a", "ç"]
            assert list(second.rows.ids) == ["ç", "a"]
            assert json.loads(first.rows.payloads[0]) == {"n": 1}
            vectors = np.frombuffer(first.rows.vectors, np.float32).reshape(-1, 4)
            assert np.allclose(vectors, VECTORS[[0, 2]], rtol=1e-6), "with their own lengths"
            assert attributes_of(second.rows)[0]["tags"] == ["v"]
            explain = found.explain
            assert [shard.shard for shard in explain.shards] == [0, 1, 2]
            [searched] = [shard for shard in explain.shards if shard.searched]
            assert searched.server in ("a", "b") and searched.as_of.epoch == 7
            assert searched.segments[0].segment == "memtable"
            pruned = [shard for shard in explain.shards if not shard.searched]
            assert all("section" in shard.reason for shard in pruned) and len(pruned) == 2
            stages = [stage.stage for stage in explain.stages]
            assert stages == ["decode", "plan", "scatter", "merge", "encode"]
            assert explain.recall_target == 0.95 and explain.expected_recall == 1.0

    run(scenario())


def test_a_search_by_id_leaves_out_the_point_itself() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            await create(at)
            await load(at)
            stub = search_pb2_grpc.SearchStub(at.channel)
            found = await stub.Search(
                search_pb2.SearchRequest(collection="docs", ids=["ç", "a"], k=2)
            )
            assert [sorted(r.rows.ids) for r in found.results] == [["a", "b"], ["b", "ç"]]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Search(search_pb2.SearchRequest(collection="docs", ids=["nope"], k=2))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert detail_of(caught.value).field == "ids[0]"

    run(scenario())


def test_the_consistency_level_and_token_reach_the_shard() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            await create(at)
            written = await load(at)
            stub = points_pb2_grpc.PointsStub(at.channel)
            at.cluster.calls.clear()
            await stub.Count(points_pb2.CountRequest(collection="docs", session=written.session))
            expected = {p.shard: (p.epoch, p.seq) for p in written.session.positions}
            for call in at.cluster.calls:
                level = call.message.level
                assert tuple(level.at_least) == expected.get(call.message.shard, (0, 0))

    run(scenario())


def test_status_reports_every_field() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            position = Position(Epoch(3), Seq(9))
            at.control.report = ClusterStatus(
                version="0.1.0",
                cluster_uuid="u",
                uptime_ms=5,
                bucket="/data",
                nodes=(NodeStatus(id="n", address="host", state="alive", cpus=2),),
                actors=(
                    ActorStatus(id="server-1", kind="shard_server", pid=7, node="n", state="ready"),
                ),
                collections=(
                    CollectionStatus(
                        schema=a_schema(),
                        rows_live=11,
                        recall=(ESTIMATE,),
                        shards=(
                            ShardStatus(
                                shard=ShardNumber(0),
                                position=position,
                                memtable_rows=4,
                                segments=2,
                                replicas=(
                                    ReplicaStatus(
                                        server=ServerId("server-1"),
                                        primary=True,
                                        state="ready",
                                        position=position,
                                        set_checksum=2**64 - 1,
                                    ),
                                ),
                            ),
                        ),
                    ),
                ),
                age_ms=12,
            )
            stub = admin_pb2_grpc.AdminStub(at.channel)
            status = await stub.Status(admin_pb2.StatusRequest(collection="docs"))
            [shard] = status.collections[0].shards
            assert (shard.epoch, shard.seq, shard.memtable_rows, shard.segments) == (3, 9, 4, 2)
            assert shard.replicas[0].role == admin_pb2.REPLICA_ROLE_PRIMARY
            assert shard.replicas[0].set_checksum == 2**64 - 1
            assert status.collections[0].recall[0].samples == ESTIMATE.samples
            assert (status.actors[0].pid, status.nodes[0].cpus, status.age_ms) == (7, 2, 12)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Status(admin_pb2.StatusRequest(collection="nope"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    run(scenario())
