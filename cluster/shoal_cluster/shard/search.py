"""Answers reads from a snapshot: top-k search, get, scroll and count. No I/O but mapped files.

Search runs in two halves. `prepare` belongs to the event loop: it works out which memtable rows
match the filter (memtable columns change under the loop's hands only). `execute` may run in any
thread: it touches the snapshot's immutable parts alone.

Invariant Q-1: every hit was live at the snapshot's position; rows are never skipped in silence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import merge as merge_sorted
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.domain.ids import SegmentId
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.statistics import rule_out
from shoal_cluster.index.distances import exact_top_k
from shoal_cluster.shard.state import SegmentView, ShardState, Snapshot

_NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOrder:
    """What to look for. queries: (nq, dimension) float32 as the index wants them."""

    queries: Vectors
    k: int
    filter: Expression | None
    exact: bool
    recall_target: float
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A search bound to a snapshot. memtable_rows: per memtable view, its live matching rows."""

    order: SearchOrder
    snapshot: Snapshot
    memtable_rows: tuple[npt.NDArray[np.intp], ...]

    @property
    def rows_considered(self) -> int:
        """An upper bound of the rows whose distance may be computed, times the queries."""
        return self.snapshot.live * len(self.order.queries)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHits:
    """Hits of query i are the next counts[i] entries; best first, ties by id."""

    counts: list[int]
    ids: list[bytes]
    keys: npt.NDArray[np.float32]
    seqs: list[int]
    sources: list[tuple[int, int]]
    """(segment number or -1 - memtable number, row), to fetch tails and vectors of the winners."""
    explain: dict[str, Any] = field(default_factory=dict)


def prepare(state: ShardState, order: SearchOrder) -> Prepared:
    """Binds a search to the present state. Call from the event loop."""
    snapshot = state.snapshot()
    rows = []
    for view in snapshot.memtables:
        live = view.live_rows()
        if order.filter is not None:
            matching = view.memtable.columns.evaluate(order.filter)
            live = np.array([row for row in live if row in matching], dtype=np.intp)
        rows.append(live)
    return Prepared(order, snapshot, tuple(rows))


def execute(prepared: Prepared, metric_schema: CollectionSchema) -> ShardHits:
    """Searches every segment and memtable of the snapshot and merges. Thread-safe."""
    order, snapshot = prepared.order, prepared.snapshot
    parts: list[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int64]]] = []
    explained: list[dict[str, Any]] = []
    for number, view in enumerate(snapshot.segments):
        found = _search_segment(view, order, explained)
        if found is not None:
            parts.append((number, *found))
    for number, (memtable, rows) in enumerate(
        zip(snapshot.memtables, prepared.memtable_rows, strict=True)
    ):
        if len(rows):
            keys, found_rows = exact_top_k(
                memtable.vectors,
                order.queries,
                min(order.k, len(rows)),
                metric_schema.metric,
                rows=None if len(rows) == memtable.rows else rows.astype(np.uint32),
            )
            parts.append((-1 - number, keys, found_rows))
    hits = _merge(parts, prepared)
    if order.explain:
        hits.explain.update(
            segments=explained,
            memtable_rows=sum(len(rows) for rows in prepared.memtable_rows),
            live_rows=snapshot.live,
        )
    return hits


def _search_segment(
    view: SegmentView, order: SearchOrder, explained: list[dict[str, Any]]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None:
    reader = view.reader
    matching: BitMap | None = None
    if order.filter is not None:
        reason = rule_out(order.filter, reader.statistics, reader.rows)
        if reason is None:
            matching = reader.evaluate(order.filter)
            if not matching:
                reason = "no row of the segment matches the filter"
        if reason is not None:
            if order.explain:
                explained.append(_explain_pruned(view.entry.id, reader.rows, reason))
            return None
    if view.live == 0:
        return None
    hits = reader.search(
        order.queries,
        order.k,
        alive=view.alive,
        matching=matching,
        recall_target=order.recall_target,
        exact=order.exact,
    )
    if order.explain:
        report = hits.report
        explained.append(
            {
                "segment": view.entry.id,
                "rows": reader.rows,
                "live": view.live,
                "pruned": False,
                "plan": str(report.plan),
                "reason": report.reason,
                "family": report.family,
                "rescore_factor": report.rescore_factor,
                "expected_recall": report.expected_recall,
                "rows_scanned": report.rows_scanned,
                "rows_rescored": report.rows_rescored,
            }
        )
    return hits.keys, hits.rows


def _explain_pruned(segment: SegmentId, rows: int, reason: str) -> dict[str, Any]:
    return {"segment": segment, "rows": rows, "pruned": True, "reason": reason}


def _merge(
    parts: Sequence[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int64]]],
    prepared: Prepared,
) -> ShardHits:
    """Merges per-part top-k lists of every query into the shard's top k."""
    order, snapshot = prepared.order, prepared.snapshot
    counts: list[int] = []
    ids: list[bytes] = []
    seqs: list[int] = []
    sources: list[tuple[int, int]] = []
    kept_keys: list[npt.NDArray[np.float32]] = []
    for query in range(len(order.queries)):
        if not parts:
            counts.append(0)
            continue
        keys = np.concatenate([part[1][query] for part in parts])
        rows = np.concatenate([part[2][query] for part in parts])
        numbers = np.concatenate(
            [np.full(len(part[2][query]), part[0], dtype=np.int64) for part in parts]
        )
        # Keep k, and all that tie with the last of them, then order ties by id.
        real = np.flatnonzero(rows >= 0)
        if len(real) > order.k:
            bound = np.partition(keys[real], order.k - 1)[order.k - 1]
            real = real[keys[real] <= bound]
        chosen = []
        for index in real:
            number, row = int(numbers[index]), int(rows[index])
            chosen.append((float(keys[index]), _id_at(snapshot, number, row), number, row))
        chosen.sort()
        del chosen[order.k :]
        counts.append(len(chosen))
        kept_keys.append(np.array([hit[0] for hit in chosen], dtype=np.float32))
        for _, point_id, number, row in chosen:
            ids.append(point_id)
            sources.append((number, row))
            seqs.append(_seq_at(snapshot, number, row))
    return ShardHits(
        counts=counts,
        ids=ids,
        keys=np.concatenate(kept_keys) if kept_keys else np.empty(0, dtype=np.float32),
        seqs=seqs,
        sources=sources,
    )


def _id_at(snapshot: Snapshot, number: int, row: int) -> bytes:
    if number < 0:
        return snapshot.memtables[-1 - number].memtable.ids[row]
    return snapshot.segments[number].reader.id_of(row)


def _seq_at(snapshot: Snapshot, number: int, row: int) -> int:
    if number < 0:
        return snapshot.memtables[-1 - number].memtable.seqs[row]
    return int(snapshot.segments[number].reader.seqs[row])


def tails_of(snapshot: Snapshot, sources: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the tails (domain/point.py) of rows named by (number, row)."""
    return [
        snapshot.memtables[-1 - number].memtable.tails[row]
        if number < 0
        else snapshot.segments[number].reader.tail(row)
        for number, row in sources
    ]


def vectors_of(
    snapshot: Snapshot, sources: Sequence[tuple[int, int]], dimension: int
) -> Vectors:
    """Returns the stored vectors, (rows, dimension) float32, of rows named by (number, row)."""
    vectors = np.empty((len(sources), dimension), dtype=np.float32)
    for place, (number, row) in enumerate(sources):
        if number < 0:
            vectors[place] = snapshot.memtables[-1 - number].vectors[row]
        else:
            vectors[place] = snapshot.segments[number].reader.vector(row)
    return vectors


def find_rows(
    snapshot: Snapshot, ids: Sequence[bytes]
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Returns those of `ids` that live, in the order asked, and where each is."""
    found_ids, sources = [], []
    for point_id in ids:
        source = _find_row(snapshot, point_id)
        if source is not None:
            found_ids.append(point_id)
            sources.append(source)
    return found_ids, sources


def _find_row(snapshot: Snapshot, point_id: bytes) -> tuple[int, int] | None:
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


def seqs_of(snapshot: Snapshot, sources: Sequence[tuple[int, int]]) -> list[int]:
    return [_seq_at(snapshot, number, row) for number, row in sources]


def scroll(
    snapshot: Snapshot, after: bytes, limit: int, expression: Expression | None
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Returns up to `limit` live rows with id > after in byte order of ids, and where each is.

    Segments keep their rows in the order of ids, so each is entered by binary search. Call from
    the event loop (it evaluates memtable columns).
    """
    streams: list[Any] = []
    for number, segment in enumerate(snapshot.segments):
        matching = None if expression is None else segment.reader.evaluate(expression)
        streams.append(_scroll_segment(number, segment, after, matching))
    for number, view in enumerate(snapshot.memtables):
        rows = _memtable_matches(snapshot, number, expression)
        found = sorted(
            (view.memtable.ids[row], -1 - number, row)
            for row in rows
            if view.memtable.ids[row] > after
        )
        streams.append(iter(found))
    ids, sources = [], []
    for point_id, number, row in islice(merge_sorted(*streams), limit):
        ids.append(point_id)
        sources.append((number, row))
    return ids, sources


def _scroll_segment(number: int, segment: SegmentView, after: bytes, matching: BitMap | None) -> Any:
    reader = segment.reader
    for row in range(reader.first_row_after(after), reader.rows):
        if segment.is_alive(row) and (matching is None or row in matching):
            yield reader.id_of(row), number, row


def _memtable_matches(
    snapshot: Snapshot, number: int, expression: Expression | None
) -> list[int]:
    view = snapshot.memtables[number]
    live: list[int] = view.live_rows().tolist()
    if expression is None:
        return live
    matching = view.memtable.columns.evaluate(expression)
    return [row for row in live if row in matching]


def count(snapshot: Snapshot, expression: Expression | None) -> int:
    """Returns the number of live rows that match. Call from the event loop."""
    if expression is None:
        return snapshot.live
    total = 0
    for segment in snapshot.segments:
        if rule_out(expression, segment.reader.statistics, segment.reader.rows) is None:
            rows = np.array(segment.reader.evaluate(expression).to_array(), dtype=np.int64)
            total += len(segment.alive_among(rows))
    for number in range(len(snapshot.memtables)):
        total += len(_memtable_matches(snapshot, number, expression))
    return total


def matching_ids(snapshot: Snapshot, expression: Expression, limit: int) -> list[bytes]:
    """Returns the ids of up to `limit` live rows that match, for delete-by-filter."""
    ids, _ = scroll(snapshot, b"", limit, expression)
    return ids
