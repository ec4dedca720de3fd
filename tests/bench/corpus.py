"""The bench's data: real embeddings, and as many more rows as asked for made by mixing them.

Rows beyond the real ones: pick two real vectors, go a random way of at most half from one to the
other, add noise in proportion to how far real vectors spread in each dimension, scale to unit
length. Mixing keeps the rows where real texts lie, noise keeps them from being near-duplicates,
and the queries are real ones, unchanged. One seed, so every run has the same rows.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal_cluster.cli.demo.corpus import DATA

SEED: Final = 20_240_607
K: Final = 10
RECALL_TARGET: Final = 0.98
QUERIES: Final = 500

MIX_MAX: Final = 0.5
"""At most half way: every made row stays nearer to the vector it began at."""

NOISE: Final = 0.5
"""Noise in standard deviations of each dimension. A made row then has a median similarity of 0.84
with the nearest real one: no near-duplicate, and a neighbour still. Queries find their nearest row
at 0.62 and their tenth at 0.52 among 100,000 rows."""

TIE: Final = 1e-6
"""Similarities closer than this are equal: float32 sums in another order differ by less."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BenchCorpus:
    """vectors: (rows, 384), queries: (QUERIES, 384), both float32 of unit length.

    kth: of each query the similarity of its true k-th nearest row.
    """

    vectors: Floats
    queries: Floats
    kth: Floats

    def recall(self, found: npt.NDArray[np.int64], queries: npt.NDArray[np.int64]) -> float:
        """Returns the mean recall@K. found: (n, K) rows, for the n queries of those numbers.

        Counted by similarity, so that of equal rows any is right; a row that comes twice or does
        not exist (-1) counts for nothing.
        """
        correct = 0
        for query, rows in zip(queries, found, strict=True):
            distinct = np.unique(rows[(rows >= 0) & (rows < len(self.vectors))])
            similarity = self.vectors[distinct] @ self.queries[query]
            correct += int(np.count_nonzero(similarity >= self.kth[query] - TIE))
        return correct / found.size


def make_corpus(rows: int) -> BenchCorpus:
    """Returns the same corpus for the same number of rows, and exact answers to its queries."""
    real = _unit(np.load(DATA / "vectors.f16.npy").astype(np.float32))
    asked = _unit(np.load(DATA / "query_vectors.f16.npy").astype(np.float32))
    random = np.random.default_rng(SEED)
    queries = np.ascontiguousarray(asked[random.permutation(len(asked))[:QUERIES]])
    made = max(0, rows - len(real))
    first, second = random.integers(0, len(real), (2, made))
    share = random.random((made, 1), dtype=np.float32) * np.float32(MIX_MAX)
    vectors = np.empty((rows, real.shape[1]), dtype=np.float32)
    vectors[: len(real)] = real[:rows]
    mixed = vectors[len(real) :]
    mixed[:] = real[first] + share * (real[second] - real[first])
    mixed += real.std(axis=0) * np.float32(NOISE) * random.standard_normal(mixed.shape, np.float32)
    vectors[len(real) :] = _unit(mixed)
    similarity = queries @ vectors.T
    kth = np.partition(similarity, rows - K, axis=1)[:, rows - K]
    return BenchCorpus(vectors=vectors, queries=queries, kth=kth)


def id_of(row: int) -> str:
    """Returns the id a row is stored under; as wide as ids usually are."""
    return f"row-{row:012d}"


def row_of(point_id: str) -> int:
    """Reverses `id_of`."""
    return int(point_id[4:])


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
