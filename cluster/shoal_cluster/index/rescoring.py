"""Exact keys of the candidates that codes proposed, and the best k of them."""

import numpy as np

from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import Metric
from shoal_cluster.index.distances import Keys, Rows, StoredVectors, gather_keys, smallest


def rescored_top_k(
    vectors: StoredVectors, queries: Vectors, candidates: Rows, k: int, metric: Metric
) -> tuple[Keys, Rows, Keys]:
    """Returns keys and rows of the k best candidates of each query, and all candidates' keys.

    candidates: (nq, m), m ≥ 1, padded with NO_ROW. The first two results have shape (nq, k):
    ascending keys, ties by row number, padded with +inf and NO_ROW. The last is (nq, m).
    """
    keys = gather_keys(vectors, queries, candidates, metric)
    best_keys = np.empty((len(queries), k), dtype=np.float32)
    best_rows = np.empty((len(queries), k), dtype=np.int64)
    for i in range(len(queries)):
        best_keys[i], best_rows[i] = smallest(keys[i], candidates[i], k)
    return best_keys, best_rows, keys
