"""Pages through a snapshot in the order of an attribute's values, then of ids. Thread-safe.

Rows of a segment are in byte order of ids (building.py), so a column's order of (value, row) is one
of (value, id). Rows without a value come last, in both directions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shoal_cluster.domain.point import decode_tail
from shoal_cluster.domain.schema import AttributeValue
from shoal_cluster.filtering import bitmaps
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.filtering.ordering import Start
from shoal_cluster.shard.facets import TAIL_COST
from shoal_cluster.shard.passing import Passing, explain_passing, rows_passing
from shoal_cluster.shard.rows import Place, first_row_after, memtable_matches
from shoal_cluster.shard.state import SegmentView, Snapshot


class After(NamedTuple):
    """The place of the last row given out. value: None among the rows without one."""

    value: Scalar | None
    id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to page through. after: None for the beginning."""

    attribute: str
    descending: bool
    filter: Expression | None
    after: After | None


class Entry(NamedTuple):
    """One row and its place in the order."""

    value: Scalar | None
    id: bytes
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedPage:
    """more: rows follow behind these."""

    entries: Sequence[Entry]
    more: bool
    explain: dict[str, Any] = field(default_factory=dict)


def scroll_ordered(
    snapshot: Snapshot, order: Order, limit: int, *, explain: bool = False
) -> OrderedPage:
    """Returns the first `limit` rows behind `order.after`."""
    entries: list[Entry] = []
    explained: list[dict[str, Any]] = []
    for number, view in enumerate(snapshot.segments):
        passing = rows_passing(view, order.filter)
        if explain:
            reason = f"walked in the order of {order.attribute}"
            explained.append(explain_passing(view, passing, "ordered", reason))
        if passing.count:
            # One more than asked for tells whether rows follow.
            entries += _of_segment(number, view, passing, order, limit + 1)
    memtable_rows = 0
    for number, memtable in enumerate(snapshot.memtables):
        rows = memtable_matches(memtable, order.filter)
        memtable_rows += len(rows)
        values = memtable.memtable.columns.values_of(order.attribute, rows)
        ids = memtable.memtable.ids
        entries += (
            Entry(_scalar(value), ids[row], (-1 - number, row))
            for value, row in zip(values, rows.tolist(), strict=True)
            if is_ahead(_scalar(value), ids[row], order)
        )
    page = OrderedPage(
        entries=in_order(entries, descending=order.descending)[:limit], more=len(entries) > limit
    )
    if explain:
        page.explain.update(
            segments=explained, memtable_rows=memtable_rows, live_rows=snapshot.live
        )
    return page


def in_order(entries: Iterable[Entry], *, descending: bool) -> list[Entry]:
    """Returns the entries by value, ties by id ascending, those without a value last."""
    by_id = sorted(entries, key=lambda entry: entry.id)
    present = [entry for entry in by_id if entry.value is not None]
    # Both sorts are stable, and so is the reversed one: equal values stay in the order of ids.
    present.sort(key=lambda entry: entry.value, reverse=descending)  # type: ignore[arg-type,return-value]
    return present + [entry for entry in by_id if entry.value is None]


def _of_segment(
    number: int, view: SegmentView, passing: Passing, order: Order, limit: int
) -> list[Entry]:
    """Returns the first `limit` rows of one segment behind the place, in any order."""
    reader, after = view.reader, order.after
    columns, attribute = reader.columns, order.attribute
    rows = passing.rows
    if rows is not None and passing.count * TAIL_COST < columns.distinct_words(attribute):
        return _of_few_rows(number, view, bitmaps.to_rows(rows).astype(np.int64), order)
    first_row = 0 if after is None else first_row_after(reader, after.id)
    found: list[tuple[Scalar | None, int]] = []
    if after is None or after.value is not None:
        start = None
        if after is not None and after.value is not None:
            start = Start(after.value, first_row)
        found += columns.in_order(attribute, rows, start, descending=order.descending, limit=limit)
        first_row = 0  # none of the rows without a value has been given out
    if len(found) < limit:
        missing = bitmaps.to_rows(columns.missing(attribute, rows))
        ahead = missing[missing.searchsorted(first_row) :][: limit - len(found)]
        found += ((None, row) for row in ahead.tolist())
    ids = reader.ids_of(np.array([row for _, row in found], dtype=np.int64))
    return [
        Entry(value, point_id, (number, row))
        for (value, row), point_id in zip(found, ids, strict=True)
    ]


def _of_few_rows(
    number: int, view: SegmentView, rows: "np.ndarray[Any, np.dtype[np.int64]]", order: Order
) -> list[Entry]:
    """Reads the rows themselves: cheaper than passing a dictionary of which they have little."""
    reader = view.reader
    entries = []
    for row, point_id, tail in zip(
        rows.tolist(), reader.ids_of(rows), reader.tails(rows), strict=True
    ):
        value = _scalar(decode_tail(tail)[1].get(order.attribute))
        if is_ahead(value, point_id, order):
            entries.append(Entry(value, point_id, (number, row)))
    return entries


def is_ahead(value: Scalar | None, point_id: bytes, order: Order) -> bool:
    """Tells whether a row lies behind `order.after`, and so is still to come."""
    after = order.after
    if after is None:
        return True
    if value is None or after.value is None:
        if value is None and after.value is None:
            return point_id > after.id
        return value is None
    if value == after.value:
        return point_id > after.id
    beyond: bool = value > after.value  # type: ignore[operator]  # of one declared type
    return beyond is not order.descending


def _scalar(value: AttributeValue | None) -> Scalar | None:
    assert not isinstance(value, list), "keyword lists have no order"
    return value
