"""Reads rows from a snapshot: fetch by place, get by id, scroll and count. No I/O but mapped files.

A place is (number, row): segment `number` of the snapshot, or memtable `-1 - number` when negative.
Call from the event loop, or from one thread per snapshot at a time.
"""

from collections.abc import Sequence
from heapq import merge as merge_sorted
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.point import Vectors
from shoal_cluster.filtering.bitmaps import to_rows
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.statistics import rule_out
from shoal_cluster.index.row_bits import flags_of_bits
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.memtable import MemtableView
from shoal_cluster.shard.state import SegmentView, Snapshot

Place = tuple[int, int]
_TAILS_AT_ONCE_MIN: Final = 64
"""At most 32 MiB of the largest payloads with the most keywords."""

RowNumbers = npt.NDArray[np.int64]


def seqs_of(snapshot: Snapshot, places: Sequence[Place]) -> list[int]:
    """Returns the rows' sequence numbers."""
    return [
        snapshot.memtables[-1 - number].memtable.seqs[row]
        if number < 0
        else snapshot.segments[number].reader.seq_of(row)
        for number, row in places
    ]


def tails_of(snapshot: Snapshot, places: Sequence[Place]) -> list[bytes]:
    """Returns the rows' tails (domain/point.py)."""
    tails = [b""] * len(places)
    for number, (wanted, rows) in _by_number(places).items():
        if number < 0:
            stored = snapshot.memtables[-1 - number].memtable.tails
            found = [stored[row] for row in rows]
        else:
            found = snapshot.segments[number].reader.tails(np.array(rows, dtype=np.int64))
        for place, tail in zip(wanted, found, strict=True):
            tails[place] = tail
    return tails


def tails_within(
    snapshot: Snapshot, places: Sequence[Place], bytes_max: int, *, row_bytes: int = 0
) -> list[bytes]:
    """Returns the tails of the first rows that fit into `bytes_max`, one at least.

    row_bytes: what each row takes besides. Hardly more than what fits is fetched: rows are taken in
    groups, as large as the rows so far suggest.
    """
    tails: list[bytes] = []
    size_bytes = 0
    at_once = _TAILS_AT_ONCE_MIN
    while len(tails) < len(places):
        for tail in tails_of(snapshot, places[len(tails) : len(tails) + at_once]):
            size_bytes += len(tail) + row_bytes
            if tails and size_bytes > bytes_max:
                return tails
            tails.append(tail)
        fitting = (bytes_max - size_bytes) * len(tails) // size_bytes if size_bytes else 0
        at_once = max(_TAILS_AT_ONCE_MIN, fitting)
    return tails


def vectors_of(snapshot: Snapshot, places: Sequence[Place], dimension: int) -> Vectors:
    """Returns the rows' vectors as stored, (places, dimension) float32."""
    vectors = np.empty((len(places), dimension), dtype=np.float32)
    for number, (wanted, rows) in _by_number(places).items():
        if number < 0:
            vectors[wanted] = snapshot.memtables[-1 - number].vectors[rows]
        else:
            reader = snapshot.segments[number].reader
            vectors[wanted] = reader.vectors_at(np.array(rows, dtype=np.int64))
    return vectors


def _by_number(places: Sequence[Place]) -> dict[int, tuple[list[int], list[int]]]:
    """Returns, for each segment or memtable, which places name it and which rows."""
    grouped: dict[int, tuple[list[int], list[int]]] = {}
    for position, (number, row) in enumerate(places):
        positions, rows = grouped.setdefault(number, ([], []))
        positions.append(position)
        rows.append(row)
    return grouped


def find_rows(snapshot: Snapshot, ids: Sequence[bytes]) -> tuple[list[bytes], list[Place]]:
    """Returns those of `ids` that live, in the order asked, and where each is."""
    found, places = [], []
    for point_id in ids:
        place = _find_row(snapshot, point_id)
        if place is not None:
            found.append(point_id)
            places.append(place)
    return found, places


def _find_row(snapshot: Snapshot, point_id: bytes) -> Place | None:
    for number in reversed(range(len(snapshot.memtables))):
        view = snapshot.memtables[number]
        row = view.memtable.row_of.get(point_id)
        if row is not None and row < view.rows and view.alive[row]:
            return -1 - number, row
    for number, segment in enumerate(snapshot.segments):
        row = segment.reader.lookup_one(point_id)
        if row >= 0 and segment.is_alive(row):
            return number, row
    return None


def scroll(
    snapshot: Snapshot, after: bytes, limit: int, expression: Expression | None
) -> tuple[list[bytes], list[Place]]:
    """Returns up to `limit` live rows with id > after in byte order of ids, and where each is.

    Segments keep their rows in the order of ids, so each is entered by binary search and at most
    `limit` rows of it are looked at by Python.
    """
    streams: list[list[tuple[bytes, int, int]]] = []
    for number, segment in enumerate(snapshot.segments):
        rows = _segment_rows_after(segment, after, limit, expression)
        ids = segment.reader.ids_of(rows)
        streams.append([(one, number, row) for one, row in zip(ids, rows.tolist(), strict=True)])
    for number, view in enumerate(snapshot.memtables):
        ids = view.memtable.ids
        found = [
            (ids[row], -1 - number, row)
            for row in memtable_matches(view, expression).tolist()
            if ids[row] > after
        ]
        found.sort()
        streams.append(found)
    page = list(islice(merge_sorted(*streams), limit))
    return [point_id for point_id, _, _ in page], [(number, row) for _, number, row in page]


def _segment_rows_after(
    segment: SegmentView, after: bytes, limit: int, expression: Expression | None
) -> RowNumbers:
    """Returns the first `limit` live, matching rows with id > after, ascending."""
    reader = segment.reader
    first = first_row_after(reader, after)
    if expression is not None:
        if rule_out(expression, reader.statistics, reader.rows) is not None:
            return np.empty(0, dtype=np.int64)
        matching = to_rows(reader.evaluate(expression)).astype(np.int64)
        return segment.alive_among(matching[matching.searchsorted(first) :])[:limit]
    if segment.alive is None:
        return np.arange(first, min(first + limit, reader.rows))
    return first + np.flatnonzero(flags_of_bits(segment.alive, reader.rows)[first:])[:limit]


def first_row_after(reader: SegmentReader, after: bytes) -> int:
    """Returns the first row whose id is greater; rows are in byte order of ids (building.py)."""
    low, high = 0, reader.rows
    while low < high:
        middle = (low + high) // 2
        if reader.id_of(middle) <= after:
            low = middle + 1
        else:
            high = middle
    return low


def memtable_matches(view: MemtableView, expression: Expression | None) -> RowNumbers:
    """Returns the live, matching rows of a memtable, ascending."""
    if expression is None:
        return view.live_rows()
    matching = to_rows(view.memtable.columns.evaluate(expression, rows=view.rows)).astype(np.int64)
    return matching[view.alive[matching]]


def count(snapshot: Snapshot, expression: Expression | None) -> int:
    """Returns the number of live rows that match."""
    if expression is None:
        return snapshot.live
    total = 0
    for segment in snapshot.segments:
        if rule_out(expression, segment.reader.statistics, segment.reader.rows) is None:
            matching = segment.reader.evaluate(expression)
            if segment.alive is None:
                total += len(matching)
            else:
                total += len(segment.alive_among(to_rows(matching).astype(np.int64)))
    for view in snapshot.memtables:
        total += len(memtable_matches(view, expression))
    return total


def matching_ids(snapshot: Snapshot, expression: Expression, limit: int) -> list[bytes]:
    """Returns the ids of up to `limit` live rows that match, for delete-by-filter."""
    ids, _ = scroll(snapshot, b"", limit, expression)
    return ids
