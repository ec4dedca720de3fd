"""The bench's rows and queries, with exact answers: the demo's, or a corpus made beforehand.

    demo      the demo's 8,000 real embeddings, and as many more rows as asked for by mixing them
    windows   means of token vectors over bits of real texts, up to 1,250,000 (corpora/windows)
    passages  real texts put through the model, up to 290,000 (corpora/passages)

The demo's further rows: pick two real vectors, go a random way of at most half from one to the
other, add noise in proportion to how far real vectors spread in each dimension, scale to unit
length. Mixing keeps the rows where real texts lie, noise keeps them from being near-duplicates,
and the queries are real ones, unchanged. One seed, so every run has the same rows.
"""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal_cluster.cli.demo.corpus import DATA
from tests.bench.corpora import files
from tests.bench.corpora.files import Column, column_of, open_corpus, unit

DEMO: Final = "demo"
CORPORA: Final = (DEMO, "windows", "passages")
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


_ROWS_AT_ONCE: Final = 65_536
"""Rows compared with every query at once: 130 MB of similarities."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truth:
    """kth: of each query the similarity of its true k-th nearest row.

    passes: which rows a filter lets through, None for all.
    """

    kth: Floats
    passes: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BenchCorpus:
    """vectors: (rows, 384), queries: (QUERIES, 384), both float32 of unit length.

    columns: keyword attributes of the rows. truth: of the queries without a filter.
    """

    vectors: Floats
    queries: Floats
    columns: Mapping[str, Column]
    truth: Truth

    def truth_where(self, column: str, value: str) -> Truth:
        """Returns the exact answers among the rows with this value."""
        return self.truth_among(self.columns[column].matches(value))

    def truth_among(self, passes: npt.NDArray[np.bool_]) -> Truth:
        """Returns the exact answers among the rows that pass, (rows,); at least K must."""
        return Truth(kth=_kth_similarity(self.vectors, self.queries, passes), passes=passes)

    def recall(
        self,
        found: npt.NDArray[np.int64],
        queries: npt.NDArray[np.int64],
        truth: Truth | None = None,
    ) -> float:
        """Returns the mean recall@K. found: (n, K) rows, for the n queries of those numbers.

        Counted by similarity, so that of equal rows any is right; a row that comes twice, does
        not exist (-1) or does not pass the filter counts for nothing.
        """
        truth = truth or self.truth
        correct = 0
        for query, rows in zip(queries, found, strict=True):
            distinct = np.unique(rows[(rows >= 0) & (rows < len(self.vectors))])
            if truth.passes is not None:
                distinct = distinct[truth.passes[distinct]]
            similarity = self.vectors[distinct] @ self.queries[query]
            correct += int(np.count_nonzero(similarity >= truth.kth[query] - TIE))
        return correct / found.size


def make_corpus(rows: int, name: str = DEMO) -> BenchCorpus:
    """Returns the same corpus for the same name and rows, and exact answers to its queries.

    Raises: NoCorpus when it has to be made first.
    """
    if name == DEMO:
        vectors, queries, columns = _mixed_demo(rows)
    else:
        stored = open_corpus(name, rows)
        vectors, columns = unit(np.asarray(stored.vectors)), stored.columns
        queries = unit(stored.queries[:QUERIES])
    return BenchCorpus(
        vectors=vectors,
        queries=queries,
        columns=columns,
        truth=Truth(kth=_kth_similarity(vectors, queries, None)),
    )


def seed_of(name: str) -> int:
    return SEED if name == DEMO else files.SEED


def _mixed_demo(rows: int) -> tuple[Floats, Floats, Mapping[str, Column]]:
    """A mixed row has the attributes of the real one it began at."""
    real = unit(np.load(DATA / "vectors.f16.npy"))
    asked = unit(np.load(DATA / "query_vectors.f16.npy"))
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
    vectors[len(real) :] = unit(mixed)
    with gzip.open(DATA / "packages.jsonl.gz", "rt", encoding="utf-8") as lines:
        sections = column_of([json.loads(line)["section"] for line in lines])
    codes = np.concatenate([sections.codes[:rows], sections.codes[first]])
    return vectors, queries, {"section": Column(codes=codes, values=sections.values)}


def _kth_similarity(
    vectors: Floats, queries: Floats, passes: npt.NDArray[np.bool_] | None
) -> Floats:
    """Returns each query's similarity with its K-th nearest row of those that pass."""
    nearest = np.full((len(queries), K), -np.inf, dtype=np.float32)
    for first in range(0, len(vectors), _ROWS_AT_ONCE):
        part = vectors[first : first + _ROWS_AT_ONCE]
        if passes is not None:
            part = part[passes[first : first + _ROWS_AT_ONCE]]
        candidates = np.hstack([nearest, queries @ part.T])
        nearest = np.partition(candidates, -K, axis=1)[:, -K:]
    kth: Floats = nearest.min(axis=1)
    assert np.isfinite(kth).all(), f"fewer than {K} rows pass"
    return kth


def id_of(row: int) -> str:
    """Returns the id a row is stored under; as wide as ids usually are."""
    return f"row-{row:012d}"


def row_of(point_id: str) -> int:
    """Reverses `id_of`."""
    return int(point_id[4:])
