"""The attribute codec that SDK and server share."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_protos.columns import ColumnError, decode_columns, encode_columns, timestamp_ms
from shoal_protos.v1 import types_pb2

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES = st.one_of(
    TEXT, INT64, st.floats(allow_nan=False), st.booleans(), st.lists(TEXT, max_size=3)
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["section", "size", "tags"]), VALUES, max_size=3), max_size=12
)


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_rows_come_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    columns = encode_columns(rows)
    wire = types_pb2.Rows(attributes=columns).SerializeToString()
    back = decode_columns(types_pb2.Rows.FromString(wire).attributes, len(rows))
    assert back == rows
    # == is blind to 1 == 1.0 == True, which are three types to Shoal.
    assert [[type(v) for _, v in sorted(row.items())] for row in back] == [
        [type(v) for _, v in sorted(row.items())] for row in rows
    ]


def test_a_column_that_every_row_has_names_no_rows() -> None:
    full, partial = encode_columns([{"a": 1, "b": "x"}, {"a": 2}])
    assert (full.name, list(full.rows)) == ("a", [])
    assert (partial.name, list(partial.rows)) == ("b", [0])


def test_none_and_absent_rows_are_missing_values() -> None:
    assert encode_columns([None, {}, {"a": None}]) == []


def test_numpy_scalars_and_datetimes_become_their_plain_kinds() -> None:
    row = {
        "i": np.int16(3),
        "f": np.float32(0.5),
        "b": np.bool_(False),
        "t": datetime(1970, 1, 2, tzinfo=UTC),
    }
    columns = encode_columns([row])
    kinds = {column.name: column.WhichOneof("values") for column in columns}
    assert kinds == {"i": "int", "f": "float", "b": "bool", "t": "timestamp"}
    assert decode_columns(columns, 1) == [{"i": 3, "f": 0.5, "b": False, "t": 86_400_000}]


def test_ints_of_declared_timestamps_travel_as_timestamps() -> None:
    (column,) = encode_columns([{"t": 5}], timestamps={"t"})
    assert column.WhichOneof("values") == "timestamp"


def test_timestamps_before_1970_round_down_exactly() -> None:
    assert timestamp_ms(datetime(1969, 12, 31, 23, 59, 59, 999_500, tzinfo=UTC)) == -1
    assert timestamp_ms(datetime(2262, 4, 11, 23, 47, 16, 854_000, tzinfo=UTC)) == 9223372036854


@pytest.mark.parametrize(
    "value", [object(), {"a": 1}, ["a", 1], 2**63, datetime(2024, 1, 1), b"x", "\ud800"]
)
def test_a_value_that_cannot_travel_names_its_attribute(value: Any) -> None:
    with pytest.raises(ColumnError) as caught:
        encode_columns([{"a": 1}, {"bad": value}])
    assert caught.value.attribute == "bad"


def column(rows: list[int], values: list[int]) -> types_pb2.AttributeColumn:
    return types_pb2.AttributeColumn(name="a", rows=rows, int=types_pb2.IntValues(values=values))


@pytest.mark.parametrize(
    "columns",
    [
        [column([0, 1], [1])],
        [column([], [1])],
        [column([1, 0], [1, 2])],
        [column([0, 0], [1, 2])],
        [column([0, 2], [1, 2])],
        [column([0], [1]), column([0], [2])],
        [types_pb2.AttributeColumn(name="a")],
        [
            types_pb2.AttributeColumn(
                name="a",
                rows=[0],
                keyword_list=types_pb2.KeywordListValues(values=["x", "y"], lengths=[1]),
            )
        ],
    ],
    ids=[
        "too few values",
        "not every row",
        "descending",
        "twice",
        "no such row",
        "two values",
        "no values",
        "lengths",
    ],
)
def test_a_column_that_contradicts_itself_is_refused(
    columns: list[types_pb2.AttributeColumn],
) -> None:
    with pytest.raises(ColumnError) as caught:
        decode_columns(columns, 2)
    assert caught.value.attribute == "a"
