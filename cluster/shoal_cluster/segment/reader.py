"""An opened segment: everything mapped, nothing per row in Python objects.

Invariants are in segment/README.md. A reader never changes after `open` (its caches aside) and may
be used by any number of threads at once; the files stay mapped until the last reference to it or to
an array it returned is gone, so a file may be deleted while it is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.point import Vector, Vectors
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.filtering.columns import Columns
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.statistics import SegmentStatistics
from shoal_cluster.index.calibration import RecallCurve
from shoal_cluster.index.distances import exact_top_k
from shoal_cluster.index.families import Family, FlatIndex, VectorIndex, decode_codes
from shoal_cluster.index.row_bits import RowBits
from shoal_cluster.segment import format as layout
from shoal_cluster.segment.build import VECTORS_MAGIC, SegmentInput
from shoal_cluster.segment.format import HEADER_BYTES, MappedFile, map_file
from shoal_cluster.segment.ids import IdTable
from shoal_cluster.segment.meta import SegmentMeta, decode_meta
from shoal_cluster.segment.payload import PayloadFile
from shoal_cluster.segment.search import (
    SearchPlan,
    SearchReport,
    SegmentHits,
    allowed_rows,
    decide,
    no_hits,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentMemory:
    """resident_bytes: codes and caches in RAM. mapped_bytes: file pages the kernel may drop."""

    resident_bytes: int
    mapped_bytes: int


class SegmentReader:
    """Reads and searches one segment."""

    def __init__(
        self,
        *,
        segment_id: str,
        meta: SegmentMeta,
        vectors: Vectors,
        index: VectorIndex,
        ids: IdTable,
        payload: PayloadFile,
        columns: Columns,
        mapped_bytes: int,
    ) -> None:
        self.segment_id = segment_id
        self.meta = meta
        self.vectors = vectors
        """All vectors in row order, (n, d), read-only, mapped."""
        self._index = index
        self._ids = ids
        self._payload = payload
        self._columns = columns
        self._mapped_bytes = mapped_bytes

    @staticmethod
    def open(
        segment_id: str, files: Mapping[str, Path], schema: CollectionSchema
    ) -> "SegmentReader":
        """Maps the files of a segment. Reads headers and codes only; a millisecond or two.

        files: file name (`vectors`, …) to local file, all that the manifest lists. Checksums
        are not compared here: `verification.verify_files` reads everything.

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
        vectors = _open_vectors(mapped[layout.VECTORS], meta)
        reader = SegmentReader(
            segment_id=segment_id,
            meta=meta,
            vectors=vectors,
            index=_open_index(mapped.get(layout.CODES), vectors, meta),
            ids=IdTable(mapped[layout.IDS]),
            payload=PayloadFile(mapped[layout.PAYLOAD]),
            columns=Columns.open(mapped[layout.ATTRIBUTES].contents),
            # The codes are copied into memory, so their mapping ends with `open`.
            mapped_bytes=sum(
                file.contents.nbytes for name, file in mapped.items() if name != layout.CODES
            ),
        )
        reader._check_rows_agree()
        return reader

    @property
    def rows(self) -> int:
        """Rows in the files, dead ones included."""
        return self.meta.rows

    @property
    def family(self) -> Family:
        return self.meta.family

    @property
    def seqs(self) -> npt.NDArray[np.uint64]:
        """Sequence number of each row, (n,), read-only."""
        return self._ids.seqs

    @property
    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """Hash of each row (domain/point.py `row_hash`), (n,), read-only."""
        return self._ids.row_hashes

    @property
    def statistics(self) -> SegmentStatistics:
        return self.meta.statistics

    @property
    def columns(self) -> Columns:
        """The attribute index: answers filters, counts values and walks them in order."""
        return self._columns

    @property
    def recall_curve(self) -> RecallCurve:
        return self.meta.recall_curve

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
        """Returns the stored vector of a row, a read-only view."""
        vector: Vector = self.vectors[row]
        return vector

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
    ) -> SegmentHits:
        """Returns the k nearest live, matching rows of each query.

        queries: (nq, d) float32, C-contiguous, unit length under cosine. alive: packed bits of the
        rows that are not dead (deletes.py), None when all live. matching: the rows that pass the
        filter, None when there is no filter. recall_target: the cheapest setting whose measured
        recall reaches it is used; 1.0 and `exact` compute every key.
        """
        assert queries.ndim == 2 and queries.shape[1] == self.meta.dimension, queries.shape
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        allowed = allowed_rows(self.rows, alive, matching)
        decision = decide(
            allowed,
            live=allowed.count if matching is None else _live(self.rows, alive),
            dimension=self.meta.dimension,
            k=k,
            family=self.family,
            curve=self.recall_curve,
            recall_target=recall_target,
            exact=exact,
        )
        plan, setting = decision.plan, decision.setting
        scanned = self.rows if setting is not None else allowed.count
        report = SearchReport(
            plan=plan,
            reason=decision.reason,
            family=self.family,
            rescore_factor=0 if setting is None else setting.factor,
            expected_recall=1.0 if setting is None else setting.expected_recall,
            rows_scanned=scanned,
            rows_rescored=0 if setting is None or setting.depth is None else setting.depth,
        )
        if plan is SearchPlan.NO_ROWS:
            return no_hits(len(queries), k, report)
        if setting is not None and setting.depth is not None:
            keys, rows = self._index.search(queries, k, allowed=allowed.bits(), depth=setting.depth)
        else:
            keys, rows = exact_top_k(
                self.vectors,
                queries,
                k,
                self.meta.metric,
                None if allowed.everything else allowed.rows(),
            )
        return SegmentHits(keys=keys, rows=rows, report=report)

    def export(self, rows: npt.NDArray[np.integer]) -> SegmentInput:
        """Returns rows as a build takes them, for compaction; their vectors are copied."""
        return SegmentInput(
            ids=self.ids_of(rows),
            seqs=self.seqs[rows],
            vectors=np.ascontiguousarray(self.vectors[rows]),
            tails=self.tails(rows),
        )

    def memory_bytes(self) -> SegmentMemory:
        """Returns what the segment holds in RAM and what it has mapped."""
        return SegmentMemory(
            resident_bytes=self._index.memory_bytes()
            + self._payload.cached_bytes
            + self._columns.cached_bytes,
            mapped_bytes=self._mapped_bytes,
        )

    def _check_rows_agree(self) -> None:
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


def _open_vectors(file: MappedFile, meta: SegmentMeta) -> Vectors:
    rows, dimension, *_ = file.numbers(VECTORS_MAGIC)
    size_bytes = HEADER_BYTES + rows * dimension * 4
    if dimension != meta.dimension or file.contents.nbytes != size_bytes:
        raise Corrupt(
            f"segment file {file.name} has {file.contents.nbytes} bytes for {rows} rows "
            f"x {dimension}, of a segment of {meta.rows} rows x {meta.dimension}"
        )
    values = file.array(np.float32, rows * dimension, HEADER_BYTES)
    return cast(Vectors, values.reshape(rows, dimension))


def _open_index(codes: MappedFile | None, vectors: Vectors, meta: SegmentMeta) -> VectorIndex:
    if meta.family is Family.FLAT:
        return FlatIndex(vectors, meta.metric)
    if codes is None:
        raise Corrupt(f"a {meta.family.value} segment of {meta.rows} rows lacks its codes")
    contents = np.frombuffer(codes.contents, dtype=np.uint8)
    return decode_codes(contents, vectors, meta.metric)
