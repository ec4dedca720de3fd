"""Counting and walking the values of a column, against plain Python over the rows."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from shoal_cluster.domain.schema import AttributeType
from shoal_cluster.filtering import ordering
from shoal_cluster.filtering.columns import Columns, build_columns
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.filtering.memory_columns import MemoryColumns
from shoal_cluster.filtering.ordering import Start
from tests.unit.filtering.strategies import EVERY, LISTS, SCALARS, Row

ORDERED = [kind for kind in AttributeType if kind is not AttributeType.KEYWORD_LIST]
Among = BitMap | None


@st.composite
def rows_of_one(draw: st.DrawFn, kind: AttributeType, rows_max: int = 40) -> list[Row]:
    """Rows with the attribute `a`, or without it."""
    value = SCALARS.get(kind, LISTS)
    row = st.fixed_dictionaries({}, optional={"a": value})
    return draw(st.lists(row, max_size=rows_max))


@st.composite
def chosen_of(draw: st.DrawFn, count: int) -> Among:
    if draw(st.booleans()):
        return None
    return BitMap(draw(st.sets(st.integers(0, count - 1))) if count else ())


def opened(rows: list[Row], kind: AttributeType) -> Columns:
    return Columns.open(memoryview(build_columns(rows, {"a": kind})))


def appended(rows: list[Row], kind: AttributeType) -> MemoryColumns:
    columns = MemoryColumns({"a": kind})
    for row in rows:
        columns.append(row)
    return columns


def held(rows: list[Row], among: Among) -> list[tuple[Scalar, int]]:
    """(value, row) of every chosen row with a value."""
    return [
        (row["a"], number)  # type: ignore[misc]
        for number, row in enumerate(rows)
        if "a" in row and (among is None or number in among)
    ]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(list(AttributeType)))
def test_values_are_counted_as_they_are_in_the_rows(data: st.DataObject, kind: AttributeType):
    rows = data.draw(rows_of_one(kind))
    among = data.draw(chosen_of(len(rows)))
    values = [value for value, _ in held(rows, among)]
    if kind is AttributeType.KEYWORD_LIST:
        wanted = Counter(word for words in values for word in words)  # type: ignore[union-attr]
    else:
        wanted = Counter(values)
    stored = opened(rows, kind)
    assert dict(stored.value_counts("a", among)) == wanted
    missing = [n for n, row in enumerate(rows) if "a" not in row and (among is None or n in among)]
    assert list(stored.missing("a", among)) == missing
    assert list(stored.value_counts("undeclared", among)) == []


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(list(AttributeType)))
def test_the_memtable_gives_values_back_as_they_were_appended(
    data: st.DataObject, kind: AttributeType
):
    rows = data.draw(rows_of_one(kind))
    asked = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1)))) if rows else []
    found = appended(rows, kind).values_of("a", np.array(asked, dtype=np.int64))
    assert list(found) == [rows[number].get("a") for number in asked]
    assert list(appended(rows, kind).values_of("b", np.array(asked, dtype=np.int64))) == [
        None for _ in asked
    ]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(ORDERED), st.booleans(), st.integers(1, 12))
def test_a_walk_gives_the_next_rows_in_order_whatever_it_starts_behind(
    data: st.DataObject, kind: AttributeType, descending: bool, limit: int
):
    rows = data.draw(rows_of_one(kind))
    among = data.draw(chosen_of(len(rows)))
    start = None
    if data.draw(st.booleans()):
        # Also values that no row has, and rows past the end.
        start = Start(
            data.draw(st.sampled_from(EVERY[kind])), data.draw(st.integers(0, len(rows) + 1))
        )
    wanted = sorted(held(rows, among), key=lambda pair: pair[1])
    wanted.sort(key=lambda pair: pair[0], reverse=descending)
    if start is not None:
        ahead = (lambda v: v < start.value) if descending else (lambda v: v > start.value)
        wanted = [
            (value, row)
            for value, row in wanted
            if ahead(value) or (value == start.value and row >= start.first_row)
        ]
    found = opened(rows, kind).in_order("a", among, start, descending=descending, limit=limit)
    assert found == wanted[:limit]


@pytest.mark.parametrize("descending", [False, True])
def test_walking_page_by_page_over_many_spans_gives_every_row_once(
    descending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of equal values longer than a span, and spans in which no row is chosen."""
    monkeypatch.setattr(ordering, "_SPAN_FIRST", 8)
    generator = np.random.default_rng(4)
    numbers = np.repeat(generator.permutation(60), generator.integers(1, 30, 60))
    rows: list[Row] = [{"a": int(number)} for number in generator.permutation(numbers)]
    columns = opened(rows, AttributeType.INT)
    among = BitMap(number for number, row in enumerate(rows) if row["a"] < 5 or row["a"] > 40)  # type: ignore[operator]
    wanted = sorted(held(rows, among), key=lambda pair: pair[1])
    wanted.sort(key=lambda pair: pair[0], reverse=descending)
    found: list[tuple[Scalar, int]] = []
    start = None
    while page := columns.in_order("a", among, start, descending=descending, limit=7):
        found += page
        value, row = page[-1]
        start = Start(value, row + 1)
    assert found == wanted
