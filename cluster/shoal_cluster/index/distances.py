"""Exact keys of queries against vectors, and the top k by key.

A *key* is what the inside of Shoal sorts by: float32, ascending is better. Cosine and dot give
minus the inner product (cosine vectors are stored with unit length), l2 gives the squared distance.
The edge turns keys into the scores users see.

Keys come from FAISS's row-at-a-time kernels; a matrix product only rules rows out. The kernels are
as fast as a single-threaded sgemv (8,000 × 384: 0.46 ms either way), and the key of a row is bit
for bit the same whether the row was scanned, gathered or rescored, while sgemv's rounding depends
on where the row stands. So two plans, two replicas, or memtable and segment never order the same
rows differently.

Stored vectors may be float16. They are widened, which is exact, a block at a time and go through
the same kernels, so a key depends on the values alone and not on how or where they are kept.

One thread a call: each thread tells OpenMP so once, since FAISS's setting belongs to the thread.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Final, cast

import faiss
import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric

StoredVectors = npt.NDArray[np.float32] | npt.NDArray[np.float16]
"""C-contiguous rows as a segment's file holds them, (n, dimension)."""

Keys = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

NO_ROW: Final = -1
"""Pads a result that has fewer rows than asked for; its key is +inf."""

SCAN_BLOCK_ROWS: Final = 65_536
"""Rows whose keys are held at once: 256 KiB a query, which stays in the L2 cache."""

BATCH_QUERIES_MIN: Final = 4
"""From here a matrix product and rechecking beat one scan a query: 16 queries over 8,000 × 384 take
0.2 ms of one core each instead of 0.5 ms."""

BATCH_BLOCK_ROWS: Final = 8_192
"""Rows of one matrix product: with 256 queries, 8 MiB of estimates."""

FEW_ROWS: Final = 256
"""Rows whose keys cost less (12 µs at 384-d) than a bound among 8,192 (60 µs)."""

SORTED_WHOLE_MAX: Final = 256
"""Up to here sorting everything (2 µs for 80 keys) beats finding the k-th key first (10 µs)."""

SHARED_BLOCK_ROWS: Final = 4_096
"""6 MiB at 384-d. 64 queries over 100,000 × 384: 0.18 s, 0.23 with an eighth of it, 0.36 whole."""

WIDEN_VALUES: Final = 131_072
"""Values widened at once: 512 KiB as float32, half of an L2 cache."""

_HALF_SCALE: Final = np.float32(2.0**112)
"""What a float16's bits, moved to where a float32 has exponent and fraction, are too small by."""

_FAISS_METRIC: Final = {
    Metric.COSINE: faiss.METRIC_INNER_PRODUCT,
    Metric.DOT: faiss.METRIC_INNER_PRODUCT,
    Metric.L2: faiss.METRIC_L2,
}

_this_thread = threading.local()


def use_one_thread() -> None:
    """Makes OpenMP run FAISS calls of the calling thread on that thread alone; cheap to repeat."""
    if not hasattr(_this_thread, "single"):
        faiss.omp_set_num_threads(1)
        _this_thread.single = True


@contextlib.contextmanager
def several_threads(threads: int) -> Iterator[None]:
    """Lets FAISS calls of the calling thread use so many: for builds of bulk loads."""
    faiss.omp_set_num_threads(threads)
    _this_thread.single = True  # so that nothing below takes them away again
    try:
        yield
    finally:
        faiss.omp_set_num_threads(1)


def faiss_metric(metric: Metric) -> int:
    """Returns FAISS's constant: cosine is an inner product of unit vectors."""
    return int(_FAISS_METRIC[metric])


def widened(vectors: StoredVectors) -> Vectors:
    """Returns the same values as float32; the argument itself if it is.

    By integer arithmetic over the whole block, 0.5 ns a value: numpy's cast takes 4 ns, one value
    at a time. Exact for every finite value, subnormal ones too.
    """
    if vectors.dtype == np.float32:
        return cast(Vectors, vectors)
    bits = vectors.view(np.uint16).astype(np.uint32)
    signs = bits & np.uint32(0x8000)
    signs <<= np.uint32(16)
    bits &= np.uint32(0x7FFF)
    bits <<= np.uint32(13)
    values = bits.view(np.float32)
    values *= _HALF_SCALE
    bits |= signs
    return values


def scan_keys(vectors: StoredVectors, query: npt.NDArray[np.float32], metric: Metric) -> Keys:
    """Returns the keys of one query (d,) against every row of `vectors`, shape (n,)."""
    use_one_thread()
    count, dimension = vectors.shape
    keys = np.empty(count, dtype=np.float32)
    kernel = faiss.fvec_L2sqr_ny if metric is Metric.L2 else faiss.fvec_inner_products_ny
    step = count if vectors.dtype == np.float32 else max(WIDEN_VALUES // dimension, 1)
    for start in range(0, count, max(step, 1)):
        part, block = keys[start : start + step], widened(vectors[start : start + step])
        kernel(
            faiss.swig_ptr(part), faiss.swig_ptr(query), faiss.swig_ptr(block), dimension, len(part)
        )
    if metric is not Metric.L2:
        np.negative(keys, out=keys)
    return keys


def scan_keys_of_all(vectors: StoredVectors, queries: Vectors, metric: Metric) -> Keys:
    """Returns the keys of each query against every row of `vectors`, shape (nq, n).

    Bit for bit those of `scan_keys`, in half the time: a block of rows stays in the cache while
    all queries pass over it.
    """
    keys = np.empty((len(queries), len(vectors)), dtype=np.float32)
    for start in range(0, len(vectors), SHARED_BLOCK_ROWS):
        block = widened(vectors[start : start + SHARED_BLOCK_ROWS])
        for query, its_keys in zip(queries, keys, strict=True):
            its_keys[start : start + len(block)] = scan_keys(block, query, metric)
    return keys


def gather_keys(
    vectors: StoredVectors, queries: Vectors, rows: npt.NDArray[np.int64], metric: Metric
) -> Keys:
    """Returns the keys of each query against its own rows, without copying float32 vectors.

    queries: (nq, d). rows: (nq, m), C-contiguous; NO_ROW is allowed and gets the key +inf.
    """
    use_one_thread()
    if vectors.dtype != np.float32:
        return _gathered_wide(vectors, queries, rows, metric)
    keys = np.empty(rows.shape, dtype=np.float32)
    by_index = faiss.fvec_L2sqr_by_idx if metric is Metric.L2 else faiss.fvec_inner_products_by_idx
    by_index(
        faiss.swig_ptr(keys),
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        faiss.swig_ptr(rows),
        vectors.shape[1],
        rows.shape[0],
        rows.shape[1],
    )
    if metric is not Metric.L2:
        np.negative(keys, out=keys)
    return keys


def _gathered_wide(
    vectors: StoredVectors, queries: Vectors, rows: npt.NDArray[np.int64], metric: Metric
) -> Keys:
    keys = np.empty(rows.shape, dtype=np.float32)
    step = max(WIDEN_VALUES // vectors.shape[1], 1)
    for query, its_rows, its_keys in zip(queries, rows, keys, strict=True):
        for start in range(0, len(its_rows), step):
            # Row 0 stands in for NO_ROW; its key is replaced below.
            wanted = np.maximum(its_rows[start : start + step], 0)
            its_keys[start : start + step] = scan_keys(widened(vectors[wanted]), query, metric)
    keys[rows == NO_ROW] = np.inf
    return keys


def smallest(keys: Keys, rows: Rows | None, k: int) -> tuple[Keys, Rows]:
    """Returns the k smallest keys and their rows, ascending, ties by row number, padded.

    keys: (m,). rows: (m,) of any order, or None when key i belongs to row i.
    """
    if keys.size > SORTED_WHOLE_MAX and k < keys.size:
        # Everything up to the k-th key, ties included, so that ties can be settled by row number.
        bound = np.partition(keys, k - 1)[k - 1]
        chosen = np.flatnonzero(keys <= bound)
        keys = keys[chosen]
        rows = chosen if rows is None else rows[chosen]
    elif rows is None:
        rows = np.arange(keys.size)
    # Unsigned, NO_ROW is the largest number: padding stays behind a real row whose key overflowed.
    order = np.lexsort((rows.view(np.uint64), keys))[:k]
    return _padded(keys[order], rows[order], k)


def _padded(keys: Keys, rows: Rows, k: int) -> tuple[Keys, Rows]:
    missing = k - keys.size
    if missing > 0:
        keys = np.concatenate([keys, np.full(missing, np.inf, dtype=np.float32)])
        rows = np.concatenate([rows, np.full(missing, NO_ROW, dtype=np.int64)])
    return keys, rows


def exact_top_k(
    vectors: StoredVectors,
    queries: Vectors,
    k: int,
    metric: Metric,
    rows: npt.NDArray[np.integer] | None = None,
) -> tuple[Keys, Rows]:
    """Returns keys and rows of the k nearest rows of each query, by computing every key.

    vectors: (n, d). queries: (nq, d). rows: the only rows to consider, any order, no repeats; None
    for all. Both results have shape (nq, k): ascending keys, ties by row number, padded with +inf
    and NO_ROW. O(nq · n · d); memory O(SCAN_BLOCK_ROWS + k) a query.
    """
    if not len(queries) or not len(vectors):
        shape = (len(queries), k)
        return np.full(shape, np.inf, dtype=np.float32), np.full(shape, NO_ROW, dtype=np.int64)
    if rows is not None:
        listed = np.ascontiguousarray(rows, dtype=np.int64)
        return _stacked([_gathered_top_k(vectors, query, k, metric, listed) for query in queries])
    if len(queries) >= BATCH_QUERIES_MIN:
        return _batched_top_k(vectors, queries, k, metric)
    return _stacked([_scanned_top_k(vectors, query, k, metric) for query in queries])


def _stacked(results: list[tuple[Keys, Rows]]) -> tuple[Keys, Rows]:
    return np.stack([keys for keys, _ in results]), np.stack([rows for _, rows in results])


def _gathered_top_k(
    vectors: StoredVectors, query: npt.NDArray[np.float32], k: int, metric: Metric, rows: Rows
) -> tuple[Keys, Rows]:
    best = _NOTHING
    for start in range(0, max(rows.size, 1), SCAN_BLOCK_ROWS):
        block = rows[start : start + SCAN_BLOCK_ROWS]
        keys = gather_keys(vectors, query[np.newaxis], block[np.newaxis], metric)[0]
        best = _best_of(best, keys, block, k)
    return best


def _scanned_top_k(
    vectors: StoredVectors, query: npt.NDArray[np.float32], k: int, metric: Metric
) -> tuple[Keys, Rows]:
    if len(vectors) <= SCAN_BLOCK_ROWS:
        return smallest(scan_keys(vectors, query, metric), None, k)
    best = _NOTHING
    for start in range(0, len(vectors), SCAN_BLOCK_ROWS):
        keys = scan_keys(vectors[start : start + SCAN_BLOCK_ROWS], query, metric)
        best = _best_of(best, keys, np.arange(start, start + keys.size), k)
    return best


def _batched_top_k(
    vectors: StoredVectors, queries: Vectors, k: int, metric: Metric
) -> tuple[Keys, Rows]:
    """Lets one matrix product per block rule rows out, and computes true keys of the rest.

    The product rounds otherwise than the row kernels. Both are within `error` of the real value, so
    no row past the k-th product by 2 · error each way can have one of the k smallest keys.
    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1 (error of dot
    products).
    """
    best = [_NOTHING] * len(queries)
    query_lengths = np.sqrt(np.einsum("ij,ij->i", queries, queries))
    unit_error = 2 * (vectors.shape[1] + 2) * np.finfo(np.float32).eps
    for start in range(0, len(vectors), BATCH_BLOCK_ROWS):
        block = widened(vectors[start : start + BATCH_BLOCK_ROWS])
        squares = np.einsum("ij,ij->i", block, block)
        length_max = np.sqrt(squares.max())
        products = np.ascontiguousarray((block @ queries.T).T)
        if metric is Metric.L2:
            estimates = squares - 2 * products + np.square(query_lengths)[:, np.newaxis]
            errors = unit_error * np.square(query_lengths + length_max)
        else:
            estimates = -products
            errors = unit_error * query_lengths * length_max
        for i, query in enumerate(queries):
            worst = best[i][0][-1] if start else np.inf
            possible = _possible_rows(estimates[i], k, worst, 2 * errors[i])
            if possible.size:
                keys = gather_keys(block, query[np.newaxis], possible[np.newaxis], metric)[0]
                best[i] = _best_of(best[i], keys, possible + start, k)
    return _stacked(best)


def _possible_rows(estimates: Keys, k: int, worst: float, error: float) -> Rows:
    """Returns the rows of a block, ascending, whose keys may be among the k smallest of all blocks.

    estimates: within `error` of the keys, (n,). worst: the k-th smallest key of earlier blocks, or
    inf. Mostly it leaves so few rows that the block's own k-th estimate, which costs ten times as
    much to find, is not needed.
    """
    # Not `estimates <= bound`: an estimate that overflowed to nan rules nothing out.
    rows = None
    if worst < np.inf:
        rows = np.flatnonzero(~(estimates > worst + error))
        if rows.size <= max(k, FEW_ROWS):
            return rows
        estimates = estimates[rows]
    place = min(k, estimates.size) - 1
    bound = np.partition(estimates, place)[place] + error
    left = np.flatnonzero(~(estimates > bound))
    return left if rows is None else rows[left]


_NOTHING: Final = (np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64))


def _best_of(best: tuple[Keys, Rows], keys: Keys, rows: Rows, k: int) -> tuple[Keys, Rows]:
    """Returns the k smallest of what was best so far and another block."""
    return smallest(np.concatenate([best[0], keys]), np.concatenate([best[1], rows]), k)
