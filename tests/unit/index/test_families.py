"""Codes against exact search: every metric, awkward dimensions, one list and several."""

import threading

import faiss
import numpy as np
import pytest

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.schema import Metric
from shoal_cluster.index import row_bits
from shoal_cluster.index.distances import NO_ROW, exact_top_k
from shoal_cluster.index.families import CodeShape, Effort, Family
from shoal_cluster.index.fast_scan import FastScanIndex, decode_codes, encode_codes, train_codes
from shoal_cluster.index.rescoring import rescored_top_k

ROWS = 1200


def clustered_vectors(count: int, dimension: int, seed: int) -> np.ndarray:
    """Points around 40 centres, the same for every seed; unit length."""
    centres = np.random.default_rng(0).standard_normal((40, dimension))
    random = np.random.default_rng(seed)
    spread = 0.7 * random.standard_normal((count, dimension))
    vectors = centres[random.integers(0, 40, count)] + spread
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Searched:
    """Vectors and codes of them; depth counts as the reader counts it."""

    def __init__(self, vectors: np.ndarray, metric: Metric, shape: CodeShape, seed: int = 1):
        self.vectors, self.metric = vectors, metric
        self.codes = train_codes(vectors, metric, shape, seed)
        self.index = FastScanIndex(self.codes, vectors.shape[1])

    def search(self, queries, k, *, depth, allowed=None, probes=None):
        effort = Effort(depth=max(depth, k), probes=probes or self.index.shape.lists)
        candidates = self.index.candidates(queries, effort, allowed)
        return rescored_top_k(self.vectors, queries, candidates, k, self.metric)[:2]


def shape_of(vectors: np.ndarray, lists: int = 1) -> CodeShape:
    return CodeShape(values_a_code=4 if vectors.shape[1] >= 256 else 2, lists=lists)


def fast_scan(vectors: np.ndarray, metric: Metric, lists: int = 1) -> Searched:
    return Searched(vectors, metric, shape_of(vectors, lists))


def recall(found: np.ndarray, true: np.ndarray) -> float:
    pairs = zip(found.tolist(), true.tolist(), strict=True)
    return float(np.mean([len(set(f) & set(t)) / len(t) for f, t in pairs]))


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("dimension", [2, 3, 17, 384, 1537])
@pytest.mark.parametrize("lists", [1, 12])
def test_rescored_hits_have_exact_keys_and_high_recall(
    metric: Metric, dimension: int, lists: int
) -> None:
    vectors = clustered_vectors(ROWS, dimension, seed=3)
    queries = clustered_vectors(30, dimension, seed=4)
    index = fast_scan(vectors, metric, lists)

    keys, rows = index.search(queries, 10, depth=320)

    true_keys, true_rows = exact_top_k(vectors, queries, 10, metric)
    assert recall(rows, true_rows) >= 0.97
    found = rows == true_rows
    assert np.array_equal(keys[found], true_keys[found])
    assert (np.diff(keys, axis=1) >= 0).all()


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("lists", [1, 12])
def test_a_filter_is_never_violated(metric: Metric, lists: int) -> None:
    vectors = clustered_vectors(ROWS, 32, seed=5)
    queries = clustered_vectors(20, 32, seed=6)
    index = fast_scan(vectors, metric, lists)
    for share in (0.01, 0.1, 0.5, 0.99):
        rows = np.flatnonzero(np.random.default_rng(7).random(ROWS) < share)
        allowed = row_bits.bits_of_rows(rows, ROWS)

        keys, found = index.search(queries, 10, allowed=allowed, depth=160)

        assert np.isin(found[found != NO_ROW], rows).all()
        assert recall(found, exact_top_k(vectors, queries, 10, metric, rows)[1]) >= 0.97
        assert np.array_equal(np.isposinf(keys), found == NO_ROW)


def test_fewer_allowed_rows_than_k_are_padded() -> None:
    vectors = clustered_vectors(ROWS, 32, seed=5)
    allowed = row_bits.bits_of_rows(np.array([3, ROWS - 1]), ROWS)
    for lists in (1, 12):
        index = fast_scan(vectors, Metric.L2, lists)

        keys, rows = index.search(vectors[:4], 5, allowed=allowed, depth=50)

        assert set(rows[0].tolist()) == {3, ROWS - 1, NO_ROW}
        assert np.isposinf(keys[:, 2:]).all() and (rows[:, 2:] == NO_ROW).all()


@pytest.mark.parametrize("lists", [1, 12])
def test_comparing_all_and_scanning_give_equal_keys(lists: int) -> None:
    vectors = clustered_vectors(ROWS, 48, seed=8)
    queries = clustered_vectors(10, 48, seed=9)

    exact_keys, exact_rows = exact_top_k(vectors, queries, 10, Metric.COSINE)
    keys, rows = fast_scan(vectors, Metric.COSINE, lists).search(queries, 10, depth=ROWS)

    assert np.array_equal(rows, exact_rows)
    assert np.array_equal(keys, exact_keys)


@pytest.mark.parametrize("lists", [1, 12])
def test_the_same_seed_gives_the_same_codes(lists: int) -> None:
    vectors = clustered_vectors(ROWS, 32, seed=10)
    shape = shape_of(vectors, lists)

    first, second, other = (
        np.concatenate(encode_codes(train_codes(vectors, Metric.COSINE, shape, seed), 32))
        for seed in (1, 1, 2)
    )

    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("lists", [1, 12])
def test_codes_survive_their_file(lists: int) -> None:
    vectors = clustered_vectors(ROWS, 17, seed=11)
    written = fast_scan(vectors, Metric.L2, lists)
    contents = np.concatenate(encode_codes(written.codes, 17))

    opened = decode_codes(contents, rows=ROWS, dimension=17, metric=Metric.L2)

    effort = Effort(depth=50, probes=min(lists, 3))
    assert np.array_equal(
        opened.candidates(vectors[:20], effort), written.index.candidates(vectors[:20], effort)
    )
    assert opened.shape == CodeShape(values_a_code=2, lists=lists)
    assert opened.family is (Family.FAST_SCAN if lists == 1 else Family.INVERTED)


@pytest.mark.parametrize(
    "damage", ["short", "magic", "flipped", "other rows", "other metric", "other lists", "cut"]
)
def test_wrong_codes_are_refused(damage: str) -> None:
    vectors = clustered_vectors(ROWS, 16, seed=12)
    contents = np.concatenate(encode_codes(fast_scan(vectors, Metric.L2).codes, 16))
    rows, metric = ROWS, Metric.L2
    if damage == "short":
        contents = contents[:20]
    elif damage == "magic":
        contents[0] ^= 1
    elif damage == "flipped":
        contents[200] ^= 1
    elif damage == "other rows":
        rows -= 1
    elif damage == "other metric":
        metric = Metric.DOT
    elif damage == "other lists":
        contents[32] ^= 2
    else:
        contents = contents[:-100]

    with pytest.raises(Corrupt, match="codes file"):
        decode_codes(contents, rows=rows, dimension=16, metric=metric)


@pytest.mark.parametrize("metric", Metric)
def test_fewer_lists_are_searched_the_nearest_first(metric: Metric) -> None:
    vectors = clustered_vectors(ROWS, 32, seed=16)
    queries = clustered_vectors(40, 32, seed=17)
    index = fast_scan(vectors, metric, lists=40)
    true = exact_top_k(vectors, queries, 10, metric)[1]

    found = [recall(index.search(queries, 10, depth=160, probes=p)[1], true) for p in (1, 4, 40)]

    places = index.index.list_places(queries, true)
    covered = [float((places < p).mean()) for p in (1, 4, 40)]
    assert found == sorted(found) and 0.3 < found[0] < found[1] and found[2] > 0.97
    assert np.allclose(found, covered, atol=0.04) and covered[2] == 1.0


def test_the_share_of_allowed_rows_is_that_around_the_query() -> None:
    vectors = clustered_vectors(ROWS, 32, seed=18)
    index = fast_scan(vectors, Metric.L2, lists=40).index
    near = np.linalg.norm(vectors - vectors[0], axis=1) < 1.0
    around_it = row_bits.bits_of_rows(np.flatnonzero(near), ROWS)
    elsewhere = row_bits.bits_of_rows(np.flatnonzero(~near), ROWS)

    assert index.allowed_shares(vectors[:1], 1, around_it)[0] > 0.8
    assert index.allowed_shares(vectors[:1], 1, elsewhere)[0] < 0.2
    halves = row_bits.bits_of_rows(np.arange(0, ROWS, 2), ROWS)
    assert 0.35 < index.allowed_shares(vectors[:9], 30, halves).mean() < 0.65


def test_two_threads_search_one_index() -> None:
    vectors = clustered_vectors(ROWS, 64, seed=13)
    queries = clustered_vectors(200, 64, seed=14)
    index = fast_scan(vectors, Metric.COSINE)
    allowed = [row_bits.bits_of_rows(np.arange(first, ROWS, 2), ROWS) for first in (0, 1)]
    alone = [index.search(queries, 10, allowed=bits, depth=80)[1] for bits in allowed]
    together: dict[int, np.ndarray] = {}

    def search(which: int) -> None:
        parts = [
            index.search(queries[i : i + 1], 10, allowed=allowed[which].copy(), depth=80)[1]
            for i in range(len(queries))
        ]
        together[which] = np.concatenate(parts)

    threads = [threading.Thread(target=search, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)

    for which in (0, 1):
        assert np.array_equal(together[which], alone[which])


def test_a_search_uses_one_thread_in_every_thread() -> None:
    """FAISS's thread count belongs to the calling thread, so each must set its own."""
    vectors = clustered_vectors(ROWS, 32, seed=15)
    index = fast_scan(vectors, Metric.COSINE)
    counts: list[int] = []

    def search() -> None:
        index.search(vectors[:1], 10, depth=80)
        counts.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=search)
    thread.start()
    thread.join(timeout=30)

    assert counts == [1]
