"""Attributes of a batch of rows, as parallel columns: the codec that SDK and server share.

Rows of a batch mostly have the same attributes, so a column (name once, values packed) is smaller
than a map a row and decodes several times faster. The kind of a column follows the Python type of
its values; the server checks it against the declared type.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from shoal_protos.v1 import types_pb2

AttributeValue = str | list[str] | int | float | bool
"""Value of one attribute as it is read; a timestamp is an int of ms since 1970-01-01 UTC."""


class ColumnError(ValueError):
    """Says which attribute of which row cannot be carried, or which column contradicts itself.

    attribute: its name. row: number within the batch, None when the column as a whole is wrong.
    """

    def __init__(self, message: str, *, attribute: str, row: int | None = None) -> None:
        super().__init__(message)
        self.attribute = attribute
        self.row = row


def timestamp_ms(moment: datetime) -> int:
    """Returns milliseconds since 1970-01-01 UTC, rounded down.

    Raises: ValueError when `moment` has no time zone, because its meaning would depend on the
    machine.
    """
    if moment.utcoffset() is None:
        raise ValueError(f"datetime {moment.isoformat()} has no time zone; give it one")
    # timedelta // timedelta is exact, unlike timestamp() * 1000, which rounds through a float.
    return (moment - _EPOCH) // _MILLISECOND


_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_MILLISECOND = datetime.fromisoformat("1970-01-01T00:00:00.001+00:00") - _EPOCH

_FIELD_OF_TYPE: dict[type, str] = {
    str: "keyword",
    bool: "bool",
    int: "int",
    float: "float",
    list: "keyword_list",
    tuple: "keyword_list",
    datetime: "timestamp",
}


def encode_columns(
    rows: Sequence[Mapping[str, object] | None], *, timestamps: Collection[str] = ()
) -> list[types_pb2.AttributeColumn]:
    """Returns the attributes of `rows` as columns, ordered by first appearance.

    A row that is None or empty has no attributes; a value that is None is missing. Accepts str,
    bool, int, float, list or tuple of str, datetime with a time zone, and numpy scalars.
    timestamps: attributes whose ints are timestamps, for a caller that knows the declared types.
    Raises: ColumnError naming attribute and row.
    """
    columns: dict[tuple[str, str], tuple[list[int], list[Any]]] = {}
    for number, row in enumerate(rows):
        if not row:
            continue
        for name, value in row.items():
            if value is None:
                continue
            field = _FIELD_OF_TYPE.get(type(value))
            if field is None:
                value, field = _unusual(name, value, number)
            if field == "int" and name in timestamps:
                field = "timestamp"
            column = columns.get((name, field))
            if column is None:
                column = columns[name, field] = ([], [])
            column[0].append(number)
            column[1].append(value)
    return [
        _encode_column(name, field, numbers, values, len(rows))
        for (name, field), (numbers, values) in columns.items()
    ]


def _unusual(name: str, value: object, row: int) -> tuple[object, str]:
    """Returns (plain value, column kind) of a value whose exact type is not a common one."""
    if isinstance(value, np.generic):
        value = value.item()
    for kind, field in _FIELD_OF_TYPE.items():
        if isinstance(value, kind):
            return value, field
    raise ColumnError(
        f"attribute {name!r} of row {row} is a {type(value).__name__}; it must be str, bool, int, "
        "float, datetime or a list of str",
        attribute=name,
        row=row,
    )


def _encode_column(
    name: str, field: str, numbers: list[int], values: list[Any], count: int
) -> types_pb2.AttributeColumn:
    try:
        column = types_pb2.AttributeColumn(name=name, rows=() if len(numbers) == count else numbers)
        if field == "keyword_list":
            column.keyword_list.lengths.extend(map(len, values))
            for value in values:
                column.keyword_list.values.extend(value)
        elif field == "timestamp":
            column.timestamp.values_ms.extend(
                timestamp_ms(value) if isinstance(value, datetime) else value for value in values
            )
        else:
            getattr(column, field).values.extend(values)
    except (TypeError, ValueError) as error:
        raise ColumnError(
            f"attribute {name!r} has a value that cannot be sent: {error}", attribute=str(name)
        ) from error
    return column


def decode_columns(
    columns: Iterable[types_pb2.AttributeColumn], count: int
) -> list[dict[str, AttributeValue]]:
    """Returns one dict a row, `count` of them, in order; reverses `encode_columns`.

    Raises: ColumnError when a column names rows that do not exist or are out of order, has another
    number of values than rows, or gives a row a second value for an attribute.
    """
    rows: list[dict[str, AttributeValue]] = [{} for _ in range(count)]
    for column in columns:
        name = column.name
        values = _column_values(column)
        numbers: Sequence[int] = column.rows or range(count)
        if len(values) != len(numbers):
            raise ColumnError(
                f"column {name!r} has {len(values)} values for {len(numbers)} rows", attribute=name
            )
        if column.rows:
            _check_row_numbers(name, column.rows, count)
        for number, value in zip(numbers, values, strict=True):
            row = rows[number]
            if name in row:
                raise ColumnError(
                    f"row {number} has two values for attribute {name!r}",
                    attribute=name,
                    row=number,
                )
            row[name] = value
    return rows


def _check_row_numbers(name: str, numbers: Sequence[int], count: int) -> None:
    previous = -1
    for number in numbers:
        if not previous < number < count:
            raise ColumnError(
                f"column {name!r} names row {number} after row {previous} of {count}; row numbers "
                "must ascend and exist",
                attribute=name,
                row=number,
            )
        previous = number


def _lists(column: types_pb2.AttributeColumn) -> list[AttributeValue]:
    flat = list(column.keyword_list.values)
    lists: list[AttributeValue] = []
    start = 0
    for length in column.keyword_list.lengths:
        lists.append(flat[start : start + length])
        start += length
    if start != len(flat):
        raise ColumnError(
            f"column {column.name!r} has {len(flat)} keywords, its lengths add up to {start}",
            attribute=column.name,
        )
    return lists


_VALUES: dict[str, Callable[[types_pb2.AttributeColumn], list[AttributeValue]]] = {
    "keyword": lambda column: list(column.keyword.values),
    "keyword_list": _lists,
    "int": lambda column: list(column.int.values),
    "float": lambda column: list(column.float.values),
    "bool": lambda column: list(column.bool.values),
    "timestamp": lambda column: list(column.timestamp.values_ms),
}


def _column_values(column: types_pb2.AttributeColumn) -> list[AttributeValue]:
    field = column.WhichOneof("values")
    if field is None:
        raise ColumnError(f"column {column.name!r} has no values", attribute=column.name)
    return _VALUES[field](column)
