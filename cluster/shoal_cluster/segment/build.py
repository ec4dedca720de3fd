"""Turns rows into the immutable files of a segment.

Memory beyond the caller's rows: attribute maps decoded from the tails (about 1 KiB a row with eight
attributes), the attribute index, about 100 bytes a row for ids and hashes, the codes (d / 8 bytes a
row at 256-d and more), and one padded block of 16,384 rows. Vectors are never copied whole.

One thread throughout, as builds share machines with searches, but for bulk loads.
"""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.point import (
    SUM_MODULUS,
    Vectors,
    content_hash,
    decode_tail,
    row_hashes,
)
from shoal_cluster.domain.schema import (
    AttributeType,
    AttributeValue,
    CollectionSchema,
    VectorStorage,
)
from shoal_cluster.filtering import statistics
from shoal_cluster.filtering.columns import build_columns
from shoal_cluster.index import calibration, cost_model, fast_scan
from shoal_cluster.index.families import CodeShape
from shoal_cluster.index.fast_scan import FastScanIndex
from shoal_cluster.segment import format as layout
from shoal_cluster.segment.format import BuiltFile, FileWriter
from shoal_cluster.segment.ids import write_ids
from shoal_cluster.segment.meta import SegmentMeta, encode_meta
from shoal_cluster.segment.payload import write_payload

WRITE_ROWS = 4_096
"""Rows narrowed and handed to the disk at once: 6 MiB at 384-d."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInput:
    """Rows as struct of arrays, all of one length n > 0; row i of the segment is element i.

    ids: unique, UTF-8. seqs: (n,) uint64. vectors: (n, d) C-contiguous float32, unit length under
    cosine. tails: domain/point.py `encode_tail`.
    """

    ids: Sequence[bytes]
    seqs: npt.NDArray[np.uint64]
    vectors: Vectors
    tails: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltSegment:
    """What a build left in its directory. sum: set checksum of all rows (domain/point.py)."""

    files: tuple[BuiltFile, ...]
    rows: int
    min_seq: int
    max_seq: int
    sum: int


def build_segment(
    rows: SegmentInput, schema: CollectionSchema, directory: Path, seed: int, *, threads: int = 1
) -> BuiltSegment:
    """Writes the files of one segment into `directory`, which must hold none of them yet.

    The same rows, schema and seed give the same bytes. threads: that may train, encode and measure.

    Raises: Unavailable when the disk refuses (nothing is applied: no manifest names the files).
    """
    _assert_consistent(rows, schema)
    model = cost_model.CostModel(
        dimension=schema.dimension, storage=schema.storage, tier=schema.tier
    )
    choice = cost_model.choose_family(len(rows), model, schema.recall_target)
    write = functools.partial(_write_rows, rows, schema, directory)
    index = functools.partial(
        _build_index, rows.vectors, schema, choice.shape, directory, seed, threads
    )
    if threads == 1:
        written, indexed = write(), index()
    else:
        # Rows are hashed and written, which is mostly Python, while FAISS trains and encodes.
        with ThreadPoolExecutor(1) as beside:
            indexing = beside.submit(index)
            written = write()
            indexed = indexing.result()
    vectors, ids, tails, attributes = written.files
    files = [vectors, ids, tails, *indexed.files, attributes]
    meta = SegmentMeta(
        rows=len(rows),
        min_seq=int(rows.seqs.min()),
        max_seq=int(rows.seqs.max()),
        sum=written.sum,
        metric=schema.metric,
        dimension=schema.dimension,
        storage=schema.storage,
        family=choice.family,
        family_reason=choice.reason,
        recall_curve=indexed.curve,
        statistics=written.statistics,
        schema_version=schema.version,
    )
    with FileWriter(directory, layout.META) as writer:
        writer.write(encode_meta(meta))
        files.append(writer.finish())
    return BuiltSegment(
        files=tuple(files),
        rows=meta.rows,
        min_seq=meta.min_seq,
        max_seq=meta.max_seq,
        sum=meta.sum,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _WrittenRows:
    """files: vectors, ids, tails and attributes. sum: as BuiltSegment."""

    files: tuple[BuiltFile, BuiltFile, BuiltFile, BuiltFile]
    sum: int
    statistics: statistics.SegmentStatistics


def _write_rows(rows: SegmentInput, schema: CollectionSchema, directory: Path) -> _WrittenRows:
    contents = content_hashes(rows)
    vectors = _write_vectors(rows.vectors, schema.storage, directory)
    ids = _write_ids(rows, contents, directory)
    tails = _write_tails(rows.tails, directory)
    attributes = [decode_tail(tail)[1] for tail in rows.tails]
    return _WrittenRows(
        files=(vectors, ids, tails, _write_attributes(attributes, schema.attributes, directory)),
        # Wraps at SUM_MODULUS, as the sum is defined.
        sum=int(row_hashes(contents, rows.seqs).sum(dtype=np.uint64)),
        statistics=statistics.build(attributes, schema.attributes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _BuiltIndex:
    """files: the codes', none for a flat segment."""

    files: tuple[BuiltFile, ...]
    curve: calibration.RecallCurve


def _build_index(
    vectors: Vectors,
    schema: CollectionSchema,
    shape: CodeShape | None,
    directory: Path,
    seed: int,
    threads: int,
) -> _BuiltIndex:
    if shape is None:
        return _BuiltIndex(files=(), curve=calibration.NO_CURVE)
    codes = fast_scan.train_codes(vectors, schema.metric, shape, seed, threads=threads)
    file = _write_codes(codes, schema.dimension, directory)
    index = FastScanIndex(codes, schema.dimension)
    curve = calibration.measure_recall(index, vectors, schema.metric, seed, threads=threads)
    return _BuiltIndex(files=(file,), curve=curve)


def content_hashes(rows: SegmentInput) -> npt.NDArray[np.uint64]:
    """Returns the `content_hash` of each row (domain/point.py). About 1.5 µs a row."""
    vectors = rows.vectors.data.cast("B")
    stride = rows.vectors.shape[1] * 4
    return np.fromiter(
        (
            content_hash(rows.ids[i], vectors[i * stride : (i + 1) * stride], rows.tails[i])
            for i in range(len(rows))
        ),
        dtype=np.uint64,
        count=len(rows),
    )


def _assert_consistent(rows: SegmentInput, schema: CollectionSchema) -> None:
    count = len(rows)
    assert count > 0, "a segment has at least one row"
    assert rows.vectors.shape == (count, schema.dimension), rows.vectors.shape
    assert rows.vectors.dtype == np.float32 and rows.vectors.flags.c_contiguous
    assert rows.seqs.shape == (count,) and rows.seqs.dtype == np.uint64
    assert len(rows.tails) == count
    assert SUM_MODULUS == 2**64, "the sum is accumulated in uint64"


def _write_vectors(vectors: Vectors, storage: VectorStorage, directory: Path) -> BuiltFile:
    with FileWriter(directory, layout.VECTORS) as writer:
        writer.write(
            layout.encode_header(layout.VECTORS_MAGIC, (*vectors.shape, storage.value_bytes))
        )
        writer.align()
        for start in range(0, len(vectors), WRITE_ROWS):
            block = vectors[start : start + WRITE_ROWS]
            if storage is VectorStorage.FLOAT16:
                narrow = block.astype(np.float16)
                assert np.array_equal(narrow, block), "rows are rounded when they are written"
                writer.write(narrow.data)
            else:
                writer.write(block.data)
        return writer.finish()


def _write_ids(rows: SegmentInput, contents: npt.NDArray[np.uint64], directory: Path) -> BuiltFile:
    with FileWriter(directory, layout.IDS) as writer:
        write_ids(writer, rows.ids, rows.seqs, contents)
        return writer.finish()


def _write_tails(tails: Sequence[bytes], directory: Path) -> BuiltFile:
    with FileWriter(directory, layout.PAYLOAD) as writer:
        write_payload(writer, tails)
        return writer.finish()


def _write_codes(codes: faiss.IndexIVFPQFastScan, dimension: int, directory: Path) -> BuiltFile:
    with FileWriter(directory, layout.CODES) as writer:
        for part in fast_scan.encode_codes(codes, dimension):
            writer.write(part.data)
        return writer.finish()


def _write_attributes(
    rows: Sequence[Mapping[str, AttributeValue]],
    attributes: Mapping[str, AttributeType],
    directory: Path,
) -> BuiltFile:
    with FileWriter(directory, layout.ATTRIBUTES) as writer:
        writer.write(build_columns(rows, attributes))
        return writer.finish()
