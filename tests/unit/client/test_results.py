import json

import numpy as np
import pytest

from shoal import Corrupt, Internal, Provenance
from shoal.results import SearchResult, page_read, points_of
from shoal.schema import CollectionSchema, schema_from_proto, schema_to_proto
from shoal_protos.columns import encode_columns
from shoal_protos.v1 import collections_pb2, points_pb2, search_pb2, types_pb2
from tests.unit.client.fake_server import token

VECTORS = np.float32([[1, 0], [0, 1]])


def rows() -> types_pb2.Rows:
    return types_pb2.Rows(
        ids=["a", "b"],
        vectors=VECTORS.tobytes(),
        dimension=2,
        attributes=encode_columns([{"n": 1}, {"n": 2, "tags": ["x"]}]),
        payloads=[json.dumps({"text": "hello"}).encode(), b""],
        provenance=[types_pb2.Provenance(source_id="doc"), types_pb2.Provenance()],
        seqs=[7, 9],
    )


def result(found: search_pb2.QueryHits, explain: search_pb2.Explain | None = None) -> SearchResult:
    response = search_pb2.SearchResponse(
        results=[found], as_of=token(s0=(1, 9)), staleness_ms=4, explain=explain
    )
    return SearchResult(response.results[0], response)


def test_hits_are_put_together_from_the_arrays() -> None:
    found = result(search_pb2.QueryHits(scores=[0.9, 0.25], rows=rows()))
    first, second = found.hits
    assert (first.id, second.id) == ("a", "b")
    assert first.score == pytest.approx(0.9) and second.score == 0.25
    assert (first.seq, second.seq) == (7, 9)
    assert second.attributes == {"n": 2, "tags": ["x"]}
    assert first.payload == {"text": "hello"} and second.payload is None
    assert first.provenance == Provenance(source_id="doc") and second.provenance is None
    assert (second.vector == VECTORS[1]).all()
    assert found.ids == ["a", "b"]
    assert found.scores.dtype == np.float32
    assert len(found) == 2 and [hit.id for hit in found] == ["a", "b"]
    assert found.as_of.positions[0] == (1, 9) and found.staleness_ms == 4


def test_what_was_not_asked_for_is_empty() -> None:
    bare = search_pb2.QueryHits(scores=[0.5], rows=types_pb2.Rows(ids=["a"], seqs=[1]))
    (hit,) = result(bare).hits
    assert (hit.attributes, hit.payload, hit.vector, hit.provenance) == ({}, None, None, None)
    assert result(bare).explain is None


def test_no_hits_is_an_answer() -> None:
    empty = result(search_pb2.QueryHits())
    assert empty.hits == [] and len(empty) == 0 and empty.scores.shape == (0,)


def test_explain_is_given_when_it_came() -> None:
    explained = result(search_pb2.QueryHits(), search_pb2.Explain(recall_target=0.98))
    assert explained.explain is not None and explained.explain.recall_target == 0.98


def test_read_points_can_be_written_back() -> None:
    first, second = points_of(rows())
    assert (first.id, first.seq, first.payload) == ("a", 7, {"text": "hello"})
    assert second.attributes == {"n": 2, "tags": ["x"]}


@pytest.mark.parametrize("payload", [b"{", b"[1]", b"\xff"])
def test_a_payload_that_is_no_json_object_is_corrupt_by_name(payload: bytes) -> None:
    with pytest.raises(Corrupt, match="'a'"):
        points_of(types_pb2.Rows(ids=["a"], payloads=[payload]))


@pytest.mark.parametrize(
    "rows",
    [
        types_pb2.Rows(ids=["a"], vectors=b"\0" * 4, dimension=2),
        types_pb2.Rows(ids=["a"], seqs=[1, 2]),
        types_pb2.Rows(ids=["a", "b"], payloads=[b""]),
        types_pb2.Rows(ids=["a"], attributes=encode_columns([{"n": 1}, {"n": 2}])),
    ],
    ids=["vectors", "seqs", "payloads", "attributes"],
)
def test_rows_that_contradict_themselves_are_the_servers_bug(rows: types_pb2.Rows) -> None:
    with pytest.raises(Internal):
        points_of(rows)


def test_hits_without_scores_are_the_servers_bug() -> None:
    with pytest.raises(Internal):
        _ = result(search_pb2.QueryHits(scores=[1.0], rows=rows())).hits


def test_the_last_page_has_no_cursor() -> None:
    assert page_read(points_pb2.ScrollResponse(next_cursor=b"x")).cursor == b"x"
    assert page_read(points_pb2.ScrollResponse()).cursor is None


def test_a_schema_survives_the_wire() -> None:
    schema = CollectionSchema(
        name="notes",
        dimension=3,
        metric="l2",
        attributes={"section": "keyword", "at": "timestamp"},
        partition_by="section",
        shards=4,
        replicas=2,
        recall_target=0.98,
        model=("mini", "2"),
        chunking_rule="paragraphs",
        recall_sample_share=0.0,
    )
    assert schema_from_proto(schema_to_proto(schema)) == schema


def test_a_metric_of_a_later_version_is_named() -> None:
    with pytest.raises(Internal, match="does not know"):
        schema_from_proto(collections_pb2.CollectionSchema(name="n"))
