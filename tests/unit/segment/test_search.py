"""Searching a segment: plans, filters, deletes, padding, threads."""

import threading
from pathlib import Path

import numpy as np
import pytest
from pyroaring import BitMap

from shoal_cluster.domain.schema import Metric
from shoal_cluster.filtering.expression import Comparison, Operator
from shoal_cluster.index.distances import NO_ROW
from shoal_cluster.index.families import Family
from shoal_cluster.segment.deletes import alive_bits
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.segment.search import SearchPlan, SegmentHits
from tests.unit.segment.rows import build_and_open, random_rows

LARGE, DIMENSION = 16_000, 48
QUERIES = random_rows(40, DIMENSION, seed=99).vectors


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> SegmentReader:
    directory = tmp_path_factory.mktemp("large")
    return build_and_open(random_rows(LARGE, DIMENSION), directory)[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SegmentReader:
    return build_and_open(random_rows(500, DIMENSION), tmp_path_factory.mktemp("small"))[1]


def brute_force(reader: SegmentReader, queries: np.ndarray, k: int, rows: np.ndarray) -> np.ndarray:
    """Rows of the k largest inner products among `rows`, (nq, k)."""
    products = queries.astype(np.float64) @ reader.vectors[rows].astype(np.float64).T
    return rows[np.argsort(-products, axis=1)[:, :k]]


def recall(hits: SegmentHits, true: np.ndarray) -> float:
    pairs = zip(hits.rows.tolist(), true.tolist(), strict=True)
    return float(np.mean([len(set(found) & set(t)) / len(t) for found, t in pairs]))


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("dimension", [2, 3, 17, 384, 1537])
def test_exact_search_equals_numpy(tmp_path: Path, metric: Metric, dimension: int) -> None:
    rows = random_rows(700, dimension)
    _, reader = build_and_open(rows, tmp_path, metric)
    queries = random_rows(20, dimension, seed=5).vectors

    hits = reader.search(queries, 10, exact=True)

    wide, asked = rows.vectors.astype(np.float64), queries.astype(np.float64)
    expected = -(asked @ wide.T)
    if metric is Metric.L2:
        expected = ((asked[:, np.newaxis] - wide[np.newaxis]) ** 2).sum(axis=2)
    assert np.allclose(hits.keys, np.sort(expected, axis=1)[:, :10], atol=1e-5)
    assert np.allclose(np.take_along_axis(expected, hits.rows, axis=1), hits.keys, atol=1e-5)
    assert hits.report.plan is SearchPlan.EXACT and hits.report.expected_recall == 1.0


def test_a_plain_search_scans_codes_and_reaches_its_recall(large: SegmentReader) -> None:
    true = brute_force(large, QUERIES, 10, np.arange(LARGE))

    hits = large.search(QUERIES, 10, recall_target=0.98)

    assert large.family is Family.FAST_SCAN
    assert hits.report.plan is SearchPlan.SCAN
    assert hits.report.rows_rescored == 10 * hits.report.rescore_factor
    assert hits.report.expected_recall >= 0.98
    assert recall(hits, true) >= 0.97


def test_a_higher_target_rescores_deeper_and_one_means_exact(large: SegmentReader) -> None:
    shallow, deep, exact = (
        large.search(QUERIES, 10, recall_target=target).report for target in (0.8, 0.99, 1.0)
    )

    assert 0 < shallow.rescore_factor < deep.rescore_factor
    assert exact.plan is SearchPlan.EXACT and exact.rows_scanned == LARGE


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.05, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_filters_of_any_selectivity_keep_recall(large: SegmentReader, share: float) -> None:
    """Invariant S-6."""
    rows = np.flatnonzero(np.random.default_rng(4).random(LARGE) < share)
    rows = rows if rows.size else np.array([77])
    k = min(10, rows.size)

    hits = large.search(QUERIES, 10, matching=BitMap(rows.tolist()), recall_target=0.98)

    assert np.isin(hits.rows[hits.rows != NO_ROW], rows).all()
    assert recall(hits, brute_force(large, QUERIES, k, rows)) >= 0.97
    if share == 1.0:
        assert hits.report.plan is SearchPlan.SCAN
    elif share <= 0.01:
        assert hits.report.plan is SearchPlan.GATHER
    elif share >= 0.9:
        assert hits.report.plan is SearchPlan.SCAN_BITMAP


def test_dead_rows_are_never_returned(large: SegmentReader) -> None:
    best = large.search(QUERIES, 50, exact=True).rows
    dead = BitMap(np.unique(best[:, ::2]).tolist())
    alive = alive_bits(LARGE, dead)
    living = np.array(sorted(set(range(LARGE)) - set(dead)))

    for exact in (False, True):
        hits = large.search(QUERIES, 10, alive=alive, recall_target=0.98, exact=exact)

        assert np.isin(hits.rows, living).all()
        assert recall(hits, brute_force(large, QUERIES, 10, living)) >= 0.97


@pytest.mark.parametrize("section", ["s3", "absent"])
@pytest.mark.parametrize("which", ["small", "large"])
def test_filter_and_deletes_work_together(
    small: SegmentReader, large: SegmentReader, which: str, section: str
) -> None:
    reader = small if which == "small" else large
    matching = reader.evaluate(Comparison("section", Operator.EQ, section))
    dead = BitMap(range(3, reader.rows, 20))  # half of section s3
    expected = np.array(sorted(set(matching) - set(dead)), dtype=np.int64)

    hits = reader.search(
        QUERIES, 10, alive=alive_bits(reader.rows, dead), matching=matching, recall_target=0.98
    )

    if section == "absent":
        assert hits.report.plan is SearchPlan.NO_ROWS
        assert (hits.rows == NO_ROW).all()
    else:
        assert np.isin(hits.rows, expected).all()
        assert recall(hits, brute_force(reader, QUERIES, 10, expected)) >= 0.97


@pytest.mark.parametrize("exact", [False, True])
def test_a_wide_filter_and_deletes_work_together(large: SegmentReader, exact: bool) -> None:
    matching = large.evaluate(Comparison("size", Operator.GE, 2000))
    dead = BitMap(range(0, LARGE, 4))
    expected = np.array(sorted(set(matching) - set(dead)), dtype=np.int64)

    hits = large.search(
        QUERIES,
        10,
        alive=alive_bits(LARGE, dead),
        matching=matching,
        recall_target=0.98,
        exact=exact,
    )

    assert hits.report.plan is (SearchPlan.EXACT if exact else SearchPlan.SCAN_BITMAP)
    assert hits.report.rows_scanned == (len(expected) if exact else LARGE)
    assert np.isin(hits.rows, expected).all()
    assert recall(hits, brute_force(large, QUERIES, 10, expected)) >= 0.97


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("which", ["small", "large"])
def test_all_rows_dead_give_padding_only(
    small: SegmentReader, large: SegmentReader, which: str, exact: bool
) -> None:
    reader = small if which == "small" else large
    alive = alive_bits(reader.rows, BitMap(range(reader.rows)))

    hits = reader.search(QUERIES[:3], 4, alive=alive, exact=exact)

    assert hits.report.plan is SearchPlan.NO_ROWS and hits.report.rows_scanned == 0
    assert hits.keys.shape == hits.rows.shape == (3, 4)
    assert np.isposinf(hits.keys).all() and (hits.rows == NO_ROW).all()


@pytest.mark.parametrize("which", ["small", "large"])
def test_k_past_the_living_rows_is_padded(
    small: SegmentReader, large: SegmentReader, which: str
) -> None:
    reader = small if which == "small" else large
    living = np.array([2, 9, reader.rows - 1])
    alive = alive_bits(reader.rows, BitMap(range(reader.rows)) - BitMap(living.tolist()))

    hits = reader.search(QUERIES[:5], 1000, alive=alive)

    assert (np.sort(hits.rows[:, :3], axis=1) == living).all()
    assert (hits.rows[:, 3:] == NO_ROW).all() and np.isposinf(hits.keys[:, 3:]).all()


def test_no_queries_give_no_hits(large: SegmentReader) -> None:
    for exact in (False, True):
        hits = large.search(np.empty((0, DIMENSION), np.float32), 10, exact=exact)

        assert hits.rows.shape == (0, 10)


def test_scanned_and_exact_hits_carry_the_same_keys(large: SegmentReader) -> None:
    scanned = large.search(QUERIES, 10, recall_target=0.98)
    exact = large.search(QUERIES, 10, exact=True)

    same = scanned.rows == exact.rows
    assert same.mean() > 0.9
    assert np.array_equal(scanned.keys[same], exact.keys[same])


def test_one_query_and_a_batch_give_the_same_hits(large: SegmentReader) -> None:
    batch = large.search(QUERIES, 10, recall_target=0.98)

    for i in range(len(QUERIES)):
        single = large.search(QUERIES[i : i + 1], 10, recall_target=0.98)
        assert np.array_equal(single.rows[0], batch.rows[i])
        assert np.array_equal(single.keys[0], batch.keys[i])


def test_two_threads_read_one_segment(large: SegmentReader) -> None:
    """Searches with different filters, lookups and payloads at once, as serving threads do."""
    filters = [
        large.evaluate(Comparison("size", Operator.LT, LARGE // 2)),
        large.evaluate(Comparison("size", Operator.GE, LARGE // 2)),
    ]
    expected = [large.search(QUERIES, 10, matching=matching).rows for matching in filters]
    failures: list[str] = []

    def serve(which: int) -> None:
        for _ in range(5):
            for i in range(len(QUERIES)):
                hits = large.search(QUERIES[i : i + 1], 10, matching=filters[which])
                if not np.array_equal(hits.rows[0], expected[which][i]):
                    failures.append(f"thread {which} query {i}: {hits.rows[0]}")
                for row, tail in zip(hits.rows[0], large.tails(hits.rows[0]), strict=True):
                    if b'{"row": %d}' % row not in tail:
                        failures.append(f"row {row} has tail {tail!r}")

    threads = [threading.Thread(target=serve, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)

    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
