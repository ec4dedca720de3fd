"""Every bad write is refused before a shard is touched, naming the point and the limit."""

import asyncio
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_cluster.domain.errors import InvalidRequest, Outcome
from shoal_cluster.domain.point import Provenance, decode_tail
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import EmbeddingModel, Metric, VectorStorage
from shoal_cluster.ingest.execute import Writer
from shoal_cluster.ingest.validate import (
    PatchRequest,
    Tails,
    UpsertRequest,
    check_batch,
    encode_tails,
)
from tests.unit.query.fake_cluster import FakeClock, FakeCluster, a_schema

NAME = RequestName("client", 1)
GOOD = np.ones((3, 4), np.float32)
NAN, INF = float("nan"), float("inf")


def with_row(row: int, values: list[float]) -> np.ndarray:
    block = GOOD.copy()
    block[row] = values
    return block


def upsert(**changes: Any) -> UpsertRequest:
    fields: dict[str, Any] = {
        "collection": "docs",
        "name": NAME,
        "ids": ["a", "b", "c"],
        "vectors": GOOD,
    }
    return UpsertRequest(**{**fields, **changes})


def attributes(row: int, **values: Any) -> list[dict[str, Any]]:
    maps: list[dict[str, Any]] = [{}, {}, {}]
    maps[row] = values
    return maps


BAD: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("no points", {"ids": [], "vectors": GOOD[:0]}, "points", "1 to 1000 points"),
    (
        "too many points",
        {"ids": [str(i) for i in range(1001)], "vectors": np.ones((1001, 4), np.float32)},
        "points",
        "1 to 1000 points",
    ),
    ("fewer vectors", {"vectors": GOOD[:2]}, "vectors", None),
    ("dimension", {"vectors": np.ones((3, 5), np.float32)}, "points[0].vector", "dimension 4"),
    ("NaN", {"vectors": with_row(1, [1, NAN, 0, 0])}, "points[1].vector", "finite numbers"),
    ("inf", {"vectors": with_row(2, [1, 0, 0, INF])}, "points[2].vector", "finite numbers"),
    ("zero", {"vectors": with_row(1, [0, 0, 0, 0])}, "points[1].vector", "length above 0"),
    ("empty id", {"ids": ["a", "", "c"]}, "points[1].id", "1 to 256 bytes"),
    ("long id", {"ids": ["a", "b", "é" * 129]}, "points[2].id", "1 to 256 bytes"),
    ("lone surrogate", {"ids": ["a", "b", "\ud800"]}, "points[2].id", None),
    ("duplicate id", {"ids": ["a", "b", "a"]}, "points[2].id", "distinct ids in one request"),
    ("payload size", {"payloads": [b"", b'{"x":"' + b"y" * 262_144 + b'"}', b""]},
     "points[1].payload", "262144 bytes"),
    ("payload not JSON", {"payloads": [b"", b"", b"{x}"]}, "points[2].payload", None),
    ("payload not an object", {"payloads": [b"[1]", b"", b""]}, "points[0].payload", None),
    ("payload not UTF-8", {"payloads": [b"\xff", b"", b""]}, "points[0].payload", None),
    ("payload UTF-16", {"payloads": ['{"a":1}'.encode("utf-16"), b"", b""]},
     "points[0].payload", None),
    ("payload NaN", {"payloads": [b'{"a":NaN}', b"", b""]}, "points[0].payload", None),
    ("payload nested", {"payloads": [b'{"a":' + b"[" * 100_000, b"", b""]},
     "points[0].payload", None),
    ("undeclared attribute", {"attributes": attributes(1, colour="x")},
     "points[1].attributes", None),
    ("attribute type", {"attributes": attributes(2, size="x")},
     "points[2].attributes.size", None),
    ("keyword size", {"attributes": attributes(0, section="x" * 1025)},
     "points[0].attributes.section", None),
    ("attributes not parallel", {"attributes": [{}]}, "attributes", None),
    ("payloads not parallel", {"payloads": [b""]}, "payloads", None),
    ("conditions not parallel", {"if_seqs": [1]}, "conditions", None),
    ("other model", {"model": EmbeddingModel(name="m", version="2")}, "model", None),
    ("source id", {"provenance": [Provenance(source_id="x" * 1025)] + [Provenance()] * 2},
     "points[0].provenance.source_id", "1024 bytes"),
    ("no client", {"name": RequestName("", 1)}, "request_id.client_id", "1 to 64 bytes"),
    ("slash in client", {"name": RequestName("a/m0", 1)}, "request_id.client_id", None),
    ("request number", {"name": RequestName("a", 0)}, "request_id.request_no", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field", "limit"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_a_bad_upsert_names_point_and_limit(
    changes: dict[str, Any], field: str, limit: str | None
) -> None:
    async def scenario() -> None:
        cluster = FakeCluster(FakeClock())
        schema = a_schema(model=EmbeddingModel(name="m", version="1"))
        cluster.add_collection(schema, [["a"]])
        writer = Writer(caller=cluster, topology=cluster, clock=cluster.clock)
        with pytest.raises(InvalidRequest) as caught:
            await writer.upsert(upsert(**changes), timeout_s=5)
        assert caught.value.field == field
        assert limit is None or caught.value.limit == limit
        assert caught.value.outcome is Outcome.NOT_APPLIED
        assert cluster.calls == []

    asyncio.run(scenario())


def test_the_partition_attribute_must_be_there() -> None:
    schema = a_schema(shards=2, partition_by="section")
    request = upsert(attributes=[{"section": "x"}, {"size": 1}, {"section": "y"}])
    with pytest.raises(InvalidRequest, match="chooses the shard") as caught:
        encode_tails(request, schema, check_batch(request, schema), rows=range(3), tails=Tails())
    assert caught.value.field == "points[1].attributes.section"


def test_a_part_that_exceeds_one_record_is_refused() -> None:
    async def scenario() -> None:
        cluster = FakeCluster(FakeClock())
        cluster.add_collection(a_schema(dimension=4096), [["a"]])
        writer = Writer(caller=cluster, topology=cluster, clock=cluster.clock)
        request = upsert(ids=[str(i) for i in range(600)], vectors=np.ones((600, 4096), np.float32))
        with pytest.raises(InvalidRequest, match="send fewer than 600 points") as caught:
            await writer.upsert(request, timeout_s=5)
        assert caught.value.field == "points"

    asyncio.run(scenario())


def test_rows_keep_what_was_given() -> None:
    schema = a_schema()
    provenance = Provenance(source_id="file:1", source_version="v2", embedded_at_ms=5)
    request = upsert(
        vectors=with_row(1, [0, 3, 4, 0]),
        attributes=attributes(1, section="net", tags=["x", "y", "x"]),
        payloads=[b"", b'{"n": ' + b"9" * 100_000 + b"}", b""],
        provenance=[Provenance(), provenance, Provenance()],
    )
    batch, tails = check_batch(request, schema), Tails()
    encode_tails(request, schema, batch, rows=range(2), tails=tails)
    encode_tails(request, schema, batch, rows=range(2, 3), tails=tails)
    assert batch.vectors[1].tolist() == pytest.approx([0, 0.6, 0.8, 0])
    norm, given, payload, origin = decode_tail(tails.encoded[1])
    assert norm == pytest.approx(5)
    assert given == {"section": "net", "tags": ["x", "y"]}
    assert payload == request.payloads[1]
    assert origin == provenance
    assert decode_tail(tails.encoded[0])[1:] == ({}, b"", Provenance())
    assert batch.ids == [b"a", b"b", b"c"]


@given(st.lists(st.text(max_size=3).filter(lambda s: s.isprintable()), max_size=8))
def test_ids_pass_exactly_when_distinct_and_not_empty(ids: list[str]) -> None:
    request = upsert(ids=ids, vectors=np.ones((len(ids), 4), np.float32))
    good = bool(ids) and "" not in ids and len(set(ids)) == len(ids)
    if good:
        assert check_batch(request, a_schema()).ids == [i.encode() for i in ids]
    else:
        with pytest.raises(InvalidRequest):
            check_batch(request, a_schema())


def test_half_precision_rounds_what_is_stored() -> None:
    vectors = np.float32([[0.1, 1e-8, -3.0, 65_504.0]])
    schema = replace(a_schema(metric=Metric.DOT), storage=VectorStorage.FLOAT16)

    stored = check_batch(upsert(ids=["a"], vectors=vectors), schema).vectors

    assert stored.dtype == np.float32
    assert np.array_equal(stored, vectors.astype(np.float16))


def test_a_value_that_half_precision_cannot_hold_is_refused() -> None:
    vectors = np.float32([[0, 0, 0, 0], [0, 70_000, 0, 0]])
    schema = replace(a_schema(metric=Metric.DOT), storage=VectorStorage.FLOAT16)

    with pytest.raises(InvalidRequest, match="70000 at position 1") as caught:
        check_batch(upsert(ids=["a", "b"], vectors=vectors), schema)

    assert caught.value.field == "points[1].vector" and "65504" in (caught.value.limit or "")


def test_a_zero_vector_is_good_where_direction_does_not_count() -> None:
    request = upsert(vectors=np.zeros((3, 4), np.float32))
    batch = check_batch(request, a_schema(metric=Metric.DOT))
    assert (batch.norms == 1).all()
    assert msgpack.packb(float(batch.norms[0]))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"attributes": [{"section": "x"}, {}]}, "points[0].attributes.section"),
        ({"remove": ["section"]}, "points[0].attributes.section"),
        ({"attributes": [{"nope": 1}, {}]}, "points[0].attributes"),
        ({"remove": ["nope"]}, "remove"),
        ({"attributes": [{}, {}]}, "set"),
        ({"attributes": [{"size": 1}]}, "set"),
        ({"ids": ["a", "a"]}, "ids[1]"),
        ({"ids": []}, "ids"),
    ],
)
def test_a_bad_patch_names_its_field(changes: dict[str, Any], field: str) -> None:
    async def scenario() -> None:
        cluster = FakeCluster(FakeClock())
        cluster.add_collection(a_schema(shards=2, partition_by="section"), [["a"], ["a"]])
        writer = Writer(caller=cluster, topology=cluster, clock=cluster.clock)
        fields: dict[str, Any] = {
            "collection": "docs",
            "name": NAME,
            "ids": ["a", "b"],
            "attributes": [{"size": 1}, {}],
        }
        with pytest.raises(InvalidRequest) as caught:
            await writer.patch(PatchRequest(**{**fields, **changes}), timeout_s=5)
        assert caught.value.field == field
        assert cluster.calls == []

    asyncio.run(scenario())
