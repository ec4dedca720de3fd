"""Rows of a bulk load out of .parquet files and Arrow tables: types, what is refused, going on."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import shoal
from shoal import load_sources
from shoal.batches import Batch
from shoal.load_sources import batches_of_table, chunks_of
from shoal.loading import Load, digest_of
from shoal.session import Sessions
from shoal_protos.v1 import loads_pb2

ROWS = [[float(row), row + 0.5] for row in range(10)]
IDS = [f"p{row}" for row in range(10)]


@pytest.fixture(autouse=True)
def three_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_sources, "CHUNK_ROWS_MAX", 3)


def file_of(folder: Path, columns: dict[str, object], *, row_group_size: int = 100) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def cut(path: Path) -> list[Batch]:
    return list(chunks_of(path, ids=None, attributes=None, payloads=None).batches)


def test_a_file_brings_ids_vectors_payloads_and_attributes(tmp_path: Path) -> None:
    columns = {
        "vector": pa.array(ROWS, pa.list_(pa.float32())),
        "id": IDS,
        "payload": ['{"n":0}', None] * 5,
        "year": [2000, None] * 5,
        "tags": [["a", "b"]] * 10,
    }
    path = file_of(tmp_path, columns, row_group_size=5)

    chunks = chunks_of(path, ids=None, attributes=None, payloads=None)
    batches = list(chunks.batches)

    assert chunks.rows_total == 10
    assert [i for batch in batches for i in batch.ids] == IDS
    assert max(len(batch.ids) for batch in batches) == 3
    assert np.array_equal(np.concatenate([batch.vectors for batch in batches]), ROWS)
    assert list(batches[0].attributes or ()) == [
        {"year": 2000, "tags": ["a", "b"]},
        {"tags": ["a", "b"]},
        {"year": 2000, "tags": ["a", "b"]},
    ]
    assert list(batches[0].payloads or ()) == [b'{"n":0}', b"", b'{"n":0}']
    assert len(batches[0].to_rows().ids) == 3


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 2),
        pa.list_(pa.int64()),
    ],
)
def test_vectors_are_lists_of_any_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [[row, row + 1] for row in range(10)]
    array = pa.array(np.asarray(rows, dtype=kind.value_type.to_pandas_dtype()).tolist(), kind)

    batches = cut(file_of(tmp_path, {"id": IDS, "vector": array}))

    vectors = np.concatenate([batch.vectors for batch in batches])
    assert vectors.dtype == np.float32 and np.array_equal(vectors, rows)
    assert batches[0].attributes is None and batches[0].payloads is None


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(range(10), pa.int32()),
        pa.array(map(str, range(10)), pa.large_string()),
        pa.array(map(str, range(10))).dictionary_encode(),
    ],
)
def test_ids_are_texts_or_whole_numbers(tmp_path: Path, ids: pa.Array) -> None:
    batches = cut(file_of(tmp_path, {"id": ids, "vector": ROWS}))

    assert [i for batch in batches for i in batch.ids] == [str(row) for row in range(10)]


def test_tensors_of_arrow_tables_are_vectors() -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.asarray(ROWS, dtype=np.float32))
    half = pa.table({"id": IDS[:5], "vector": pa.chunked_array([tensors[:5]])})
    table = pa.concat_tables([half, pa.table({"id": IDS[5:], "vector": tensors[5:]})])

    batches = list(batches_of_table(table))

    assert np.array_equal(np.concatenate([batch.vectors for batch in batches]), ROWS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"vector": None}, r"the columns are \['id'\]"),
        ({"id": None}, r"the columns are \['vector'\]"),
        # Together as many values as if each had two.
        (
            {"vector": [*ROWS[:8], [1.0], [1.0, 2.0, 3.0]]},
            "2 values in one row and of 1 in another",
        ),
        ({"vector": [*ROWS[:9], None]}, "vector is in part null"),
        ({"vector": [*ROWS[:9], [1.0, None]]}, "vector is in part null"),
        ({"vector": [1.0] * 10}, "vector is double"),
        ({"vector": [["a", "b"]] * 10}, "vector is list<"),
        ({"vector": [[]] * 10}, "vector is list<"),
        ({"id": [*IDS[:9], None]}, "id is in part null"),
        ({"id": [1.5] * 10}, "id is double"),
        ({"payload": [{"a": 1}] * 10}, "payload is struct"),
    ],
)
def test_columns_that_are_no_rows_are_refused_by_name(
    tmp_path: Path, columns: dict[str, object], message: str
) -> None:
    given = {"id": IDS, "vector": ROWS, **columns}
    table = pa.table({name: column for name, column in given.items() if column is not None})
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path)

    with pytest.raises(shoal.InvalidRequest, match=message):
        list(batches_of_table(table))
    with pytest.raises(shoal.InvalidRequest, match="column"):
        cut(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"id": IDS, "vector": ROWS})
    whole = path.read_bytes()
    damaged = whole[:4] + bytes(255 - byte for byte in whole[4:200]) + whole[200:]
    for contents in (b"", whole[:-20], damaged):
        path.write_bytes(contents)
        with pytest.raises(shoal.InvalidRequest, match="cannot be read"):
            cut(path)
    with pytest.raises(shoal.InvalidRequest, match="cannot be read"):
        cut(tmp_path / "missing.parquet")
    with pytest.raises(shoal.InvalidRequest, match="holds no rows"):
        cut(file_of(tmp_path, {"id": pa.array([], pa.string()), "vector": pa.array([])}))


def test_an_interrupted_load_of_a_file_goes_on_with_the_chunks_that_are_missing(
    tmp_path: Path,
) -> None:
    path = file_of(tmp_path, {"id": IDS, "vector": ROWS}, row_group_size=4)
    staged = [
        loads_pb2.StagedChunk(name=f"0-{number:08d}", digest=digest_of(batch))
        for number, batch in enumerate(cut(path)[:2])
    ]

    def staging(source: Path) -> list[str]:
        load = Load(
            "notes",
            chunks_of(source, ids=None, attributes=None, payloads=None),
            load_id="l1",
            model=None,
            progress=None,
            sessions=Sessions(),
        )
        load.describe().decode(loads_pb2.DescribeLoadResponse(chunks=staged))
        sent = [call.request.chunk for call in load.stages()]
        assert load.names == [f"0-{number:08d}" for number in range(len(cut(source)))]
        return sent

    assert staging(path) == [f"0-{number:08d}" for number in range(2, len(cut(path)))]
    file_of(tmp_path, {"id": IDS, "vector": ROWS[::-1]}, row_group_size=4)
    with pytest.raises(shoal.Conflict, match="the source has changed"):
        staging(path)
