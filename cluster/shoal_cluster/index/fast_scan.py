"""4-bit product-quantisation codes: scanned in registers, in one list or behind an inverted file.

One list is every row; more lists hold neighbours together, and a query scans those whose centres
are nearest. Either way FAISS's `IVF…,PQ…x4fs`, because the plain `PQ…x4fs` refuses a row filter.
Codes are of the rows themselves, not of their distance to a centre: measured at 100,000 × 384 with
316 lists of which a quarter is scanned, recall 0.947 instead of 0.931 at the same depth.

Source: André, Kermarrec, Le Scouarnec, "Quicker ADC" (2019), as FAISS builds it. We differ by
rescoring from stored rows and by choosing depth and probes from the segment's own recall curve.
"""

import struct
from typing import Final

import faiss
import numpy as np
import numpy.typing as npt
import xxhash

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.index.distances import Rows, faiss_metric, several_threads, use_one_thread
from shoal_cluster.index.families import CodeShape, Effort, Family
from shoal_cluster.index.row_bits import RowBits, rows_in_bits

CODE_TRAINING_ROWS_MAX: Final = 16 * 256
"""FAISS's own sampling bound (256 points a centroid, 16 centroids); more does not move recall."""

CODE_TRAINING_ROUNDS: Final = 10
"""Of k-means; FAISS's own 25 take 0.55 s at 384-d where ten take 0.22, most of what a segment of
4,096 rows costs to build. Measured at 64-d to 384-d and 4,096 to 60,000 rows, three seeds each:
recall@10 at depth 100 differs by less than 0.002, as it does from seed to seed."""

LIST_TRAINING_ROWS: Final = 40
"""Rows a list that its centre is trained on; FAISS warns below 39."""

LIST_TRAINING_ROUNDS: Final = 8

SAMPLED_ROWS: Final = 16
"""Rows of each list that say how much of it a filter passes: 16 bytes a list and row number."""

FIRST_LISTS: Final = 16
"""Lists nearest to a query whose share alone counts too: 256 rows sampled."""

ADD_BLOCK_ROWS: Final = 16_384
"""Rows encoded at once: 24 MiB at 384-d while a padded copy exists."""

_HEADER: Final = struct.Struct("<8sIIIIQI28x")
"""Magic, format version, dimension, padded dimension, codes a row, xxh3-64 of what follows,
lists."""

_MAGIC: Final = b"SHOALCOD"
_VERSION: Final = 1


class FastScanIndex:
    """Codes of every row of a segment."""

    def __init__(self, codes: faiss.IndexIVFPQFastScan, dimension: int) -> None:
        self._codes = codes
        self._padding = codes.d - dimension
        values_a_code = codes.d // codes.pq.M
        self._shape = CodeShape(values_a_code=values_a_code, lists=codes.nlist)
        self._sampled = self._sample_lists() if codes.nlist > 1 else None

    @property
    def family(self) -> Family:
        return Family.FAST_SCAN if self._shape.lists == 1 else Family.INVERTED

    @property
    def shape(self) -> CodeShape:
        return self._shape

    def candidates(self, queries: Vectors, effort: Effort, allowed: RowBits | None = None) -> Rows:
        use_one_thread()
        queries = self._padded(queries)
        depth = min(effort.depth, self._codes.ntotal)
        # FAISS keeps raw pointers: `allowed` and `selector` must stay alive through the search,
        # which these local names see to.
        selector = None if allowed is None else faiss.IDSelectorBitmap(allowed)
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=effort.probes)
        return np.asarray(self._codes.search(queries, depth, params=parameters)[1])

    def list_places(self, queries: Vectors, rows: Rows) -> Rows:
        use_one_thread()
        list_of = np.empty(self._codes.ntotal, dtype=np.int64)
        lists = self._shape.lists
        for number in range(lists):
            list_of[self._rows_of(number)] = number
        order = self._codes.quantizer.search(self._padded(queries), lists)[1]
        places = np.empty_like(order)
        np.put_along_axis(places, order, np.arange(lists)[np.newaxis], axis=1)
        found: Rows = np.take_along_axis(places, list_of[rows], axis=1)
        return found

    def allowed_shares(
        self, queries: Vectors, probes: int, allowed: RowBits
    ) -> npt.NDArray[np.float64]:
        assert self._sampled is not None, "one list is always scanned whole"
        use_one_thread()
        near = self._codes.quantizer.search(self._padded(queries), probes)[1]
        rows = self._sampled[near]
        present = rows >= 0
        inside = np.zeros(rows.shape, dtype=np.bool_)
        inside[present] = rows_in_bits(rows[present], allowed)
        first = slice(0, FIRST_LISTS)
        counts = present.sum(axis=2)
        hits = inside.sum(axis=2)
        shares: npt.NDArray[np.float64] = np.minimum(
            hits.sum(axis=1) / np.maximum(counts.sum(axis=1), 1),
            hits[:, first].sum(axis=1) / np.maximum(counts[:, first].sum(axis=1), 1),
        )
        return shares

    def _sample_lists(self) -> npt.NDArray[np.int64]:
        """Returns rows of each list, evenly spaced over it, (lists, SAMPLED_ROWS); -1 pads."""
        sampled = np.full((self._shape.lists, SAMPLED_ROWS), -1, dtype=np.int64)
        for number in range(self._shape.lists):
            rows = self._rows_of(number)
            taken = min(len(rows), SAMPLED_ROWS)
            sampled[number, :taken] = rows[np.arange(taken) * len(rows) // max(taken, 1)]
        return sampled

    def _rows_of(self, number: int) -> npt.NDArray[np.int64]:
        """Returns the rows of a list, a view into FAISS's memory."""
        lists = self._codes.invlists
        size = lists.list_size(number)
        if not size:
            return np.empty(0, dtype=np.int64)
        rows: npt.NDArray[np.int64] = faiss.rev_swig_ptr(lists.get_ids(number), size)
        return rows

    def _padded(self, queries: Vectors) -> Vectors:
        return np.pad(queries, ((0, 0), (0, self._padding))) if self._padding else queries

    def memory_bytes(self) -> int:
        codes = self._codes
        # Codes are packed in blocks of 32 rows; FAISS also keeps each row's number (8 bytes).
        rows = -(-codes.ntotal // 32) * 32 if codes.nlist == 1 else codes.ntotal + 16 * codes.nlist
        tables = (codes.pq.ksub + codes.nlist) * codes.d * 4
        return int(rows * codes.code_size + codes.ntotal * 8 + tables)


def train_codes(
    vectors: Vectors, metric: Metric, shape: CodeShape, seed: int, *, threads: int = 1
) -> faiss.IndexIVFPQFastScan:
    """Returns the codes of all rows; the same vectors, shape and seed give the same codes.

    Memory beside the vectors: the training rows (4,096, or LIST_TRAINING_ROWS a list), one block of
    rows being encoded, and the codes.
    """
    count, dimension = vectors.shape
    padded = -(-dimension // shape.values_a_code) * shape.values_a_code
    codes: faiss.IndexIVFPQFastScan = faiss.index_factory(
        padded, f"IVF{shape.lists},PQ{padded // shape.values_a_code}x4fs", faiss_metric(metric)
    )
    codes.pq.cp.seed = codes.cp.seed = seed & 0x7FFF_FFFF  # FAISS holds it in a C int
    codes.pq.cp.niter = CODE_TRAINING_ROUNDS
    codes.cp.niter = LIST_TRAINING_ROUNDS
    wanted = max(CODE_TRAINING_ROWS_MAX, LIST_TRAINING_ROWS * shape.lists)
    sample = np.random.default_rng(seed).permutation(count)[:wanted]
    with several_threads(threads):
        codes.train(_padded_to(vectors[np.sort(sample)], padded))
        for start in range(0, count, ADD_BLOCK_ROWS):
            codes.add(_padded_to(vectors[start : start + ADD_BLOCK_ROWS], padded))
    return codes


def _padded_to(vectors: Vectors, dimension: int) -> Vectors:
    """Returns rows lengthened by zeros, which change neither inner products nor distances."""
    missing = dimension - vectors.shape[1]
    return np.pad(vectors, ((0, 0), (0, missing))) if missing else vectors


def encode_codes(codes: faiss.IndexIVFPQFastScan, dimension: int) -> list[npt.NDArray[np.uint8]]:
    """Returns the parts of a codes file: a 64-byte header, then FAISS's serialisation."""
    serialised: npt.NDArray[np.uint8] = faiss.serialize_index(codes)
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        dimension,
        codes.d,
        codes.pq.M,
        xxhash.xxh3_64_intdigest(serialised.data),
        codes.nlist,
    )
    return [np.frombuffer(header, dtype=np.uint8), serialised]


def decode_codes(
    contents: npt.NDArray[np.uint8], *, rows: int, dimension: int, metric: Metric
) -> FastScanIndex:
    """Opens the codes of so many vectors from the bytes of a codes file, which FAISS copies.

    Raises: Corrupt when the bytes are not codes of such vectors.
    """
    if contents.size < _HEADER.size:
        raise Corrupt(f"codes file has {contents.size} bytes, less than its header")
    header = contents[: _HEADER.size].tobytes()
    magic, version, of_dimension, padded, width, checksum, lists = _HEADER.unpack(header)
    if magic != _MAGIC or version != _VERSION:
        raise Corrupt(f"codes file starts with {magic!r} version {version}")
    serialised = contents[_HEADER.size :]
    # FAISS trusts the sizes it reads: damaged bytes must never reach it.
    if xxhash.xxh3_64_intdigest(serialised.data) != checksum:
        raise Corrupt(f"codes file of {contents.size} bytes does not match its checksum")
    try:
        codes = faiss.deserialize_index(serialised)
    except RuntimeError as error:
        raise Corrupt(f"codes file cannot be read: {error}") from error
    if not isinstance(codes, faiss.IndexIVFPQFastScan):
        raise Corrupt(f"codes file holds a {type(codes).__name__}")
    expected = (rows, dimension, padded, width, lists, faiss_metric(metric))
    found = (codes.ntotal, of_dimension, codes.d, codes.pq.M, codes.nlist, codes.metric_type)
    if expected != found:
        raise Corrupt(
            f"codes file is for (rows, d, padded d, codes, lists, metric) {found}, not {expected}"
        )
    return FastScanIndex(codes, dimension)
