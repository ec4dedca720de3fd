"""A million rows in minutes: each the mean of the model's token vectors over a window of real text.

The passages stand one after the other, one long stream of word pieces; a window begins at every
BLOCK-th and is 1 to BLOCKS_MAX blocks long, and windows are taken in a random order. The mean over
the whole stream is subtracted from the token table first: without it all rows lie in one narrow
cone (median cosine 0.62 between any two), with it around 0. Queries are passages in no window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from tests.bench.corpora.files import QUERIES, ROOT, SEED, Column, column_of, write_corpus
from tests.bench.corpora.model import token_table, tokens_of
from tests.bench.corpora.texts import Passage

NAME: Final = "windows"
BLOCK: Final = 8
"""Word pieces. About 1,280,000 windows in the 10 million of the texts."""

BLOCKS_MAX: Final = 6
"""48 word pieces: four of five passages are shorter."""

QUERY_PIECES_MIN: Final = 12
_BLOCKS_AT_ONCE: Final = 8_192
"""100 MB of token vectors."""

Floats = npt.NDArray[np.float32]
Pieces = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """Which windows are rows and which passages are queries.

    stream: the word pieces of every passage that is no query. owners: of each piece, its passage.
    starts, lengths: of each row, in blocks. queries: passages.
    """

    stream: Pieces
    owners: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    queries: npt.NDArray[np.int64]


def make_windows(
    passages: Sequence[Passage],
    rows: int,
    progress: Callable[[str], None],
    about: Mapping[str, object],
    root: Path = ROOT,
) -> Path:
    """Writes the corpus and returns its directory. Row i is the same for any number of rows."""
    progress(f"cutting {len(passages):,} passages into word pieces")
    tokens = tokens_of([passage.text for passage in passages])
    cut = cut_windows(tokens, rows, QUERIES)
    progress(f"averaging {rows:,} windows of {len(cut.stream):,} word pieces")
    table = token_table()
    counts = np.bincount(cut.stream, minlength=len(table)).astype(np.float32)
    table -= counts @ table / len(cut.stream)
    asked = [tokens[number][: BLOCK * BLOCKS_MAX] for number in cut.queries]
    return write_corpus(
        NAME,
        vectors=window_means(cut.stream, cut.starts, cut.lengths, table),
        queries=np.stack([table[each].mean(axis=0) for each in asked]),
        columns=_columns(passages, cut.owners[cut.starts * BLOCK]),
        about=about,
        root=root,
    )


def cut_windows(tokens: Sequence[Pieces], rows: int, queries: int) -> Cut:
    """Raises: ValueError when the texts have fewer windows than rows."""
    random = np.random.default_rng(SEED)
    long_enough = np.flatnonzero([len(each) >= QUERY_PIECES_MIN for each in tokens])
    held_out = random.permutation(long_enough)[:queries]
    kept = np.setdiff1d(np.arange(len(tokens)), held_out)
    stream = np.concatenate([tokens[number] for number in kept])
    starts = random.permutation(max(0, len(stream) // BLOCK - BLOCKS_MAX))
    lengths = random.integers(1, BLOCKS_MAX + 1, len(starts))
    if rows > len(starts):
        raise ValueError(f"the texts have {len(starts):,} windows, fewer than {rows:,} rows")
    return Cut(
        stream=stream,
        owners=np.repeat(kept, [len(tokens[number]) for number in kept]),
        starts=starts[:rows],
        lengths=lengths[:rows],
        queries=held_out,
    )


def window_means(
    stream: Pieces,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    table: Floats,
) -> Floats:
    """Returns the mean over each window of `stream`. starts, lengths: in blocks.

    Sums every block once and every window from its blocks: a tenth of the work of summing windows
    of overlapping pieces.
    """
    blocks = len(stream) // BLOCK
    sums = np.empty((blocks, table.shape[1]), dtype=np.float32)
    pieces = stream[: blocks * BLOCK].reshape(blocks, BLOCK)
    for first in range(0, blocks, _BLOCKS_AT_ONCE):
        part = slice(first, first + _BLOCKS_AT_ONCE)
        np.sum(table[pieces[part]], axis=1, out=sums[part])
    means = sums[starts]
    for further in range(1, int(lengths.max(initial=1))):
        longer = np.flatnonzero(lengths > further)
        means[longer] += sums[starts[longer] + further]
    means /= (lengths * BLOCK)[:, None]
    return means


def _columns(passages: Sequence[Passage], owners: npt.NDArray[np.int64]) -> dict[str, Column]:
    """Returns the attributes of the passage that each window begins in."""
    kinds = column_of([passage.kind for passage in passages])
    services = column_of([passage.service for passage in passages])
    return {
        name: Column(codes=each.codes[owners], values=each.values)
        for name, each in (("kind", kinds), ("service", services))
    }
