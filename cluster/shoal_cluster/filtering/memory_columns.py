"""The attribute index of a memtable: the growing twin of columns.py, rebuilt from the WAL.

Values are appended to plain arrays and every condition is one numpy pass over them: with at most
MEMTABLE_ROWS_MAX rows that takes some 10 µs, and nothing has to be kept sorted.

One thread appends; others may evaluate meanwhile. A row counts only once its number is published,
and arrays are replaced when they grow, never resized, so a reader's views stay valid.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.domain.errors import Internal
from shoal_cluster.domain.schema import AttributeType, AttributeValue
from shoal_cluster.filtering import algebra, bitmaps
from shoal_cluster.filtering.algebra import COMPARED, Between, Bounds, Condition
from shoal_cluster.filtering.bitmaps import Mask
from shoal_cluster.filtering.expression import (
    AllOf,
    AnyOf,
    Comparison,
    Exists,
    Expression,
    In,
    Operator,
)
from shoal_cluster.filtering.literals import NUMBER_TYPES, Scalar, show_names

_CAPACITY_FIRST = 256
"""Rows the arrays start with; they double. Small, since most shards of a cluster are idle."""

_MISSING = 0
"""Code of a missing value; real codes count from 1, so fresh cells are missing."""

_ABSENT = 0xFFFF_FFFF
"""Code that no cell has, for a value that was never appended."""


class MemoryColumns:
    """Answers filters over the rows appended so far; row numbers count from 0."""

    def __init__(self, attributes: Mapping[str, AttributeType]) -> None:
        self._rows = 0
        self._capacity = _CAPACITY_FIRST
        self._cells: dict[str, _Cells] = {}
        self.declare(attributes)

    @property
    def rows(self) -> int:
        return self._rows

    def declare(self, attributes: Mapping[str, AttributeType]) -> None:
        """Adds the attributes that are not known yet; rows appended before miss them."""
        added = {
            name: _make_cells(kind, self._capacity)
            for name, kind in attributes.items()
            if name not in self._cells
        }
        self._cells = {**self._cells, **added}

    def append(self, attributes: Mapping[str, AttributeValue]) -> int:
        """Adds a validated row and returns its number. About 0.25 µs an attribute.

        Raises: Internal when an attribute was never declared; nothing was added.
        """
        cells = self._cells
        if not attributes.keys() <= cells.keys():
            undeclared = sorted(attributes.keys() - cells.keys())
            raise Internal(
                f"row has attributes that were not declared to the memtable: "
                f"{show_names(undeclared)}"
            )
        row = self._rows
        if row == self._capacity:
            self._capacity *= 2
            for column in cells.values():
                column.grow(self._capacity)
        for name, value in attributes.items():
            cells[name].put(row, value)
        self._rows = row + 1
        return row

    def evaluate(self, expression: Expression, *, rows: int | None = None) -> BitMap:
        """Returns the matching rows among the first `rows` (all by default), owned by the caller.

        expression: validated. An attribute that was never declared here is missing in every row.
        """
        return algebra.evaluate(expression, _Snapshot(self._cells, self._visible(rows)))

    def values_of(
        self, attribute: str, rows: npt.NDArray[np.int64]
    ) -> Sequence[AttributeValue | None]:
        """Returns the value of each row, None where it is missing."""
        column = self._cells.get(attribute)
        return [None] * len(rows) if column is None else column.values_of(rows)

    def estimate(self, expression: Expression, *, rows: int | None = None) -> Bounds:
        """Returns (low, high), which the number of matching rows lies between; coarse and cheap."""
        return algebra.estimate(expression, _Snapshot(self._cells, self._visible(rows)))

    def _visible(self, rows: int | None) -> int:
        return self._rows if rows is None else min(rows, self._rows)


class _Snapshot:
    """The first `rows` rows, unaffected by appends meanwhile."""

    def __init__(self, cells: Mapping[str, "_Cells"], rows: int) -> None:
        self._cells = cells
        self.rows = rows

    def leaf_rows(self, leaf: Condition) -> BitMap:
        column = self._cells.get(leaf.attribute)
        if column is None:
            return BitMap()
        return bitmaps.from_mask(column.mask(leaf, self.rows))

    def leaf_rows_among(self, leaf: Condition, candidates: BitMap) -> BitMap:
        return candidates & self.leaf_rows(leaf)

    def leaf_bounds(self, leaf: Condition) -> Bounds:
        column = self._cells.get(leaf.attribute)
        possible = column is not None and column.possible(leaf)
        return Bounds(0, self.rows if possible else 0)


class _Cells(Protocol):
    """The values of one attribute."""

    def put(self, row: int, value: Any) -> None:
        """Stores the value of a row that is not visible yet, below the capacity."""
        ...

    def grow(self, capacity: int) -> None: ...

    def mask(self, leaf: Condition, rows: int) -> Mask:
        """Returns which of the first `rows` rows match."""
        ...

    def possible(self, leaf: Condition) -> bool:
        """Returns False only when no row can match, at the cost of a dictionary look-up."""
        ...

    def values_of(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        """Returns the value of each of the visible rows, None where it is missing."""
        ...


class _CodedCells:
    """Keyword or bool: a dictionary of values and each row's code."""

    def __init__(self, capacity: int) -> None:
        self._codes = array("I", bytes(4 * capacity))
        self._code_of: dict[Scalar, int] = {}

    def put(self, row: int, value: Scalar) -> None:
        codes = self._code_of
        self._codes[row] = codes.setdefault(value, len(codes) + 1)

    def grow(self, capacity: int) -> None:
        self._codes = _grown(self._codes, capacity)

    def mask(self, leaf: Condition, rows: int) -> Mask:
        codes = np.frombuffer(self._codes, dtype=np.uint32, count=rows)
        match leaf:
            case Exists():
                return np.not_equal(codes, _MISSING)
            case Comparison(_, Operator.EQ, value):
                code = self._code_of.get(value)
                return np.equal(codes, _ABSENT if code is None else code)
            case In(_, values):
                return _coded(codes, self._code_of, values)
            case _:
                raise _unanswerable(leaf)

    def possible(self, leaf: Condition) -> bool:
        return not isinstance(leaf, Comparison) or leaf.value in self._code_of

    def values_of(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        codes = np.frombuffer(self._codes, dtype=np.uint32)[rows].tolist()
        # Codes count from 1 in the order of the dictionary; read after them, it has them all.
        values = [None, *self._code_of]
        return [values[code] for code in codes]


class _ListCells:
    """Keyword list: a dictionary of values, and one (row, code) pair for each keyword of a row."""

    def __init__(self, capacity: int) -> None:
        self._present = array("B", bytes(capacity))
        self._pair_rows = array("I", bytes(4 * capacity))
        self._pair_codes = array("I", bytes(4 * capacity))
        self._pairs = 0
        self._code_of: dict[str, int] = {}

    def put(self, row: int, value: Sequence[str]) -> None:
        codes = self._code_of
        pairs = self._pairs
        while pairs + len(value) > len(self._pair_rows):
            self._pair_rows = _grown(self._pair_rows, 2 * len(self._pair_rows))
            self._pair_codes = _grown(self._pair_codes, 2 * len(self._pair_codes))
        for word in value:
            self._pair_rows[pairs] = row
            self._pair_codes[pairs] = codes.setdefault(word, len(codes) + 1)
            pairs += 1
        self._present[row] = 1
        self._pairs = pairs

    def grow(self, capacity: int) -> None:
        self._present = _grown(self._present, capacity)

    def mask(self, leaf: Condition, rows: int) -> Mask:
        present = np.frombuffer(self._present, dtype=np.bool_, count=rows)
        match leaf:
            case Exists():
                return present
            case AnyOf(_, words):
                return self._holding(words, rows)
            case AllOf(_, words):
                mask = present
                for word in words:
                    mask = mask & self._holding((word,), rows)
                return mask
            case _:
                raise _unanswerable(leaf)

    def _holding(self, words: Sequence[str], rows: int) -> Mask:
        """Returns which rows hold at least one of the words."""
        pairs = self._pairs
        pair_rows = np.frombuffer(self._pair_rows, dtype=np.uint32, count=pairs)
        pair_codes = np.frombuffer(self._pair_codes, dtype=np.uint32, count=pairs)
        visible = int(pair_rows.searchsorted(np.uint32(rows)))
        held = _coded(pair_codes[:visible], self._code_of, words)
        mask = np.zeros(rows, dtype=np.bool_)
        mask[pair_rows[:visible][held]] = True
        return mask

    def possible(self, leaf: Condition) -> bool:
        return not isinstance(leaf, AllOf) or all(word in self._code_of for word in leaf.values)

    def values_of(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        pairs = self._pairs
        pair_rows = np.frombuffer(self._pair_rows, dtype=np.uint32, count=pairs)
        pair_codes = np.frombuffer(self._pair_codes, dtype=np.uint32, count=pairs)
        present = np.frombuffer(self._present, dtype=np.bool_)[rows].tolist()
        begins = pair_rows.searchsorted(rows, "left").tolist()
        ends = pair_rows.searchsorted(rows, "right").tolist()
        words = [None, *self._code_of]
        return [
            [words[code] for code in pair_codes[begin:end].tolist()] if there else None
            for there, begin, end in zip(present, begins, ends, strict=True)
        ]


class _NumberCells:
    """Int, timestamp or float: the values, and which of them are present."""

    def __init__(self, capacity: int, kind: AttributeType) -> None:
        self._dtype: np.dtype[Any]
        self._dtype = np.dtype(np.float64 if kind is AttributeType.FLOAT else np.int64)
        self._values: array[Any] = array(
            "d" if kind is AttributeType.FLOAT else "q", bytes(8 * capacity)
        )
        self._present = array("B", bytes(capacity))

    def put(self, row: int, value: int | float) -> None:
        self._values[row] = value
        self._present[row] = 1

    def grow(self, capacity: int) -> None:
        self._values = _grown(self._values, capacity)
        self._present = _grown(self._present, capacity)

    def mask(self, leaf: Condition, rows: int) -> Mask:
        present = np.frombuffer(self._present, dtype=np.bool_, count=rows)
        values: npt.NDArray[Any] = np.frombuffer(self._values, dtype=self._dtype, count=rows)
        match leaf:
            case Exists():
                return present
            case Comparison(_, asked, wanted):
                return COMPARED[asked](values, self._dtype.type(wanted)) & present
            case Between(_, comparisons):
                mask = present
                for comparison in comparisons:
                    mask = mask & self.mask(comparison, rows)
                return mask
            case In(_, listed):
                return np.isin(values, np.array(listed, dtype=self._dtype)) & present
            case _:
                raise _unanswerable(leaf)

    def possible(self, leaf: Condition) -> bool:
        return True

    def values_of(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        values: list[Any] = np.frombuffer(self._values, dtype=self._dtype)[rows].tolist()
        present = np.frombuffer(self._present, dtype=np.bool_)[rows].tolist()
        return [value if there else None for value, there in zip(values, present, strict=True)]


def _make_cells(kind: AttributeType, capacity: int) -> _Cells:
    if kind in NUMBER_TYPES:
        return _NumberCells(capacity, kind)
    if kind is AttributeType.KEYWORD_LIST:
        return _ListCells(capacity)
    return _CodedCells(capacity)


def _coded(
    codes: npt.NDArray[np.uint32], code_of: Mapping[Any, int], values: Sequence[Scalar]
) -> Mask:
    """Returns where `codes` is the code of one of the values."""
    wanted = [code for code in map(code_of.get, values) if code is not None]
    if len(wanted) == 1:
        return np.equal(codes, wanted[0])
    # Read after the codes' view was taken, so every code in it has a place in the table.
    table = np.zeros(len(code_of) + 1, dtype=np.bool_)
    table[wanted] = True
    held: Mask = table[codes]
    return held


def _grown(cells: "array[Any]", capacity: int) -> "array[Any]":
    """Returns a longer array with the same start; readers keep the short one."""
    longer = array(cells.typecode, bytes(cells.itemsize * capacity))
    longer[: len(cells)] = cells
    return longer


def _unanswerable(leaf: Condition) -> Internal:
    """Returns the error for a condition that validation must have refused."""
    return Internal(f"the memtable cannot answer {type(leaf).__name__}; was the filter validated?")
