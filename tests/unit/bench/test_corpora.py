"""Corpora: the same rows whatever their number, queries held out, truth under a filter."""

from pathlib import Path

import numpy as np
import pytest

from tests.bench.corpora import passages as passages_module
from tests.bench.corpora.files import (
    QUERIES,
    Column,
    NoCorpus,
    column_of,
    open_corpus,
    unit,
    write_corpus,
)
from tests.bench.corpora.passages import PART_ROWS, make_passages
from tests.bench.corpora.texts import Passage
from tests.bench.corpora.windows import BLOCK, BLOCKS_MAX, cut_windows, window_means
from tests.bench.corpus import BenchCorpus, K, Truth, make_corpus

RANDOM = np.random.default_rng(5)


def _tokens(texts: int) -> list[np.ndarray]:
    """Texts whose word pieces are all different, so that a piece tells its text."""
    lengths = np.random.default_rng(1).integers(3, 60, texts)
    pieces = np.split(np.arange(lengths.sum(), dtype=np.uint16), np.cumsum(lengths)[:-1])
    return list(pieces)


def _passages(count: int) -> list[Passage]:
    return [
        Passage(text=f"text {number}", service=f"s{number % 7}", kind="field")
        for number in range(count)
    ]


def test_window_is_the_mean_of_its_pieces() -> None:
    stream = RANDOM.integers(0, 50, 40 * BLOCK).astype(np.uint16)
    table = RANDOM.standard_normal((50, 4)).astype(np.float32)
    starts, lengths = np.array([0, 7, 20, 7]), np.array([1, 6, 3, 2])
    expected = [
        table[stream[start * BLOCK : (start + length) * BLOCK]].mean(axis=0)
        for start, length in zip(starts, lengths, strict=True)
    ]
    np.testing.assert_allclose(window_means(stream, starts, lengths, table), expected, atol=1e-6)


def test_windows_share_no_piece_with_a_query_and_begin_in_their_owner() -> None:
    tokens = _tokens(300)
    cut = cut_windows(tokens, 200, queries=20)
    asked = np.concatenate([tokens[number] for number in cut.queries])
    assert len(cut.queries) == 20
    assert not np.isin(cut.stream, asked).any()
    for start in cut.starts:
        owner = cut.owners[start * BLOCK]
        assert cut.stream[start * BLOCK] in tokens[owner]


def test_more_windows_begin_with_the_same_ones() -> None:
    tokens = _tokens(300)
    few, many = cut_windows(tokens, 50, queries=20), cut_windows(tokens, 300, queries=20)
    np.testing.assert_array_equal(few.starts, many.starts[:50])
    np.testing.assert_array_equal(few.lengths, many.lengths[:50])
    assert many.lengths.min() == 1 and many.lengths.max() == BLOCKS_MAX


def test_more_windows_than_the_texts_have_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 10,000 rows"):
        cut_windows(_tokens(100), 10_000, queries=5)


def test_interrupted_embedding_goes_on_where_it_stopped(tmp_path: Path) -> None:
    given, embedded = _passages(QUERIES + 2 * PART_ROWS), []

    def embed(texts: list[str]) -> np.ndarray:
        embedded.extend(texts)
        numbers = np.array([int(text.split()[1]) for text in texts], dtype=np.float32)
        return np.stack([numbers + 1, np.ones_like(numbers)], axis=1)

    def make(rows: int) -> np.ndarray:
        root = make_passages(given, rows, lambda step: None, {}, tmp_path, lambda: embed)
        return np.load(root / "vectors.f16.npy")

    few = make(PART_ROWS - 5)
    assert len(embedded) == QUERIES + PART_ROWS
    many = make(PART_ROWS + 5)
    assert len(embedded) == QUERIES + 2 * PART_ROWS, "what was embedded before is not again"
    assert len(set(embedded)) == len(embedded), "queries are held out"
    np.testing.assert_array_equal(few, many[: len(few)])
    assert passages_module.TOKENS_MAX <= 256, "the model reads no more"


def test_corpus_is_read_back_and_serves_smaller_sizes(tmp_path: Path) -> None:
    vectors = RANDOM.standard_normal((20, 8)).astype(np.float32)
    columns = {"kind": column_of(["a", "b"] * 10)}
    write_corpus(
        "w", vectors=vectors, queries=vectors[:3], columns=columns, about={}, root=tmp_path
    )
    opened = open_corpus("w", 7, tmp_path)
    np.testing.assert_allclose(opened.vectors, unit(vectors)[:7], atol=1e-3)
    assert opened.columns["kind"].matches("b").tolist() == [False, True] * 3 + [False]
    assert opened.about["rows"] == 20
    assert [each.name for each in tmp_path.iterdir()] == ["w-20"], "nothing unfinished stays"


def test_corpus_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(NoCorpus, match="make bench-corpus CORPUS=windows ROWS=100"):
        open_corpus("windows", 100, tmp_path)


def test_attribute_value_nearest_to_a_share_is_found() -> None:
    column = column_of(["rare"] + ["tenth"] * 10 + ["most"] * 89)
    assert column.nearest_to(0.1) == "tenth"
    assert column.nearest_to(0.01) == "rare"


def _corpus(rows: int) -> BenchCorpus:
    vectors = unit(RANDOM.standard_normal((rows, 16)).astype(np.float32))
    similarity = np.sort(vectors[:2] @ vectors.T, axis=1)
    return BenchCorpus(
        vectors=vectors,
        queries=vectors[:2],
        columns={"odd": Column(codes=(np.arange(rows) % 2).astype(np.uint16), values=["n", "y"])},
        truth=Truth(kth=similarity[:, -K]),
    )


def test_recall_under_a_filter_counts_only_rows_that_pass() -> None:
    corpus = _corpus(400)
    truth = corpus.truth_where("odd", "y")
    asked = np.arange(2)
    passing = np.arange(1, 400, 2)
    ranked = np.argsort(-(corpus.queries @ corpus.vectors[passing].T), axis=1)[:, :K]
    right = passing[ranked]
    assert corpus.recall(right, asked, truth) == 1.0
    wrong = right.copy()
    wrong[:, 0] = [0, 2]  # the queries themselves or near them, but they do not pass
    assert corpus.recall(wrong, asked, truth) == pytest.approx(0.9)


def test_demo_corpus_answers_its_own_queries_with_recall_one() -> None:
    corpus = make_corpus(300)
    asked = np.arange(len(corpus.queries))
    nearest = np.argsort(-(corpus.queries @ corpus.vectors.T), axis=1)[:, :K]
    assert corpus.recall(nearest, asked) == 1.0
    assert corpus.recall(nearest[:, ::-1] * 0 - 1, asked) == 0.0
    assert len(corpus.columns["section"].codes) == 300
