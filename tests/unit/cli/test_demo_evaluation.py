"""The demo's own arithmetic: it must not be able to flatter the engine."""

import numpy as np
import pytest

from shoal_cluster.cli.demo.corpus import ATTRIBUTES, Corpus, load_corpus
from shoal_cluster.cli.demo.evaluation import FILTER_CASES, ExactSearch, mean_reciprocal_rank

PYTHON, LARGE, PROGRAM = FILTER_CASES


def package(number: int, section: str = "net") -> dict[str, object]:
    return {
        "id": f"p{number}",
        "section": section,
        "installed_kb": None,
        "tags": [],
        "architecture": "all",
    }


def corpus_of(angles: list[float], sections: list[str] | None = None) -> Corpus:
    """Packages on a circle, and one query at angle 0: nearest is the smallest angle."""
    vectors = np.array([[np.cos(a), np.sin(a)] for a in angles], dtype=np.float32)
    named = sections or ["net"] * len(angles)
    return Corpus(
        packages=[package(number, section) for number, section in enumerate(named)],
        vectors=vectors,
        query_vectors=np.array([[1, 0]], dtype=np.float32),
        relevant=np.array([-1]),
    )


def test_recall_counts_what_is_among_the_k_best() -> None:
    truth = ExactSearch(corpus_of([0.1, 0.2, 0.3, 0.4]))
    assert truth.recall([["p0", "p1"]], k=2) == 1.0
    assert truth.recall([["p1", "p0"]], k=2) == 1.0
    assert truth.recall([["p0", "p2"]], k=2) == 0.5
    assert truth.recall([[]], k=2) == 0.0


def test_repeated_and_unknown_ids_count_for_nothing() -> None:
    truth = ExactSearch(corpus_of([0.1, 0.2, 0.3]))
    assert truth.recall([["p0", "p0"]], k=2) == 0.5
    assert truth.recall([["p0", "nobody"]], k=2) == 0.5


def test_hits_beyond_k_do_not_help() -> None:
    truth = ExactSearch(corpus_of([0.1, 0.2, 0.3]))
    assert truth.recall([["p2", "p1", "p0"]], k=1) == 0.0


def test_either_of_two_equal_vectors_may_be_the_kth() -> None:
    truth = ExactSearch(corpus_of([0.1, 0.2, 0.2, 0.4]))
    assert truth.recall([["p0", "p1"]], k=2) == truth.recall([["p0", "p2"]], k=2) == 1.0
    assert truth.recall([["p1", "p2"]], k=2) == 1.0


def test_filtered_recall_refuses_hits_that_violate_the_filter() -> None:
    truth = ExactSearch(corpus_of([0.1, 0.2, 0.3], ["net", "python", "python"]))
    assert truth.recall([["p1", "p2"]], k=2, case=PYTHON) == 1.0
    assert truth.recall([["p0", "p1"]], k=2, case=PYTHON) == 0.5


def test_fewer_matching_rows_than_k_ask_for_all_of_them() -> None:
    truth = ExactSearch(corpus_of([0.1, 0.2], ["net", "python"]))
    assert truth.recall([["p1"]], k=10, case=PYTHON) == 1.0
    assert truth.recall([[]], k=10, case=PYTHON) == 0.0


def test_recall_of_some_queries_compares_with_those() -> None:
    corpus = corpus_of([0.1, 3.0])
    two = Corpus(
        packages=corpus.packages,
        vectors=corpus.vectors,
        query_vectors=np.array([[1, 0], [-1, 0]], dtype=np.float32),
        relevant=corpus.relevant,
    )
    truth = ExactSearch(two)
    assert truth.recall([["p1"]], k=1, queries=[1]) == 1.0
    assert truth.recall([["p1"]], k=1, queries=[0]) == 0.0


def test_mrr_counts_misses_skips_unjudged_and_shares_ties() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.1], dtype=np.float32)
    ids = ["a", "b", "c", "d"]

    def mrr(*relevant: str | None) -> float:
        return mean_reciprocal_rank([ids] * len(relevant), [scores] * len(relevant), relevant)

    assert mrr("a") == 1.0
    assert mrr("b") == mrr("c") == 0.5
    assert mrr("d") == 0.25
    assert mrr("absent", "a", None) == 0.5


@pytest.mark.slow
def test_data_gives_the_published_mrr_with_exact_search() -> None:
    """0.4964 over all ranks; the demo looks 100 deep and must get 0.4957."""
    corpus = load_corpus()
    ids = np.array(corpus.ids)
    similarity = ExactSearch(corpus)._similarity
    relevant = [None if row < 0 else str(ids[row]) for row in corpus.relevant]
    assert len(corpus.packages) == 8000
    assert sum(each is not None for each in relevant) == 600
    expected = {8000: 0.4964, 100: 0.4957, 10: 0.4903}
    order = np.argsort(-similarity, axis=1, kind="stable")
    for depth, mrr in expected.items():
        best = order[:, :depth]
        found = mean_reciprocal_rank(
            [ids[rows].tolist() for rows in best],
            [similarity[query, rows] for query, rows in enumerate(best)],
            relevant,
        )
        assert found == pytest.approx(mrr, abs=0.0001)


def test_filters_let_through_what_they_say() -> None:
    truth = ExactSearch(load_corpus())
    counts = {case.name: int(truth.matching(case).sum()) for case in FILTER_CASES}
    assert list(counts.values()) == [541, 2195, 692]


def test_what_a_package_does_not_state_is_no_attribute() -> None:
    corpus = load_corpus()
    silent = next(row for row, each in enumerate(corpus.packages) if each["installed_kb"] is None)
    assert "installed_kb" not in corpus.attributes(silent)
    assert set(corpus.attributes(0)) == set(ATTRIBUTES)
    assert set(corpus.payload(0)) == {"title", "text", "version"}
