"""Exact keys and top k against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_cluster.domain.schema import Metric
from shoal_cluster.index import distances
from shoal_cluster.index.distances import (
    NO_ROW,
    exact_top_k,
    gather_keys,
    scan_keys,
    scan_keys_of_all,
    smallest,
)


def reference_keys(vectors: np.ndarray, queries: np.ndarray, metric: Metric) -> np.ndarray:
    wide, asked = vectors.astype(np.float64), queries.astype(np.float64)
    if metric is Metric.L2:
        return ((asked[:, np.newaxis] - wide[np.newaxis]) ** 2).sum(axis=2)
    return -(asked @ wide.T)


def random_vectors(count: int, dimension: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("dimension", [2, 3, 17, 384, 1537])
@pytest.mark.parametrize("queries", [1, 7])
def test_top_k_equals_brute_force(metric: Metric, dimension: int, queries: int) -> None:
    vectors = random_vectors(700, dimension, seed=1)
    asked = random_vectors(queries, dimension, seed=2)

    keys, rows = exact_top_k(vectors, asked, 10, metric)

    expected = reference_keys(vectors, asked, metric)
    assert np.allclose(keys, np.sort(expected, axis=1)[:, :10], rtol=1e-4, atol=1e-4)
    assert np.allclose(np.take_along_axis(expected, rows, axis=1), keys, rtol=1e-4, atol=1e-4)
    assert (np.diff(keys, axis=1) >= 0).all()


@pytest.mark.parametrize("metric", Metric)
def test_only_the_rows_asked_for_are_considered(metric: Metric) -> None:
    vectors = random_vectors(500, 24, seed=1)
    asked = random_vectors(3, 24, seed=2)
    wanted = np.arange(1, 500, 7, dtype=np.uint32)[::-1]

    keys, rows = exact_top_k(vectors, asked, 5, metric, wanted)

    expected = reference_keys(vectors, asked, metric)[:, np.sort(wanted)]
    assert np.array_equal(rows, np.sort(wanted)[np.argsort(expected, axis=1)[:, :5]])
    assert np.isin(rows, wanted).all()
    assert np.isfinite(keys).all()


@pytest.mark.parametrize("metric", Metric)
def test_keys_do_not_depend_on_how_a_row_was_reached(metric: Metric) -> None:
    """Scanned, gathered and batched keys of a row are the same float, bit for bit."""
    vectors = random_vectors(1000, 383, seed=3)
    asked = random_vectors(8, 383, seed=4)
    every = np.arange(1000)[np.newaxis].copy()

    scanned = scan_keys(vectors, asked[0], metric)
    gathered = gather_keys(vectors, asked[:1], every, metric)[0]
    batched_keys, batched_rows = exact_top_k(vectors, asked, 50, metric)

    assert np.array_equal(scanned, gathered)
    assert np.array_equal(batched_keys[0], scanned[batched_rows[0]])


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("queries", [1, 6])
def test_ties_stand_in_row_order(metric: Metric, queries: int) -> None:
    vectors = np.repeat(random_vectors(3, 16, seed=5), 400, axis=0)
    asked = random_vectors(queries, 16, seed=6)

    _, rows = exact_top_k(vectors, asked, 20, metric)

    assert (np.diff(rows, axis=1) == 1).all()
    assert (rows[:, 0] % 400 == 0).all()


@pytest.mark.parametrize("metric", Metric)
def test_blocks_do_not_change_the_answer(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = random_vectors(900, 12, seed=7)
    asked = random_vectors(5, 12, seed=8)
    some = np.arange(0, 900, 2)
    whole = [exact_top_k(vectors, asked[:n], 9, metric, r) for n in (1, 5) for r in (None, some)]

    monkeypatch.setattr(distances, "SCAN_BLOCK_ROWS", 64)
    monkeypatch.setattr(distances, "BATCH_BLOCK_ROWS", 64)
    cut = [exact_top_k(vectors, asked[:n], 9, metric, r) for n in (1, 5) for r in (None, some)]

    for (keys, rows), (cut_keys, cut_rows) in zip(whole, cut, strict=True):
        assert np.array_equal(keys, cut_keys)
        assert np.array_equal(rows, cut_rows)


@pytest.mark.parametrize("queries", [1, 4])
def test_fewer_rows_than_k_are_padded(queries: int) -> None:
    vectors = random_vectors(3, 8, seed=9)

    keys, rows = exact_top_k(vectors, random_vectors(queries, 8, seed=1), 5, Metric.L2)
    none = exact_top_k(vectors, vectors, 5, Metric.L2, np.empty(0, dtype=np.uint32))

    assert (np.sort(rows[:, :3], axis=1) == [0, 1, 2]).all()
    assert (rows[:, 3:] == NO_ROW).all() and np.isposinf(keys[:, 3:]).all()
    assert (none[1] == NO_ROW).all() and np.isposinf(none[0]).all()


def test_no_rows_at_all_give_padding_only() -> None:
    keys, rows = exact_top_k(
        np.empty((0, 4), np.float32), np.ones((2, 4), np.float32), 3, Metric.DOT
    )

    assert rows.tolist() == [[NO_ROW] * 3] * 2
    assert np.isposinf(keys).all()


@pytest.mark.parametrize("metric", Metric)
def test_padding_rows_get_an_infinite_key(metric: Metric) -> None:
    vectors = random_vectors(4, 8, seed=1)
    rows = np.array([[2, NO_ROW]])

    keys = gather_keys(vectors, vectors[:1], rows, metric)

    assert np.isfinite(keys[0, 0]) and np.isposinf(keys[0, 1])


def test_a_batch_of_cancelling_distances_is_still_exact() -> None:
    """Far from the origin, a matrix product alone loses all digits of a small l2 distance."""
    vectors = random_vectors(2000, 32, seed=10) * 1e-2 + 1000
    asked = vectors[:8] + 1e-3

    keys, rows = exact_top_k(vectors, asked, 3, Metric.L2)

    one_by_one = [exact_top_k(vectors, asked[i : i + 1], 3, Metric.L2) for i in range(8)]
    assert np.array_equal(rows, np.concatenate([one[1] for one in one_by_one]))
    assert np.array_equal(keys, np.concatenate([one[0] for one in one_by_one]))


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("order", ["any", "nearest last", "ties"])
def test_what_earlier_blocks_found_rules_no_answer_out(
    metric: Metric, offset: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch, whose blocks bound each other by estimates, answers as each query alone."""
    vectors = random_vectors(1500, 32, seed=10) * 1e-2 + offset
    asked = vectors[:6] + 1e-3
    if order == "ties":
        vectors[::3] = vectors[1::3]
    elif order == "nearest last":
        # By the middle of the queries: of the last blocks, nearly every row is possible.
        keys = reference_keys(vectors, asked.mean(axis=0, keepdims=True), metric)[0]
        vectors = np.ascontiguousarray(vectors[np.argsort(-keys)])
    monkeypatch.setattr(distances, "BATCH_BLOCK_ROWS", 64)
    monkeypatch.setattr(distances, "FEW_ROWS", 4)

    keys, rows = exact_top_k(vectors, asked, 7, metric)

    one_by_one = [exact_top_k(vectors, asked[i : i + 1], 7, metric) for i in range(6)]
    assert np.array_equal(rows, np.concatenate([one[1] for one in one_by_one]))
    assert np.array_equal(keys, np.concatenate([one[0] for one in one_by_one]))


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_scans_of_many_queries_have_the_keys_of_each_alone(
    metric: Metric, stored: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "SHARED_BLOCK_ROWS", 64)
    vectors = random_vectors(300, 37, seed=11).astype(stored)
    asked = random_vectors(5, 37, seed=12)

    keys = scan_keys_of_all(vectors, asked, metric)

    assert np.array_equal(keys, np.stack([scan_keys(vectors, each, metric) for each in asked]))


@given(
    st.lists(st.sampled_from([-1.5, 0.0, 0.25, 0.5, 7.0, np.inf]), max_size=700),
    st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_smallest_sorts_by_key_then_row(values: list[float], k: int) -> None:
    keys = np.array(values, dtype=np.float32)

    found_keys, found_rows = smallest(keys, None, k)

    expected = sorted((key, row) for row, key in enumerate(values))[:k]
    padding = [(np.inf, NO_ROW)] * (k - len(expected))
    assert list(zip(found_keys.tolist(), found_rows.tolist(), strict=True)) == expected + padding
