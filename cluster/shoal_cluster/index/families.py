"""The two kinds of vector index a segment can have, and which one it gets.

flat: no index at all; every allowed row is compared. fast_scan: 4-bit product-quantisation codes of
all rows, scanned exhaustively in registers, and the best `k · factor` candidates rescored exactly
from the memory-mapped vectors. Both return exact keys; only fast_scan can miss a row.

Source: André, Kermarrec, Le Scouarnec, "Quicker ADC" (2019), as FAISS builds it: `IVF1,PQ…x4fs`,
one inverted list, because the plain `PQ…x4fs` refuses a row filter. We differ by rescoring from
mapped float32 rows and by choosing the factor from the segment's own recall curve (calibration.py).

Thread rule: an index never changes after it is opened, and searches may run on any number of
threads at once; FAISS releases the GIL while it scans.
"""

import enum
import struct
from typing import Final, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import xxhash

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.index import row_bits
from shoal_cluster.index.distances import (
    NO_ROW,
    Keys,
    Rows,
    exact_top_k,
    faiss_metric,
    gather_keys,
    smallest,
    use_one_thread,
)

FLAT_ROWS_MAX: Final = 1_024
"""One seal's worth: such a segment builds in a tenth of the time without codes, and fewer rows do
not train 16 centroids well (FAISS asks for 624)."""

FLAT_VALUES_MAX: Final = 576_000
"""Rows × dimension (1,500 × 384) that one scan covers in 70 µs, about what a code scan and its
rescoring cost at this size: short vectors stay flat for longer."""

FLAT_DIMENSION_MIN: Final = 8
"""FAISS's row kernels are vectorised from 8 values on; 3-d rows cost 7 ns each, as much as 50-d."""

TRAINING_ROWS_MAX: Final = 16 * 256
"""FAISS's own sampling bound (256 points a centroid, 16 centroids); more does not move recall."""

TRAINING_ROUNDS: Final = 10
"""Of k-means; FAISS's own 25 take 0.55 s at 384-d where ten take 0.22, most of what a segment of
4,096 rows costs to build. Measured at 64-d to 384-d and 4,096 to 60,000 rows, three seeds each:
recall@10 at depth 100 differs by less than 0.002, as it does from seed to seed."""

WIDE_DIMENSION_MIN: Final = 256
"""From here 4 dimensions share a 4-bit code, else 2. Measured at 384-d, 8,000 rows, recall 0.98:
PQ96 at factor 8 takes 56 µs, PQ192 at factor 2 takes 77 µs, and PQ96 builds in half the time."""

ADD_BLOCK_ROWS: Final = 16_384
"""Rows encoded at once: 24 MiB at 384-d while a padded copy exists."""

_CODES_HEADER: Final = struct.Struct("<8sIIIIQ32x")
"""Magic, format version, dimension, padded dimension, codes a row, xxh3-64 of what follows."""

_CODES_MAGIC: Final = b"SHOALCOD"
_CODES_VERSION: Final = 1


class Family(enum.Enum):
    FLAT = "flat"
    FAST_SCAN = "fast_scan"


class VectorIndex(Protocol):
    """Nearest rows of one segment. Keys are exact; rows are row numbers within the segment."""

    @property
    def family(self) -> Family: ...

    def search(
        self, queries: Vectors, k: int, *, allowed: row_bits.RowBits | None, depth: int
    ) -> tuple[Keys, Rows]:
        """Returns keys and rows, both (nq, k), ascending, ties by row number, padded.

        queries: (nq, d), C-contiguous. allowed: the rows that may be returned, None for all.
        depth: candidates a query rescores exactly, at least k; flat compares all and ignores it.
        """
        ...

    def memory_bytes(self) -> int:
        """Returns the resident bytes the index itself holds; mapped vectors are not counted."""
        ...


def choose_family(rows: int, dimension: int) -> tuple[Family, str]:
    """Returns the family a segment of this size is built with, and why."""
    if rows <= FLAT_ROWS_MAX:
        return Family.FLAT, f"{rows} rows are at most {FLAT_ROWS_MAX}"
    values = rows * max(dimension, FLAT_DIMENSION_MIN)
    if values <= FLAT_VALUES_MAX:
        return Family.FLAT, f"{rows} rows x {dimension} are at most {FLAT_VALUES_MAX} values"
    return Family.FAST_SCAN, f"{rows} rows x {dimension} are past the flat limits"


class FlatIndex:
    """Compares every allowed row; holds nothing but a view of the vectors."""

    def __init__(self, vectors: Vectors, metric: Metric) -> None:
        self._vectors = vectors
        self._metric = metric

    @property
    def family(self) -> Family:
        return Family.FLAT

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        allowed: row_bits.RowBits | None = None,
        depth: int = 0,
    ) -> tuple[Keys, Rows]:
        rows = None if allowed is None else row_bits.rows_of_bits(allowed, len(self._vectors))
        return exact_top_k(self._vectors, queries, k, self._metric, rows)

    def memory_bytes(self) -> int:
        return 0


class FastScanIndex:
    """4-bit codes of every row, and exact rescoring of the best candidates."""

    def __init__(self, codes: faiss.IndexIVFPQFastScan, vectors: Vectors, metric: Metric) -> None:
        self._codes = codes
        self._vectors = vectors
        self._metric = metric
        self._padding = codes.d - vectors.shape[1]

    @property
    def family(self) -> Family:
        return Family.FAST_SCAN

    def candidates(
        self, queries: Vectors, depth: int, allowed: row_bits.RowBits | None = None
    ) -> Rows:
        """Returns the `depth` best rows by code, (nq, depth), padded with NO_ROW.

        Ascending by approximate key; ties in no promised order.
        """
        use_one_thread()
        if self._padding:
            queries = np.pad(queries, ((0, 0), (0, self._padding)))
        depth = min(depth, len(self._vectors))
        if allowed is None:
            return np.asarray(self._codes.search(queries, depth)[1])
        # FAISS keeps raw pointers: `allowed` and `selector` must stay alive through the search,
        # which these local names see to.
        selector = faiss.IDSelectorBitmap(allowed)
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=1)
        return np.asarray(self._codes.search(queries, depth, params=parameters)[1])

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        allowed: row_bits.RowBits | None = None,
        depth: int,
    ) -> tuple[Keys, Rows]:
        rows = self.candidates(queries, max(depth, k), allowed)
        keys = gather_keys(self._vectors, queries, rows, self._metric)
        out_keys = np.empty((len(queries), k), dtype=np.float32)
        out_rows = np.empty((len(queries), k), dtype=np.int64)
        for i in range(len(queries)):
            out_keys[i], out_rows[i] = smallest(keys[i], rows[i], k)
        return out_keys, out_rows

    def memory_bytes(self) -> int:
        count: int = self._codes.ntotal
        code_bytes: int = self._codes.code_size
        codebook_bytes: int = self._codes.pq.ksub * self._codes.d * 4
        # Codes are packed in blocks of 32 rows; FAISS also keeps each row's number (8 bytes).
        return -(-count // 32) * 32 * code_bytes + count * 8 + codebook_bytes


def train_fast_scan(vectors: Vectors, metric: Metric, seed: int) -> faiss.IndexIVFPQFastScan:
    """Returns the codes of all rows; the same vectors and seed give the same codes.

    vectors: (n, d), n > FLAT_ROWS_MAX. Memory beside the vectors: 4,096 training rows, one block of
    rows being encoded, and the codes (d / 8 bytes a row at 256-d and more).
    """
    use_one_thread()
    count, dimension = vectors.shape
    per_code = 4 if dimension >= WIDE_DIMENSION_MIN else 2
    padded = -(-dimension // per_code) * per_code
    codes: faiss.IndexIVFPQFastScan = faiss.index_factory(
        padded, f"IVF1,PQ{padded // per_code}x4fs", faiss_metric(metric)
    )
    codes.pq.cp.seed = seed & 0x7FFF_FFFF  # FAISS holds it in a C int
    codes.pq.cp.niter = TRAINING_ROUNDS
    sample = np.random.default_rng(seed).permutation(count)[:TRAINING_ROWS_MAX]
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
    header = _CODES_HEADER.pack(
        _CODES_MAGIC,
        _CODES_VERSION,
        dimension,
        codes.d,
        codes.pq.M,
        xxhash.xxh3_64_intdigest(serialised.data),
    )
    return [np.frombuffer(header, dtype=np.uint8), serialised]


def decode_codes(
    contents: npt.NDArray[np.uint8], vectors: Vectors, metric: Metric
) -> FastScanIndex:
    """Opens the codes of `vectors` from the bytes of a codes file, which FAISS copies.

    Raises: Corrupt when the bytes are not codes of these vectors.
    """
    if contents.size < _CODES_HEADER.size:
        raise Corrupt(f"codes file has {contents.size} bytes, less than its header")
    magic, version, dimension, padded, _, checksum = _CODES_HEADER.unpack(
        contents[: _CODES_HEADER.size].tobytes()
    )
    if magic != _CODES_MAGIC or version != _CODES_VERSION:
        raise Corrupt(f"codes file starts with {magic!r} version {version}")
    serialised = contents[_CODES_HEADER.size :]
    # FAISS trusts the sizes it reads: damaged bytes must never reach it.
    if xxhash.xxh3_64_intdigest(serialised.data) != checksum:
        raise Corrupt(f"codes file of {contents.size} bytes does not match its checksum")
    try:
        codes = faiss.deserialize_index(serialised)
    except RuntimeError as error:
        raise Corrupt(f"codes file cannot be read: {error}") from error
    expected = (len(vectors), vectors.shape[1], padded, faiss_metric(metric))
    found = (codes.ntotal, dimension, codes.d, codes.metric_type)
    if expected != found or not isinstance(codes, faiss.IndexIVFPQFastScan):
        raise Corrupt(f"codes file is for (rows, d, padded d, metric) {found}, not {expected}")
    return FastScanIndex(codes, vectors, metric)


__all__ = [
    "NO_ROW",
    "Family",
    "FastScanIndex",
    "FlatIndex",
    "VectorIndex",
    "choose_family",
    "decode_codes",
    "encode_codes",
    "train_fast_scan",
]
