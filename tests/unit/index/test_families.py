"""The fast-scan index against exact search, for every metric and awkward dimensions."""

import threading

import faiss
import numpy as np
import pytest

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.schema import Metric
from shoal_cluster.index import row_bits
from shoal_cluster.index.distances import NO_ROW, exact_top_k
from shoal_cluster.index.families import (
    FLAT_ROWS_MAX,
    Family,
    FastScanIndex,
    FlatIndex,
    choose_family,
    decode_codes,
    encode_codes,
    train_fast_scan,
)

ROWS = 1200


def clustered_vectors(count: int, dimension: int, seed: int) -> np.ndarray:
    """Points around 40 centres, the same for every seed; unit length."""
    centres = np.random.default_rng(0).standard_normal((40, dimension))
    random = np.random.default_rng(seed)
    spread = 0.7 * random.standard_normal((count, dimension))
    vectors = centres[random.integers(0, 40, count)] + spread
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def fast_scan(vectors: np.ndarray, metric: Metric) -> FastScanIndex:
    return FastScanIndex(train_fast_scan(vectors, metric, seed=1), vectors, metric)


def recall(found: np.ndarray, true: np.ndarray) -> float:
    pairs = zip(found.tolist(), true.tolist(), strict=True)
    return float(np.mean([len(set(f) & set(t)) / len(t) for f, t in pairs]))


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("dimension", [2, 3, 17, 384, 1537])
def test_rescored_hits_have_exact_keys_and_high_recall(metric: Metric, dimension: int) -> None:
    vectors = clustered_vectors(ROWS, dimension, seed=3)
    queries = clustered_vectors(30, dimension, seed=4)
    index = fast_scan(vectors, metric)

    keys, rows = index.search(queries, 10, depth=320)

    true_keys, true_rows = exact_top_k(vectors, queries, 10, metric)
    assert recall(rows, true_rows) >= 0.97
    found = rows == true_rows
    assert np.array_equal(keys[found], true_keys[found])
    assert (np.diff(keys, axis=1) >= 0).all()


@pytest.mark.parametrize("metric", Metric)
def test_a_filter_is_never_violated(metric: Metric) -> None:
    vectors = clustered_vectors(ROWS, 32, seed=5)
    queries = clustered_vectors(20, 32, seed=6)
    index = fast_scan(vectors, metric)
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
    for index in (fast_scan(vectors, Metric.L2), FlatIndex(vectors, Metric.L2)):
        keys, rows = index.search(vectors[:4], 5, allowed=allowed, depth=50)

        assert set(rows[0].tolist()) == {3, ROWS - 1, NO_ROW}
        assert np.isposinf(keys[:, 2:]).all() and (rows[:, 2:] == NO_ROW).all()


def test_flat_and_fast_scan_give_equal_keys() -> None:
    vectors = clustered_vectors(ROWS, 48, seed=8)
    queries = clustered_vectors(10, 48, seed=9)

    flat_keys, flat_rows = FlatIndex(vectors, Metric.COSINE).search(queries, 10)
    keys, rows = fast_scan(vectors, Metric.COSINE).search(queries, 10, depth=ROWS)

    assert np.array_equal(rows, flat_rows)
    assert np.array_equal(keys, flat_keys)


def test_the_same_seed_gives_the_same_codes() -> None:
    vectors = clustered_vectors(ROWS, 32, seed=10)

    first, second, other = (
        np.concatenate(encode_codes(train_fast_scan(vectors, Metric.COSINE, seed), 32))
        for seed in (1, 1, 2)
    )

    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_codes_survive_their_file() -> None:
    vectors = clustered_vectors(ROWS, 17, seed=11)
    codes = train_fast_scan(vectors, Metric.L2, seed=1)
    contents = np.concatenate(encode_codes(codes, 17))

    opened = decode_codes(contents, vectors, Metric.L2)

    before = FastScanIndex(codes, vectors, Metric.L2).search(vectors[:20], 5, depth=50)
    after = opened.search(vectors[:20], 5, depth=50)
    assert np.array_equal(before[1], after[1])


@pytest.mark.parametrize(
    "damage", ["short", "magic", "flipped", "other rows", "other metric", "cut"]
)
def test_wrong_codes_are_refused(damage: str) -> None:
    vectors = clustered_vectors(ROWS, 16, seed=12)
    contents = np.concatenate(encode_codes(train_fast_scan(vectors, Metric.L2, 1), 16))
    metric = Metric.L2
    if damage == "short":
        contents = contents[:20]
    elif damage == "magic":
        contents[0] ^= 1
    elif damage == "flipped":
        contents[200] ^= 1
    elif damage == "other rows":
        vectors = vectors[:-1]
    elif damage == "other metric":
        metric = Metric.DOT
    else:
        contents = contents[:-100]

    with pytest.raises(Corrupt, match="codes file"):
        decode_codes(contents, vectors, metric)


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


@pytest.mark.parametrize(
    ("rows", "dimension", "family"),
    [
        (1, 2, Family.FLAT),
        (FLAT_ROWS_MAX, 4096, Family.FLAT),
        (1500, 384, Family.FLAT),
        (1600, 384, Family.FAST_SCAN),
        (FLAT_ROWS_MAX + 1, 4096, Family.FAST_SCAN),
        (50_000, 2, Family.FLAT),
        (100_000, 2, Family.FAST_SCAN),
    ],
)
def test_small_segments_stay_flat(rows: int, dimension: int, family: Family) -> None:
    chosen, reason = choose_family(rows, dimension)

    assert chosen is family
    assert str(rows) in reason
