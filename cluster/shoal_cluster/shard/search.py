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
from shoal_cluster.index.cost_model import CostModel
from shoal_cluster.index.distances import Keys, Rows, exact_top_k
from shoal_cluster.segment.search import SegmentHits, allowed_rows
from shoal_cluster.shard.memtable import MemtableView
from shoal_cluster.shard.rows import Place, memtable_matches
from shoal_cluster.shard.state import SegmentView, ShardState, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOrder:
    """What to look for. queries: (nq, dimension) C-contiguous float32 as the index wants them.

    max_cost_ns: instead of a recall, what one query may cost of one processor
    (docs/design/search-budget.md).
    """

    queries: Vectors
    k: int
    filter: Expression | None
    exact: bool
    recall_target: float
    max_cost_ns: float | None = None
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
    counts = [
        memtable.rows if rows is None else len(rows)
        for memtable, rows in zip(snapshot.memtables, prepared.memtable_rows, strict=True)
    ]
    asked = []
    for number, view in enumerate(snapshot.segments):
        matching, reason = _matching(view, order)
        if reason is None:
            asked.append((number, view, matching))
        elif order.explain:
            explained.append(_explain_pruned(view.entry.id, view.reader.rows, reason))
    budgets_ns = budgets(order, sum(counts), [view.live for _, view, _ in asked])
    for (number, view, matching), budget_ns in zip(asked, budgets_ns, strict=True):
        found = view.reader.search(
            order.queries,
            order.k,
            alive=view.alive,
            matching=matching,
            recall_target=order.recall_target,
            exact=order.exact,
            budget_ns=budget_ns,
        )
        parts.append(_Part(number, found.keys, found.rows))
        if order.explain:
            explained.append(_explain_searched(view, matching, found))
    for number, (memtable, rows, count) in enumerate(
        zip(snapshot.memtables, prepared.memtable_rows, counts, strict=True)
    ):
        if count:
            parts.append(_Part(-1 - number, *_search_memtable(memtable, rows, order, metric)))
    hits = _merge(parts, order, snapshot)
    if order.explain:
        hits.explain.update(segments=explained, memtable_rows=sum(counts), live_rows=snapshot.live)
    return hits


def _matching(view: SegmentView, order: SearchOrder) -> tuple[BitMap | None, str | None]:
    """Returns the rows that match the filter, None for all; or why the segment is not searched."""
    if not view.live:
        return None, "every row is dead"
    if order.filter is None:
        return None, None
    reader = view.reader
    reason = rule_out(order.filter, reader.statistics, reader.rows)
    if reason is not None:
        return None, reason
    matching = reader.evaluate(order.filter)
    return matching, None if matching else "no row of the segment matches the filter"


def budgets(order: SearchOrder, memtable_rows: int, live: Sequence[int]) -> list[float | None]:
    """Returns what each segment may cost a query: by its live rows, of what memtables leave."""
    if order.max_cost_ns is None:
        return [None] * len(live)
    of_memtables_ns = CostModel(dimension=order.queries.shape[1]).exact_ns(memtable_rows)
    left_ns = max(order.max_cost_ns - of_memtables_ns, 0.0)
    return [left_ns * rows / sum(live) for rows in live]


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
        "expected_cost_us": view.reader.expected_ns(report) / 1e3,
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
