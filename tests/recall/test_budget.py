"""A budget instead of a recall, on real embeddings: it is kept to, and more never finds less."""

import itertools

import numpy as np
import pytest
from pyroaring import BitMap

from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.segment.search import SearchPlan
from tests.recall.test_debian_packages import Corpus, corpus
from tests.recall.test_filters_by_family import ROWS, SHAPES, segment_of_shape

__all__ = ["corpus"]

K, QUERIES = 10, 80
BUDGETS_NS = (0.0, 15e3, 25e3, 50e3, 100e3, 200e3, 400e3, 800e3, 1e9)


@pytest.fixture(scope="module", params=["fast_scan", "inverted"])
def reader(
    corpus: Corpus, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> SegmentReader:
    return segment_of_shape(corpus, SHAPES[request.param], tmp_path_factory.mktemp("segment"))


@pytest.fixture(scope="module")
def queries(corpus: Corpus) -> np.ndarray:
    return np.ascontiguousarray(corpus.queries[:: len(corpus.queries) // QUERIES][:QUERIES])


@pytest.mark.parametrize("share", [None, 0.3, 0.02])
def test_more_budget_finds_no_less_and_is_kept_to(
    reader: SegmentReader, queries: np.ndarray, share: float | None
) -> None:
    matching = None
    if share is not None:
        rows = np.random.default_rng(5).permutation(ROWS)[: int(share * ROWS)]
        matching = BitMap(rows.astype(np.uint32))
    truth = reader.search(queries, K, matching=matching, exact=True)
    found = [
        reader.search(queries, K, matching=matching, budget_ns=budget_ns)
        for budget_ns in BUDGETS_NS
    ]
    promised = [hits.report.expected_recall for hits in found]
    costs_ns = [reader.expected_ns(hits.report) for hits in found]
    recalls = [
        np.mean([np.isin(mine, true).mean() for mine, true in zip(h.rows, truth.rows, strict=True)])
        for h in found
    ]
    assert promised == sorted(promised) and promised[-1] == 1.0
    for budget_ns, cost_ns in zip(BUDGETS_NS, costs_ns, strict=True):
        assert cost_ns <= max(budget_ns, costs_ns[0]), "above the last rung the budget is kept to"
    for less, more in itertools.pairwise(recalls):
        assert more >= less - 0.02, recalls
    assert found[-1].report.plan in (SearchPlan.EXACT, SearchPlan.GATHER) and recalls[-1] == 1.0
    # 160 rows cost less to compare than any scan.
    assert len(set(costs_ns)) >= (1 if share == 0.02 else 4), "the ladder has rungs"


def test_the_reason_says_what_the_budget_pays_for(
    reader: SegmentReader, queries: np.ndarray
) -> None:
    report = reader.search(queries[:1], K, budget_ns=100e3).report
    assert report.reason.startswith("recall 0.") and "0.1 ms pay for" in report.reason
    assert report.plan is SearchPlan.SCAN


def test_nothing_at_all_still_aims_at_half(reader: SegmentReader, queries: np.ndarray) -> None:
    report = reader.search(queries, K, budget_ns=0.0).report
    assert report.expected_recall >= 0.5 and report.reason.startswith("recall 0.5 ")
