"""An opened segment: everything mapped, nothing per row in Python objects.

Invariants are in segment/README.md. A reader never changes after `open`, its caches and the recall
curve in use aside, and may be used by any number of threads at once; the files stay mapped until
the last reference to it or to an array it returned is gone, so a file may be deleted while it is
read.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.point import Vector, Vectors
from shoal_cluster.domain.schema import CollectionSchema, MemoryTier
from shoal_cluster.filtering.columns import Columns
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.statistics import SegmentStatistics
from shoal_cluster.index.budget import best_within
from shoal_cluster.index.calibration import (
    BEYOND_QUERIES,
    K_CLASSES,
    QueryRecalls,
    RecallCurve,
    curve_of,
    measure_queries,
    worst_of,
)
from shoal_cluster.index.cost_model import CostModel
from shoal_cluster.index.distances import (
    Keys,
    Rows,
    StoredVectors,
    exact_top_k,
    gather_keys,
    widened,
)
from shoal_cluster.index.families import CandidateIndex, Effort, Family
from shoal_cluster.index.fast_scan import decode_codes
from shoal_cluster.index.rescoring import rescored_top_k
from shoal_cluster.index.row_bits import RowBits
from shoal_cluster.index.settings import Setting
from shoal_cluster.segment import format as layout
from shoal_cluster.segment.build import SegmentInput
from shoal_cluster.segment.far_rows import suffices, sure_way, try_depths
from shoal_cluster.segment.format import MappedFile, map_file
from shoal_cluster.segment.ids import IdTable
from shoal_cluster.segment.meta import SegmentMeta, decode_meta
from shoal_cluster.segment.payload import PayloadFile
from shoal_cluster.segment.rank_sample import TOLERATED, RankSample
from shoal_cluster.segment.residence import Residence, open_vectors
from shoal_cluster.segment.search import (
    AllowedRows,
    Decision,
    SearchPlan,
    SearchReport,
    SegmentHits,
    allowed_rows,
    decide,
    no_hits,
)
from shoal_cluster.segment.settings_in_use import CurveInUse, SettingsInUse


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentMemory:
    """resident_bytes: codes, caches and, in the full tier, vectors, in RAM.

    mapped_bytes: pages of mapped files, which the kernel may drop.
    """

    resident_bytes: int
    mapped_bytes: int


_ALL = slice(None)
_NO_KEYS: Keys = np.empty(0, dtype=np.float32)


class SegmentReader:
    """Reads and searches one segment."""

    def __init__(
        self,
        *,
        segment_id: str,
        meta: SegmentMeta,
        residence: Residence,
        index: CandidateIndex | None,
        ids: IdTable,
        payload: PayloadFile,
        columns: Columns,
        mapped_bytes: int,
        in_use: CurveInUse | None = None,
    ) -> None:
        self.segment_id = segment_id
        self.meta = meta
        self._residence = residence
        self._index = index
        self._costs = CostModel(dimension=meta.dimension, storage=meta.storage, tier=residence.tier)
        self._sample = RankSample(meta.rows)
        self._in_use = CurveInUse(meta.recall_curve) if in_use is None else in_use
        self._settings = SettingsInUse(
            self._in_use, rows=meta.rows, index=index, scan_ns=self._scan_ns
        )
        self._ids = ids
        self._payload = payload
        self._columns = columns
        self._mapped_bytes = mapped_bytes

    @staticmethod
    def open(
        segment_id: str, files: Mapping[str, Path], schema: CollectionSchema, seq_base: int = 0
    ) -> "SegmentReader":
        """Maps the files of a segment. Reads headers and codes only; a millisecond or two.

        files: file name (`vectors`, …) to local file, all that the manifest lists. Checksums
        are not compared here: `verification.verify_files` reads everything. seq_base: as the
        manifest says, added to the rows' sequence numbers.

        Raises: Corrupt when a file is missing, cut short or contradicts the others; Conflict when a
        newer Shoal wrote it.
        """
        missing = [name for name in layout.REQUIRED_FILES if name not in files]
        if missing:
            raise Corrupt(f"segment {segment_id} lacks its files {missing}")
        mapped = {name: map_file(f"{segment_id}/{name}", path) for name, path in files.items()}
        meta_file = mapped[layout.META]
        meta = decode_meta(meta_file.contents, key=meta_file.name)
        if (meta.dimension, meta.metric) != (schema.dimension, schema.metric):
            raise Corrupt(
                f"segment {segment_id} holds {meta.dimension}-d {meta.metric.value} vectors, "
                f"collection {schema.name} {schema.dimension}-d {schema.metric.value}"
            )
        vectors_file = mapped[layout.VECTORS]
        residence = open_vectors(vectors_file.name, files[layout.VECTORS], schema.tier)
        reader = SegmentReader(
            segment_id=segment_id,
            meta=meta,
            residence=residence,
            index=_open_index(mapped.get(layout.CODES), meta),
            ids=IdTable(mapped[layout.IDS], seq_base),
            payload=PayloadFile(mapped[layout.PAYLOAD]),
            columns=Columns.open(mapped[layout.ATTRIBUTES].contents),
            # The codes are copied into memory, so their mapping ends with `open`.
            mapped_bytes=sum(
                file.contents.nbytes for name, file in mapped.items() if name != layout.CODES
            ),
        )
        reader._check_vectors_agree()
        return reader

    def moved_to(self, tier: MemoryTier) -> "SegmentReader":
        """Returns a reader of the same files whose vectors are in another tier.

        Reads all vectors when that is full. This reader stays as it is for those who use it.
        """
        return self._with(self._residence.moved_to(tier), self._ids)

    def rebased(self, seq_base: int) -> "SegmentReader":
        """Returns a reader of the same files whose rows' sequence numbers have another base."""
        return self._with(self._residence, self._ids.rebased(seq_base))

    def _with(self, residence: Residence, ids: IdTable) -> "SegmentReader":
        return SegmentReader(
            segment_id=self.segment_id,
            meta=self.meta,
            residence=residence,
            index=self._index,
            ids=ids,
            payload=self._payload,
            columns=self._columns,
            mapped_bytes=self._mapped_bytes,
            in_use=self._in_use,
        )

    @property
    def tier(self) -> MemoryTier:
        return self._residence.tier

    @property
    def vectors(self) -> StoredVectors:
        """All vectors in row order, (n, d), read-only, as stored."""
        return self._residence.in_order

    @property
    def rows(self) -> int:
        """Rows in the files, dead ones included."""
        return self.meta.rows

    @property
    def family(self) -> Family:
        return self.meta.family

    @property
    def seqs(self) -> npt.NDArray[np.uint64]:
        """Sequence number of each row, (n,): made anew, for a few rows ask `seqs_of`."""
        return self._ids.seqs_of(_ALL)

    @property
    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """Hash of each row, (n,): made anew, for a few rows ask `hashes_of`."""
        return self._ids.hashes_of(_ALL)

    def seqs_of(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
        """Returns the sequence numbers of rows."""
        return self._ids.seqs_of(rows)

    def seq_of(self, row: int) -> int:
        """Returns the sequence number of a row."""
        return self._ids.seq_of(row)

    def hashes_of(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
        """Returns the hashes of rows (domain/point.py `row_hash`)."""
        return self._ids.hashes_of(rows)

    def rows_found_in(self, other: "SegmentReader") -> npt.NDArray[np.int64]:
        """Returns the rows of `other`, ascending, whose ids are in this segment too."""
        likely = self._ids.rows_also_in(other._ids)
        rows = other.lookup(self.ids_of(likely))
        return np.unique(rows[rows >= 0])

    @property
    def statistics(self) -> SegmentStatistics:
        return self.meta.statistics

    @property
    def columns(self) -> Columns:
        """The attribute index: answers filters, counts values and walks them in order."""
        return self._columns

    @property
    def recall_curve(self) -> RecallCurve:
        """The curve in use: measured at build, and again with users' queries."""
        return self._in_use.curve

    def factor(self, recall_target: float) -> int:
        """Returns how many candidates a hit are rescored of ten nearest; 0: all are compared."""
        return (
            0
            if self._index is None
            else self._settings.setting(recall_target, K_CLASSES[0], 1.0).factor
        )

    def measure_again(self, queries: Vectors, together: int) -> Iterator[Callable[[], None]]:
        """Measures the recall curve with queries that users asked, and uses it from then on.

        Yields its pieces, `together` queries each: run each, in any thread, before asking for the
        next. Of the curve in use and the new one the worse counts, so no search becomes shallower.
        """
        assert self._index is not None, "a segment without codes has no curve"
        measured: list[QueryRecalls] = []
        for start in range(0, len(queries), together):
            piece = queries[start : start + together]
            beyond = min(max(BEYOND_QUERIES - start, 0), len(piece))
            yield functools.partial(self._measure, piece, beyond, measured)
        self._in_use.curve = worst_of([self._in_use.curve, curve_of(measured, len(queries))])

    def _measure(self, queries: Vectors, beyond: int, measured: list[QueryRecalls]) -> None:
        assert self._index is not None
        measured.append(
            measure_queries(self._index, self.vectors, self.meta.metric, queries, beyond=beyond)
        )

    def lookup(self, ids: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Returns the row of each point, -1 where the segment has none. Dead rows are found too."""
        return self._ids.lookup(ids)

    def lookup_one(self, id_bytes: bytes) -> int:
        """Returns the row of a point, or -1."""
        return self._ids.lookup_one(id_bytes)

    def id_of(self, row: int) -> bytes:
        """Returns the id of a row in UTF-8."""
        return self._ids.id_of(row)

    def ids_of(self, rows: npt.NDArray[np.integer]) -> list[bytes]:
        """Returns the ids of many rows, in their order."""
        return self._ids.ids_of(rows)

    def vector(self, row: int) -> Vector:
        """Returns the stored vector of a row; not to be written to."""
        vector: Vector = widened(self._residence.scattered[row])
        return vector

    def vectors_at(self, rows: npt.NDArray[np.int64]) -> Vectors:
        """Returns the stored vectors of some rows, in their order, as float32 copies."""
        self._residence.ask_for(rows)
        return widened(self._residence.scattered[rows])

    def tail(self, row: int) -> bytes:
        """Returns the tail of a row (domain/point.py `decode_tail`).

        Raises: Corrupt when its block does not decompress.
        """
        return self._payload.tail(row)

    def tails(self, rows: npt.NDArray[np.integer]) -> list[bytes]:
        """Returns the tails of many rows, in their order.

        Raises: Corrupt when a block does not decompress.
        """
        return self._payload.tails(rows)

    def evaluate(self, expression: Expression) -> BitMap:
        """Returns the rows that match a validated filter, dead ones included."""
        return self._columns.evaluate(expression)

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        alive: RowBits | None = None,
        matching: BitMap | None = None,
        recall_target: float = 0.95,
        exact: bool = False,
        budget_ns: float | None = None,
    ) -> SegmentHits:
        """Returns the k nearest live, matching rows of each query.

        queries: (nq, d) float32, C-contiguous, unit length under cosine. alive: packed bits of the
        rows that are not dead (deletes.py), None when all live. matching: the rows that pass the
        filter, None when there is no filter. recall_target: the cheapest setting whose measured
        recall reaches it is used; 1.0 and `exact` compute every key. budget_ns: instead of a
        target, what a query may be expected to cost; the best that it pays for is used
        (index/budget.py).
        """
        assert queries.ndim == 2 and queries.shape[1] == self.meta.dimension, queries.shape
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        allowed = allowed_rows(self.rows, alive, matching)
        live = allowed.count if matching is None else _live(self.rows, alive)

        def planned(target: float) -> Decision:
            return decide(
                allowed,
                live=live,
                family=self.family,
                exact=exact,
                setting=lambda: self._settings.setting(target, k, allowed.count / self.rows),
                gather_ns=self._costs.gather_ns,
                scan_ns=self._filtered_scan_ns,
            )

        if budget_ns is None:
            decision = planned(recall_target)
        else:
            decision = self._best_within(budget_ns, planned, allowed)
        setting = decision.setting
        if setting is None or setting.effort is None:
            return self._compare(queries, k, allowed, decision)
        if budget_ns is not None:
            setting = replace(setting, reason=decision.reason)
            return self._scan(queries, k, allowed, decision, [setting] * len(queries))[0]
        settings = self._settings.under(setting, queries, k, recall_target, allowed)
        hits, scanned = self._scan(queries, k, allowed, decision, settings)
        if self.rows - allowed.count <= TOLERATED * k:
            return hits
        return self._look_further(queries, k, allowed, hits, scanned, recall_target)

    def _best_within(
        self, budget_ns: float, planned: Callable[[float], Decision], allowed: AllowedRows
    ) -> Decision:
        def priced(target: float) -> tuple[Decision, float]:
            decision = planned(target)
            effort = None if decision.setting is None else decision.setting.effort
            return decision, self._plan_ns(decision.plan, allowed.count, effort)

        target, decision = best_within(budget_ns, priced)
        reason = f"recall {target:g} is what {budget_ns / 1e6:.3g} ms pay for: {decision.reason}"
        return replace(decision, reason=reason)

    def expected_ns(self, report: SearchReport) -> float:
        """Returns what one query of such a search was expected to cost."""
        effort = Effort(depth=report.rows_rescored, probes=report.probes)
        return self._plan_ns(report.plan, report.rows_scanned, effort)

    def _plan_ns(self, plan: SearchPlan, compared: int, effort: Effort | None) -> float:
        """compared: rows of a plan that compares all it may return. effort: of a scan."""
        if plan in (SearchPlan.SCAN, SearchPlan.SCAN_BITMAP):
            assert effort is not None, "a scan has a setting"
            filtered = plan is SearchPlan.SCAN_BITMAP
            return self._filtered_scan_ns(effort) if filtered else self._scan_ns(effort)
        if compared == self.rows:
            return self._costs.exact_ns(compared)
        return self._costs.gather_ns(compared)

    def _look_further(
        self,
        queries: Vectors,
        k: int,
        allowed: AllowedRows,
        hits: SegmentHits,
        scanned: Sequence[Keys],
        recall_target: float,
    ) -> SegmentHits:
        """Asks again for queries whose allowed rows are all far from them (far_rows.py).

        scanned: exact keys of each query's candidates, best by code first; none where lists were
        left out.
        """
        doubted = [i for i, keys in enumerate(scanned) if not suffices(keys, k, recall_target)]
        if not doubted:
            return hits
        bits = allowed.bits()
        assert self._index is not None and bits is not None
        excluded = self._sample.excluded(bits, allowed.count)
        if not excluded.size:
            return hits
        self._residence.ask_for(excluded)
        rows = np.tile(excluded, (len(doubted), 1))
        vectors = self._residence.scattered
        keys = gather_keys(vectors, queries[doubted], rows, self.meta.metric)
        wanted = min(k, allowed.count)
        last_keys = hits.keys[doubted, wanted - 1]
        far = self._sample.unexpected(keys, last_keys, wanted=wanted, allowed=allowed.count)
        settled = 0
        for place, beyond in far.items():
            number = doubted[place]
            query = queries[number : number + 1]
            way = sure_way(
                self.recall_curve,
                recall_target,
                k,
                lists=self._index.shape.lists,
                beyond=beyond,
                scan_ns=self._scan_ns,
                gather_ns=self._costs.gather_ns(allowed.count),
            )
            found = try_depths(
                k,
                recall_target,
                shallowest=hits.report.rows_rescored,
                allowed=allowed.count,
                lists=self._index.shape.lists,
                cost_ns=self._scan_ns,
                sure_ns=way.cost_ns,
                scan=functools.partial(self._scanned, query, k, allowed),
            )
            settled += found is not None
            if found is None:
                found = (
                    self._compared(query, k, allowed)
                    if way.effort is None
                    else self._scanned(query, k, allowed, way.effort)[:2]
                )
            hits.keys[number], hits.rows[number] = found
        if not far:
            return hits
        reason = (
            f"{hits.report.reason}; {len(far)} queries far from all rows were asked deeper, "
            f"{settled} of them by a scan that settled"
        )
        return replace(hits, report=replace(hits.report, reason=reason))

    def _compare(
        self, queries: Vectors, k: int, allowed: AllowedRows, decision: Decision
    ) -> SegmentHits:
        """Compares every allowed row."""
        report = SearchReport(
            plan=decision.plan,
            reason=decision.reason,
            family=self.family,
            rescore_factor=0,
            expected_recall=1.0,
            rows_scanned=allowed.count,
            rows_rescored=0,
        )
        if decision.plan is SearchPlan.NO_ROWS:
            return no_hits(len(queries), k, report)
        keys, rows = self._compared(queries, k, allowed)
        return SegmentHits(keys=keys, rows=rows, report=report)

    def _compared(self, queries: Vectors, k: int, allowed: AllowedRows) -> tuple[Keys, Rows]:
        if allowed.everything:
            return exact_top_k(self.vectors, queries, k, self.meta.metric)
        listed = allowed.rows()
        self._residence.ask_for(listed)
        return exact_top_k(self._residence.scattered, queries, k, self.meta.metric, listed)

    def _scanned(
        self, queries: Vectors, k: int, allowed: AllowedRows, effort: Effort
    ) -> tuple[Keys, Rows, Keys]:
        """Returns the k best, and the keys of all candidates (rescoring.py)."""
        assert self._index is not None, "a segment without codes is never scanned"
        candidates = self._index.candidates(queries, effort, allowed.bits())
        self._residence.ask_for(candidates)
        vectors = self._residence.scattered
        return rescored_top_k(vectors, queries, candidates, k, self.meta.metric)

    def _scan(
        self,
        queries: Vectors,
        k: int,
        allowed: AllowedRows,
        decision: Decision,
        settings: Sequence[Setting],
    ) -> tuple[SegmentHits, list[Keys]]:
        """Scans codes and rescores; queries of one effort go together. settings: one a query.

        Returns the hits, and the keys of each query's candidates, best by code first, where every
        list was scanned for some of the rows only.
        """
        assert self._index is not None, "a segment without codes is never scanned"
        keys = np.empty((len(queries), k), dtype=np.float32)
        rows = np.empty((len(queries), k), dtype=np.int64)
        scanned = [_NO_KEYS] * len(queries)
        lists = self._index.shape.lists
        for effort in dict.fromkeys(setting.effort for setting in settings):
            assert effort is not None
            chosen = [i for i, setting in enumerate(settings) if setting.effort == effort]
            asked = queries if len(chosen) == len(queries) else queries[chosen]
            keys[chosen], rows[chosen], candidates = self._scanned(asked, k, allowed, effort)
            if not allowed.everything and effort.probes >= lists:
                for i, its_candidates in zip(chosen, candidates, strict=True):
                    scanned[i] = its_candidates
        widest = max(settings, key=self._effort_of, default=decision.setting)
        assert widest is not None and widest.effort is not None
        report = SearchReport(
            plan=decision.plan,
            reason=widest.reason,
            family=self.family,
            rescore_factor=widest.factor,
            expected_recall=min((s.expected_recall for s in settings), default=1.0),
            rows_scanned=self.rows * widest.effort.probes // lists,
            rows_rescored=widest.effort.depth,
            probes=widest.effort.probes,
            lists=lists,
        )
        return SegmentHits(keys=keys, rows=rows, report=report), scanned

    def _scan_ns(self, effort: Effort) -> float:
        assert self._index is not None
        return self._costs.scan_ns(self.rows, self._index.shape, effort)

    def _filtered_scan_ns(self, effort: Effort) -> float:
        assert self._index is not None
        return self._costs.scan_ns(self.rows, self._index.shape, effort, filtered=True)

    @staticmethod
    def _effort_of(setting: Setting) -> int:
        return 0 if setting.effort is None else setting.effort.probes

    def export(self, rows: npt.NDArray[np.integer]) -> SegmentInput:
        """Returns rows as a build takes them, for compaction; their vectors are copied."""
        return SegmentInput(
            ids=self.ids_of(rows),
            seqs=self.seqs_of(rows),
            vectors=widened(np.ascontiguousarray(self.vectors[rows])),
            tails=self.tails(rows),
        )

    def memory_bytes(self) -> SegmentMemory:
        """Returns what the segment holds in RAM and what it has mapped."""
        return SegmentMemory(
            resident_bytes=(0 if self._index is None else self._index.memory_bytes())
            + self._residence.resident_bytes
            + self._payload.cached_bytes
            + self._columns.cached_bytes,
            mapped_bytes=self._mapped_bytes,
        )

    def _check_vectors_agree(self) -> None:
        stored = (self.vectors.shape[1], self.vectors.dtype.itemsize)
        if stored != (self.meta.dimension, self.meta.storage.value_bytes):
            raise Corrupt(
                f"segment {self.segment_id} holds vectors of (values, bytes a value) {stored}, its "
                f"meta says {self.meta.dimension} x {self.meta.storage.value}"
            )
        counts = {
            layout.META: self.meta.rows,
            layout.VECTORS: len(self.vectors),
            layout.IDS: self._ids.rows,
            layout.PAYLOAD: self._payload.rows,
            layout.ATTRIBUTES: self._columns.rows,
        }
        if len(set(counts.values())) != 1:
            raise Corrupt(f"segment {self.segment_id} has files of different rows: {counts}")


def _live(rows: int, alive: RowBits | None) -> int:
    return allowed_rows(rows, alive, None).count


def _open_index(codes: MappedFile | None, meta: SegmentMeta) -> CandidateIndex | None:
    if meta.family is Family.FLAT:
        return None
    if codes is None:
        raise Corrupt(f"a {meta.family.value} segment of {meta.rows} rows lacks its codes")
    contents = np.frombuffer(codes.contents, dtype=np.uint8)
    index = decode_codes(contents, rows=meta.rows, dimension=meta.dimension, metric=meta.metric)
    if index.family is not meta.family:
        raise Corrupt(f"codes of a {meta.family.value} segment are those of {index.family.value}")
    return index
