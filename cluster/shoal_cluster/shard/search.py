"""Answers a top-k search from a snapshot. No I/O but mapped files.

Search runs in two halves. `prepare` belongs to the event loop: it works out which memtable rows
match the filter (memtables change under the loop's hands only). `execute` may run in any thread: it
touches the snapshot's immutable parts alone.

Invariant Q-1: every hit was live at the snapshot's position; rows are never skipped in silence.
Invariant Q-3: equal keys are ordered by point id, so that replicas that sealed at different times
answer alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pyroaring import BitMap

from shoal_cluster.domain.ids import SegmentId
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.statistics import rule_out
from shoal_cluster.index.distances import Keys, Rows, exact_top_k
from shoal_cluster.segment.search import SegmentHits, allowed_rows
from shoal_cluster.shard.memtable import MemtableView
from shoal_cluster.shard.rows import Place, memtable_matches
from shoal_cluster.shard.state import SegmentView, ShardState, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOrder:
    """What to look for. queries: (nq, dimension) C-contiguous float32 as the index wants them."""

    queries: Vectors
    k: int
    filter: Expression | None
    exact: bool
    recall_target: float
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A search bound to a snapshot.

    memtable_rows: per memtable view, its live matching rows; None when that is every row.
    """

    order: SearchOrder
    snapshot: Snapshot
    memtable_rows: tuple[Rows | None, ...]

    @property
    def rows_considered(self) -> int:
        """An upper bound of the rows whose distance may be computed, times the queries."""
        return self.snapshot.live * len(self.order.queries)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHits:
    """Hits of query i are the next counts[i] entries; best first, ties by id."""

    counts: list[int]
    ids: list[bytes]
    keys: Keys
    seqs: list[int]
    places: list[Place]
    """Where each hit is (rows.py), to fetch tails and vectors of the winners."""
    explain: dict[str, Any] = field(default_factory=dict)

    def part(self, counts: list[int], start: int) -> "ShardHits":
        """Returns the hits of some queries in a row: `counts` of each, from hit `start` on."""
        end = start + sum(counts)
        return ShardHits(
            counts=counts,
            ids=self.ids[start:end],
            keys=self.keys[start:end],
            seqs=self.seqs[start:end],
            places=self.places[start:end],
        )


class _Part(NamedTuple):
    """What one segment or memtable found: keys and rows are (nq, m), padded with rows < 0."""

    number: int
    keys: Keys
    rows: Rows


def prepare(state: ShardState, order: SearchOrder) -> Prepared:
    """Binds a search to the present state. Call from the event loop."""
    return bind(state.snapshot(), order)


def bind(snapshot: Snapshot, order: SearchOrder) -> Prepared:
    """Binds a search to a snapshot; thread-safe, since views of memtables do not change."""
    rows = tuple(
        None
        if order.filter is None and view.live == view.rows
        # Under a filter even a match of every row is worth no shortcut: it is a list already.
        else memtable_matches(view, order.filter)
        for view in snapshot.memtables
    )
    return Prepared(order, snapshot, rows)


def execute(prepared: Prepared, metric: Metric) -> ShardHits:
    """Searches every segment and memtable of the snapshot and merges. Thread-safe."""
    order, snapshot = prepared.order, prepared.snapshot
    parts: list[_Part] = []
    explained: list[dict[str, Any]] = []
    for number, view in enumerate(snapshot.segments):
        found = _search_segment(view, order, explained)
        if found is not None:
            parts.append(_Part(number, found.keys, found.rows))
    memtable_rows = 0
    for number, (memtable, rows) in enumerate(
        zip(snapshot.memtables, prepared.memtable_rows, strict=True)
    ):
        count = memtable.rows if rows is None else len(rows)
        memtable_rows += count
        if count:
            parts.append(_Part(-1 - number, *_search_memtable(memtable, rows, order, metric)))
    hits = _merge(parts, order, snapshot)
    if order.explain:
        hits.explain.update(
            segments=explained, memtable_rows=memtable_rows, live_rows=snapshot.live
        )
    return hits


def _search_segment(
    view: SegmentView, order: SearchOrder, explained: list[dict[str, Any]]
) -> SegmentHits | None:
    reader = view.reader
    matching: BitMap | None = None
    reason = None if view.live else "every row is dead"
    if order.filter is not None and reason is None:
        reason = rule_out(order.filter, reader.statistics, reader.rows)
        if reason is None:
            matching = reader.evaluate(order.filter)
            reason = None if matching else "no row of the segment matches the filter"
    if reason is not None:
        if order.explain:
            explained.append(_explain_pruned(view.entry.id, reader.rows, reason))
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
        explained.append(_explain_searched(view, matching, hits))
    return hits


def _search_memtable(
    view: MemtableView, rows: Rows | None, order: SearchOrder, metric: Metric
) -> tuple[Keys, Rows]:
    """Returns the k nearest rows of each query, exactly; ties at the end are settled by id."""
    count = view.rows if rows is None else len(rows)
    k = order.k
    # One more than asked for tells whether the k-th ties with a row that was left out.
    keys, found = exact_top_k(view.vectors, order.queries, min(k + 1, count), metric, rows)
    if count <= k:
        return keys, found
    for query in np.flatnonzero(keys[:, k - 1] == keys[:, k]).tolist():
        asked = order.queries[query : query + 1]
        all_keys, all_rows = exact_top_k(view.vectors, asked, count, metric, rows)
        tied = int(np.searchsorted(all_keys[0], all_keys[0, k - 1], side="right"))
        ids = view.memtable.ids
        best = sorted(range(tied), key=lambda i: (all_keys[0, i], ids[all_rows[0, i]]))[:k]
        keys[query, :k] = all_keys[0, best]
        found[query, :k] = all_rows[0, best]
    return keys[:, :k], found[:, :k]


def _explain_pruned(segment: SegmentId, rows: int, reason: str) -> dict[str, Any]:
    return {"segment": segment, "rows": rows, "pruned": True, "reason": reason}


def _explain_searched(
    view: SegmentView, matching: BitMap | None, hits: SegmentHits
) -> dict[str, Any]:
    report = hits.report
    return {
        "segment": view.entry.id,
        "rows": view.reader.rows,
        "live": view.live,
        "rows_passing": allowed_rows(view.reader.rows, view.alive, matching).count,
        "pruned": False,
        "plan": report.plan.value,
        "reason": report.reason,
        "family": report.family.value,
        "rescore_factor": report.rescore_factor,
        "expected_recall": report.expected_recall,
        "rows_scanned": report.rows_scanned,
        "rows_rescored": report.rows_rescored,
        "probes": report.probes,
        "lists": report.lists,
        "index": f"{report.family.value}: {view.reader.meta.family_reason}",
    }


def _merge(parts: Sequence[_Part], order: SearchOrder, snapshot: Snapshot) -> ShardHits:
    """Merges the parts' top k of every query into the shard's top k."""
    if len(parts) == 1 and parts[0].number >= 0:
        return _hits_of_segment(parts[0], snapshot)
    counts: list[int] = []
    ids: list[bytes] = []
    seqs: list[int] = []
    places: list[Place] = []
    kept: list[Keys] = []
    for query in range(len(order.queries)):
        keys, numbers, rows = _nearest(parts, query, order.k)
        found = _ids_and_seqs(snapshot, numbers, rows)
        hits = list(zip(keys.tolist(), *found, numbers, rows, strict=True))
        hits.sort(key=lambda hit: (hit[0], hit[1]))
        del hits[order.k :]
        counts.append(len(hits))
        kept.append(np.array([hit[0] for hit in hits], dtype=np.float32))
        ids += [hit[1] for hit in hits]
        seqs += [hit[2] for hit in hits]
        places += [(hit[3], hit[4]) for hit in hits]
    all_keys = np.concatenate(kept) if kept else np.empty(0, dtype=np.float32)
    return ShardHits(counts=counts, ids=ids, keys=all_keys, seqs=seqs, places=places)


def _hits_of_segment(part: _Part, snapshot: Snapshot) -> ShardHits:
    """Returns what one segment found as it stands: its rows, hence its ties, are in id order."""
    reader = snapshot.segments[part.number].reader
    queries, k = part.rows.shape
    if part.rows.size and part.rows.min() >= 0:
        counts, rows, keys = [k] * queries, part.rows.ravel(), part.keys.ravel()
    else:
        real = part.rows >= 0
        counts, rows, keys = real.sum(axis=1).tolist(), part.rows[real], part.keys[real]
    return ShardHits(
        counts=counts,
        ids=reader.ids_of(rows),
        keys=keys,
        seqs=reader.seqs_of(rows).tolist(),
        places=[(part.number, row) for row in rows.tolist()],
    )


def _nearest(parts: Sequence[_Part], query: int, k: int) -> tuple[Keys, list[int], list[int]]:
    """Returns keys, part numbers and rows of the k nearest and all that tie with the last."""
    if not parts:
        return np.empty(0, dtype=np.float32), [], []
    keys = np.concatenate([part.keys[query] for part in parts])
    rows = np.concatenate([part.rows[query] for part in parts])
    numbers = np.repeat([part.number for part in parts], [part.rows.shape[1] for part in parts])
    real = np.flatnonzero(rows >= 0)
    if len(real) > k:
        bound = np.partition(keys[real], k - 1)[k - 1]
        real = real[keys[real] <= bound]
    return keys[real], numbers[real].tolist(), rows[real].tolist()


def _ids_and_seqs(
    snapshot: Snapshot, numbers: Sequence[int], rows: Sequence[int]
) -> tuple[list[bytes], list[int]]:
    ids, seqs = [], []
    for number, row in zip(numbers, rows, strict=True):
        if number < 0:
            memtable = snapshot.memtables[-1 - number].memtable
            ids.append(memtable.ids[row])
            seqs.append(memtable.seqs[row])
        else:
            reader = snapshot.segments[number].reader
            ids.append(reader.id_of(row))
            seqs.append(reader.seq_of(row))
    return ids, seqs
