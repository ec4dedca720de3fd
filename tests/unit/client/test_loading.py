"""A bulk load in the SDK: how a source is cut, what is sent again, and what is not."""

import json
from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal import load_sources
from shoal.load_sources import CHUNK_ROWS_MAX, chunks_of, rows_a_chunk
from shoal.loading import Load, digest_of
from shoal.session import Sessions
from shoal_protos.v1 import loads_pb2
from tests.unit.client.conftest import Connect
from tests.unit.client.fake_server import FakeServer, refuse

VECTORS = np.arange(20, dtype=np.float32).reshape(10, 2)


def cut(source: object, **columns: object) -> list:
    given = {"ids": None, "attributes": None, "payloads": None, **columns}
    return list(chunks_of(source, **given).batches)  # type: ignore[arg-type]


def load_of(source: object, told: list | None = None) -> Load:
    return Load(
        "notes",
        chunks_of(source, ids=None, attributes=None, payloads=None),  # type: ignore[arg-type]
        load_id="l1",
        model=None,
        progress=None if told is None else told.append,
        sessions=Sessions(),
    )


@pytest.fixture
def three_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_sources, "CHUNK_ROWS_MAX", 3)


def test_a_chunk_has_so_many_rows_that_its_vectors_are_8_mib_at_most() -> None:
    assert rows_a_chunk(2) == CHUNK_ROWS_MAX
    assert rows_a_chunk(4096) * 4096 * 4 == 8 * 1024 * 1024


def test_a_mapped_file_is_cut_like_the_array_and_named_by_row_numbers(
    three_a_chunk: None, tmp_path: Path
) -> None:
    np.save(tmp_path / "v.npy", VECTORS)
    for source in (VECTORS, str(tmp_path / "v.npy"), tmp_path / "v.npy"):
        batches = cut(source)
        assert [len(batch.ids) for batch in batches] == [3, 3, 3, 1]
        assert [i for batch in batches for i in batch.ids] == [str(i) for i in range(10)]
        assert np.array_equal(np.concatenate([batch.vectors for batch in batches]), VECTORS)


def test_json_lines_bring_ids_attributes_and_payloads(three_a_chunk: None, tmp_path: Path) -> None:
    rows = [
        {"id": f"p{i}", "vector": VECTORS[i].tolist(), "attributes": {"n": i}, "payload": {"i": i}}
        for i in range(5)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = cut(file)
    assert [list(batch.ids) for batch in batches] == [["p0", "p1", "p2"], ["p3", "p4"]]
    assert batches[1].attributes == [{"n": 3}, {"n": 4}]
    assert batches[1].payloads == [b'{"i":3}', b'{"i":4}']
    file.write_text('{"id": "a", "vector": [1, 2]}\n{"id": 7, "vector": [1, 2]}\n')
    with pytest.raises(shoal.InvalidRequest, match=r"line 2 of rows.jsonl is no row"):
        cut(file)


@pytest.mark.parametrize(
    ("source", "columns", "field"),
    [
        (VECTORS, {"ids": ["a"]}, "ids"),
        (np.zeros(3, dtype=np.float32), {}, "vectors"),
        ("rows.csv", {}, "source"),
        ("missing.npy", {}, "source"),
        ("missing.jsonl", {}, "source"),
        ("rows.jsonl", {"ids": ["a"]}, "ids"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(source, columns, field) -> None:
    with pytest.raises(shoal.InvalidRequest) as caught:
        cut(source, **columns)
    assert caught.value.field == field


def test_what_is_staged_is_not_sent_again_and_a_changed_source_is_refused(
    three_a_chunk: None,
) -> None:
    told: list[shoal.LoadProgress] = []
    first = cut(VECTORS)[0]
    staged = loads_pb2.StagedChunk(name="0-00000000", digest=digest_of(first))
    load = load_of(VECTORS, told)
    load.describe().decode(loads_pb2.DescribeLoadResponse(chunks=[staged]))
    calls = list(load.stages())
    assert [call.request.chunk for call in calls] == [f"0-0000000{i}" for i in (1, 2, 3)]
    assert (told[-1].rows_staged, told[-1].rows_skipped, told[-1].rows_total) == (3, 3, 10)
    assert list(load.commit().request.chunks) == [f"0-0000000{i}" for i in range(4)]
    changed = load_of(VECTORS + 1)
    changed.describe().decode(loads_pb2.DescribeLoadResponse(chunks=[staged]))
    with pytest.raises(shoal.Conflict, match="the source has changed"):
        list(changed.stages())


def test_a_decided_load_is_only_committed_and_an_aborted_one_refused() -> None:
    load = load_of(VECTORS)
    load.describe().decode(loads_pb2.DescribeLoadResponse(committing=True))
    assert load.is_decided
    assert not load.commit().decode(loads_pb2.CommitLoadResponse(segments_total=2))
    assert load.commit().decode(loads_pb2.CommitLoadResponse(committed=True, rows=10))
    assert load.result == shoal.LoadResult(load_id="l1", rows=10)
    with pytest.raises(shoal.Conflict, match="aborted"):
        load.describe().decode(loads_pb2.DescribeLoadResponse(aborted=True))


@pytest.mark.parametrize("load_id", ["", "A", "a/b", "-a", "x" * 65])
def test_a_load_id_is_a_name(load_id: str) -> None:
    with pytest.raises(shoal.InvalidRequest) as caught:
        shoal.Client("127.0.0.1:1").load("notes", VECTORS, load_id=load_id)
    assert caught.value.field == "load_id"


def test_both_clients_stage_every_chunk_and_ask_until_it_is_committed(
    connect: Connect, server: FakeServer, three_a_chunk: None
) -> None:
    server.script["StageChunk"].append(refuse("unavailable"))
    told: list[shoal.LoadProgress] = []
    client = connect(server.address)
    result = client.load("notes", VECTORS, load_id="l1", progress=told.append)
    sent = server.requests["StageChunk"]
    chunks = sorted({each.chunk for each in sent})
    assert chunks == [f"0-0000000{i}" for i in range(4)] and len(sent) == 5, "one went again"
    assert [list(each.chunks) for each in server.requests["CommitLoad"]] == [chunks] * 2
    assert result.load_id == "l1"
    assert (told[-2].segments_done, told[-2].segments_total) == (1, 2)
    assert client.collection("notes").session.positions, "the load is part of the session"
    client.abort_load("notes", "l2")
    assert server.requests["AbortLoad"][0].load_id == "l2"


def test_a_load_that_fails_says_under_which_id_it_goes_on(
    connect: Connect, server: FakeServer, three_a_chunk: None
) -> None:
    steps = [refuse("invalid_request"), refuse("invalid_request")]
    server.script["StageChunk"].extend(steps)
    with pytest.raises(shoal.InvalidRequest, match=r"load l1: \d+ rows are staged"):
        connect(server.address).load("notes", VECTORS, load_id="l1")
    assert not server.requests["CommitLoad"]
