"""Finds every row of a snapshot within a key, page by page. Exact. Thread-safe.

A page starts behind a (key, id). Keys are the same bits wherever and however a row is compared
(index/distances.py), so any replica may answer the next page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.filtering import bitmaps
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.index.distances import (
    SCAN_BLOCK_ROWS,
    Keys,
    Rows,
    gather_keys,
    scan_keys,
    smallest,
)
from shoal_cluster.shard.memtable import MemtableView
from shoal_cluster.shard.passing import Passing, explain_passing, rows_passing
from shoal_cluster.shard.rows import Place, first_row_after, memtable_matches
from shoal_cluster.shard.state import SegmentView, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeOrder:
    """query: (1, dimension). key_max: a float32, inclusive. after: the last hit given out."""

    query: Vectors
    key_max: float
    filter: Expression | None
    after: tuple[float, bytes] | None = None


class RangeHit(NamedTuple):
    """Compares by key, then id."""

    key: float
    id: bytes
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class RangePage:
    """hits: ascending. more: others follow."""

    hits: Sequence[RangeHit]
    more: bool
    explain: dict[str, Any] = field(default_factory=dict)


def range_page(
    snapshot: Snapshot, order: RangeOrder, limit: int, metric: Metric, *, explain: bool = False
) -> RangePage:
    """Returns the `limit` nearest hits behind `order.after`. O(rows that pass the filter)."""
    hits: list[RangeHit] = []
    explained: list[dict[str, Any]] = []
    for number, view in enumerate(snapshot.segments):
        passing = rows_passing(view, order.filter)
        if explain:
            explained.append(
                explain_passing(view, passing, "exact", "every row that passes is compared")
            )
        if passing.count:
            # One more than asked for tells whether others follow.
            hits += _of_segment(number, view, passing, order, limit + 1, metric)
    memtable_rows = 0
    for number, memtable in enumerate(snapshot.memtables):
        rows = memtable_matches(memtable, order.filter)
        memtable_rows += len(rows)
        if len(rows):
            hits += _of_memtable(number, memtable, rows, order, limit + 1, metric)
    hits.sort()
    page = RangePage(hits=hits[:limit], more=len(hits) > limit)
    if explain:
        page.explain.update(
            segments=explained, memtable_rows=memtable_rows, live_rows=snapshot.live
        )
    return page


def _of_segment(
    number: int,
    view: SegmentView,
    passing: Passing,
    order: RangeOrder,
    limit: int,
    metric: Metric,
) -> list[RangeHit]:
    reader, after = view.reader, order.after
    first_row = 0 if after is None else first_row_after(reader, after[1])
    best_keys = np.empty(0, dtype=np.float32)
    best_rows = np.empty(0, dtype=np.int64)
    for keys, rows in _blocks(view, passing, order, metric):
        within = keys <= np.float32(order.key_max)
        if after is not None:
            after_key = np.float32(after[0])
            # Rows are in the order of ids, and so are those that tie with the last hit.
            within &= (keys > after_key) | ((keys == after_key) & (rows >= first_row))
        best_keys = np.concatenate([best_keys, keys[within]])
        best_rows = np.concatenate([best_rows, rows[within]])
        if len(best_keys) > limit:
            best_keys, best_rows = smallest(best_keys, best_rows, limit)
    return [
        RangeHit(key, point_id, (number, row))
        for key, point_id, row in zip(
            best_keys.tolist(), reader.ids_of(best_rows), best_rows.tolist(), strict=True
        )
    ]


def _blocks(
    view: SegmentView, passing: Passing, order: RangeOrder, metric: Metric
) -> Iterator[tuple[Keys, Rows]]:
    """Yields keys and row numbers of the rows that pass, so many that both stay in the cache."""
    vectors = view.reader.vectors
    if passing.rows is None:
        for start in range(0, len(vectors), SCAN_BLOCK_ROWS):
            keys = scan_keys(vectors[start : start + SCAN_BLOCK_ROWS], order.query[0], metric)
            yield keys, np.arange(start, start + len(keys))
        return
    listed = bitmaps.to_rows(passing.rows).astype(np.int64)
    for start in range(0, len(listed), SCAN_BLOCK_ROWS):
        rows = listed[start : start + SCAN_BLOCK_ROWS]
        yield gather_keys(vectors, order.query, rows[np.newaxis], metric)[0], rows


def _of_memtable(
    number: int,
    view: MemtableView,
    rows: Rows,
    order: RangeOrder,
    limit: int,
    metric: Metric,
) -> list[RangeHit]:
    keys = gather_keys(view.vectors, order.query, rows[np.newaxis], metric)[0]
    within = keys <= np.float32(order.key_max)
    if order.after is not None:
        within &= keys >= np.float32(order.after[0])
    keys, rows = keys[within], rows[within]
    ids = view.memtable.ids
    hits = [
        RangeHit(key, ids[row], (-1 - number, row))
        for key, row in zip(keys.tolist(), rows.tolist(), strict=True)
    ]
    if order.after is not None:
        hits = [hit for hit in hits if (hit.key, hit.id) > order.after]
    hits.sort()
    return hits[:limit]
