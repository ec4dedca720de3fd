"""A corpus on disk: vectors and queries as float16, an attribute a column, what it was made from.

    vectors.f16.npy  (rows, 384), unit length before rounding
    queries.f16.npy  (QUERIES, 384), of texts that no row was made from
    kind.npy, service.npy  codes of each row, into the values that about.json lists
    about.json       rows, seeds, versions of the packages, values of each attribute

Row i is the same in every corpus of a kind, however many rows it has: a larger one serves smaller
sizes. Needs numpy alone, so that it is read in any environment.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

ROOT: Final = Path("build/corpora")
QUERIES: Final = 1_000
SEED: Final = 20_261_125

_VECTORS: Final = "vectors.f16.npy"
_QUERIES: Final = "queries.f16.npy"
_ABOUT: Final = "about.json"


class NoCorpus(Exception):
    """There is none, or none that is large enough; says how to make it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """One attribute. codes: of each row, an index into `values`."""

    codes: npt.NDArray[np.uint16]
    values: Sequence[str]

    def nearest_to(self, share: float) -> str:
        """Returns the value whose share of the rows is nearest to `share`, the first of equals."""
        counts = np.bincount(self.codes, minlength=len(self.values))
        return self.values[int(np.argmin(np.abs(counts / len(self.codes) - share)))]

    def matches(self, value: str) -> npt.NDArray[np.bool_]:
        return np.asarray(self.codes == self.values.index(value))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredCorpus:
    """vectors: (rows, 384) float16, mapped. queries: (QUERIES, 384) float16."""

    vectors: npt.NDArray[np.float16]
    queries: npt.NDArray[np.float16]
    columns: Mapping[str, Column]
    about: Mapping[str, Any]


def open_corpus(name: str, rows: int, root: Path = ROOT) -> StoredCorpus:
    """Maps the first `rows` rows of the smallest corpus of that name that has them.

    Raises: NoCorpus.
    """
    found = sorted(
        (size, directory)
        for directory in root.glob(f"{name}-*")
        if (size := int(directory.name.rpartition("-")[2])) >= rows
    )
    if not found:
        raise NoCorpus(
            f"no corpus {name!r} of {rows:,} rows in {root}: "
            f"make bench-corpus CORPUS={name} ROWS={rows}"
        )
    directory = found[0][1]
    about = json.loads((directory / _ABOUT).read_text())
    return StoredCorpus(
        vectors=np.load(directory / _VECTORS, mmap_mode="r")[:rows],
        queries=np.load(directory / _QUERIES),
        columns={
            column: Column(codes=np.load(directory / f"{column}.npy")[:rows], values=values)
            for column, values in about["values"].items()
        },
        about=about,
    )


def write_corpus(
    name: str,
    *,
    vectors: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
    columns: Mapping[str, Column],
    about: Mapping[str, Any],
    root: Path = ROOT,
) -> Path:
    """Writes a corpus whole or not at all; returns its directory."""
    directory = root / f"{name}-{len(vectors)}"
    unfinished = root / f".{directory.name}.{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        np.save(unfinished / _VECTORS, unit(vectors).astype(np.float16))
        np.save(unfinished / _QUERIES, unit(queries).astype(np.float16))
        for column, each in columns.items():
            np.save(unfinished / f"{column}.npy", each.codes.astype(np.uint16))
        values = {column: list(each.values) for column, each in columns.items()}
        described = {"rows": len(vectors), "seed": SEED, **about, "values": values}
        (unfinished / _ABOUT).write_text(json.dumps(described, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def column_of(values: Sequence[str]) -> Column:
    """Returns the column with these values row by row."""
    names, codes = np.unique(np.asarray(values), return_inverse=True)
    return Column(codes=codes.astype(np.uint16), values=[str(name) for name in names])


def unit(vectors: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Returns the vectors scaled to unit length, as float32."""
    wide = vectors.astype(np.float32, copy=False)
    scaled: npt.NDArray[np.float32] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return scaled
