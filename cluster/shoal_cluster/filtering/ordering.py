"""Walks the values of a column in their order, from a place in it, over chosen rows only. Pure."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shoal_cluster.filtering.bitmaps import Mask
from shoal_cluster.filtering.literals import Scalar

RowNumbers = npt.NDArray[np.uint32]

_SPAN_FIRST = 4096
"""Values looked at first; doubles while too few of their rows are among the chosen."""


class Start(NamedTuple):
    """Where a walk begins: rows with `value` from `first_row` on, then all values behind it."""

    value: Scalar
    first_row: int


def numbers_in_order(
    values: npt.NDArray[Any],
    rows: RowNumbers,
    chosen: Mask | None,
    start: Start | None,
    *,
    descending: bool,
    limit: int,
) -> list[tuple[Scalar, int]]:
    """Returns the first `limit` (value, row) of the chosen rows, rows ascending among equal values.

    values: ascending. rows: of each value, ascending among equal values. chosen: one bool a row of
    the segment, None for all. O(limit) when most rows are chosen, else O(values passed over).
    """
    found: list[tuple[Scalar, int]] = []
    for begin, end in _spans(values, rows, start, descending=descending, span=2 * limit):
        if chosen is None:
            kept = np.arange(begin, end)
        else:
            kept = begin + np.flatnonzero(chosen[rows[begin:end]])
        if descending and len(kept):
            held = values[kept]
            runs = np.cumsum(held[1:] != held[:-1])
            # Later runs first; within a run as they stand, by row.
            kept = kept[np.argsort(-np.concatenate([[0], runs]), kind="stable")[:limit]]
        kept = kept[: limit - len(found)]
        found += zip(values[kept].tolist(), rows[kept].tolist(), strict=True)
        if len(found) >= limit:
            break
    return found


def _spans(
    values: npt.NDArray[Any],
    rows: RowNumbers,
    start: Start | None,
    *,
    descending: bool,
    span: int,
) -> Iterator[tuple[int, int]]:
    """Yields what lies ahead piece by piece; a descending piece begins with a whole run of equals.

    Only so can it be put in order by itself, since rows ascend within a run in both directions.
    """
    low, high = 0, len(values)
    if start is not None:
        value = values.dtype.type(start.value)
        first = int(values.searchsorted(value, "left"))
        last = int(values.searchsorted(value, "right"))
        begin = first + int(rows[first:last].searchsorted(np.uint32(start.first_row)))
        if descending:
            yield begin, last
            high = first
        else:
            low = begin
    span = max(span, _SPAN_FIRST)
    while low < high:
        if descending:
            begin = max(low, high - span)
            begin = int(values[:high].searchsorted(values[begin], "left"))
            yield begin, high
            high = begin
        else:
            end = min(high, low + span)
            yield low, end
            low = end
        span *= 2
