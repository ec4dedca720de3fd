"""What the user gives, on its way to a request: shapes, types and sizes, refused before sending."""

from typing import Any

import numpy as np
import pytest

from shoal import InvalidRequest, Point, Provenance
from shoal.batches import (
    PointArrays,
    batch_of_arrays,
    batch_of_points,
    batches_of_arrays,
    batches_of_points,
    conditions_of,
    payload_to_json,
    points_or_arrays,
)
from shoal.vectors import from_wire, to_vector, to_vectors


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, ">f4"])
def test_vectors_of_any_numeric_dtype_become_little_endian_float32(dtype: Any) -> None:
    array = to_vectors(np.array([[1, 2], [3, 4]], dtype=dtype), field="vectors")
    assert array.tobytes() == np.array([[1, 2], [3, 4]], dtype="<f4").tobytes()


def test_a_strided_view_is_sent_in_row_order() -> None:
    view = np.arange(6, dtype=np.float32).reshape(3, 2).T
    assert to_vectors(view, field="vectors").tobytes() == np.float32([0, 2, 4, 1, 3, 5]).tobytes()


def test_vectors_survive_the_wire() -> None:
    array = np.float32([[1, 2, 3], [4, 5, 6]])
    assert (from_wire(to_vectors(array, field="v").tobytes(), 3, 2) == array).all()


@pytest.mark.parametrize(
    "vector",
    [[[1.0, 2.0]], [], 1.0, "abc", [1j], [True, False], [None], None, [[1.0], [1.0, 2.0]]],
)
def test_a_query_that_is_no_vector_is_refused(vector: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_vector(vector, field="vector")
    assert caught.value.field == "vector"
    assert caught.value.outcome == "not_applied"


@pytest.mark.parametrize("vectors", [[1.0, 2.0], [[1.0], [1.0, 2.0]], [[]], np.zeros((1, 2, 3))])
def test_a_batch_that_is_no_matrix_is_refused(vectors: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_vectors(vectors, field="vectors")
    assert caught.value.field == "vectors"


def test_points_become_parallel_arrays() -> None:
    points = [
        Point(id="a", vector=[1, 0], attributes={"n": 1}, payload={"text": "é"}),
        Point(id="b", vector=np.float64([0, 1]), provenance=Provenance(source_id="doc")),
    ]
    rows = batch_of_points(points).to_rows()
    assert list(rows.ids) == ["a", "b"]
    assert (from_wire(rows.vectors, rows.dimension, 2) == [[1, 0], [0, 1]]).all()
    assert list(rows.payloads) == ['{"text":"é"}'.encode(), b""]
    assert list(rows.attributes[0].rows) == [0]
    assert [each.source_id for each in rows.provenance] == ["", "doc"]


def test_what_no_point_has_is_not_sent() -> None:
    rows = batch_of_points([Point(id="a", vector=[1, 0])]).to_rows()
    assert not rows.payloads and not rows.provenance and not rows.attributes


@pytest.mark.parametrize(
    ("points", "field"),
    [
        ([Point(id="a", vector=[1, 0]), Point(id="b")], "points[1].vector"),
        ([Point(id="a", vector=[1, 0]), Point(id="b", vector=[1])], "points[1].vector"),
        ([Point(id="a", vector=[1, 0], payload={"x": {1}})], "points[0].payload"),
        ([Point(id="a", vector=[1, 0], payload={"x": float("nan")})], "points[0].payload"),
        ([Point(id="a", vector=[1, 0]), {"id": "b"}], "points[1]"),
        ([Point(id=7, vector=[1, 0])], "ids[0]"),  # type: ignore[arg-type]
        ([Point(id="a", vector=[1, 0], attributes={"n": object()})], "attributes.n"),
        ([], "points"),
    ],
)
def test_the_error_names_the_point_at_fault(points: list[Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        batch_of_points(points).to_rows()
    assert caught.value.field == field


def test_the_number_of_a_faulty_point_counts_from_the_start_of_the_upload() -> None:
    points = [Point(id=str(n), vector=[1, 0]) for n in range(25)] + [Point(id="x")]
    with pytest.raises(InvalidRequest) as caught:
        list(batches_of_points(points, batch_size=10, bytes_max=10**6))
    assert caught.value.field == "points[25].vector"


@pytest.mark.parametrize("field", ["vectors", "attributes", "payloads", "provenance"])
def test_arrays_of_different_lengths_are_refused_by_name(field: str) -> None:
    arrays: dict[str, Any] = {
        "ids": ["a", "b"],
        "vectors": np.ones((2, 3)),
        "attributes": [{}, {}],
        "payloads": [None, None],
        "provenance": [None, None],
    }
    arrays[field] = arrays[field][:1]
    with pytest.raises(InvalidRequest) as caught:
        batch_of_arrays(PointArrays(**arrays))
    assert caught.value.field == field


def test_points_and_arrays_exclude_each_other() -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("ids", "vectors", "attributes", "payloads", "provenance")
    )
    for points, given in (
        ([Point(id="a")], nothing | {"ids": ["a"]}),
        (None, nothing),
        (None, nothing | {"ids": ["a"]}),
    ):
        with pytest.raises(InvalidRequest):
            points_or_arrays(points, **given)


@pytest.mark.parametrize("as_points", [True, False])
def test_batches_hold_every_row_once_in_order_within_both_bounds(as_points: bool) -> None:
    ids = [f"p{n}" for n in range(1003)]
    payloads = [{"text": "x" * (n % 400)} for n in range(1003)]
    vectors = np.arange(1003 * 4, dtype=np.float32).reshape(1003, 4)
    if as_points:
        points = (
            Point(id=i, vector=v, payload=p) for i, v, p in zip(ids, vectors, payloads, strict=True)
        )
        batches = list(batches_of_points(points, batch_size=100, bytes_max=10_000))
    else:
        arrays = PointArrays(ids=ids, vectors=vectors, payloads=payloads)
        batches = list(batches_of_arrays(arrays, batch_size=100, bytes_max=10_000))
    assert [i for batch in batches for i in batch.ids] == ids
    assert (np.concatenate([batch.vectors for batch in batches]) == vectors).all()
    assert max(len(batch.ids) for batch in batches) <= 100
    assert max(batch.to_rows().ByteSize() for batch in batches) <= 10_000


def test_a_payload_may_be_given_as_json_bytes() -> None:
    assert payload_to_json(b'{"a":1}', field="p") == b'{"a":1}'
    with pytest.raises(InvalidRequest):
        payload_to_json("text", field="p")  # type: ignore[arg-type]


def test_conditions_are_one_a_row() -> None:
    assert conditions_of(2, if_absent=False, if_seq=None) == []
    assert [c.if_absent for c in conditions_of(2, if_absent=True, if_seq=None)] == [True, True]
    first, second = conditions_of(2, if_absent=False, if_seq=[0, None])
    assert (first.WhichOneof("condition"), first.if_seq) == ("if_seq", 0)
    assert second.WhichOneof("condition") is None
    with pytest.raises(InvalidRequest):
        conditions_of(2, if_absent=False, if_seq=[1])
    with pytest.raises(InvalidRequest):
        conditions_of(1, if_absent=True, if_seq=[1])
