"""The demo's data: real packages, real embeddings, real attributes (data/debian_packages)."""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.schema import AttributeTypeName, Model

DATA = Path(__file__).parent.parent / "data" / "debian_packages"

COLLECTION = "debian-packages"
MODEL: Model = ("all-MiniLM-L6-v2", "1")
PARTITION_BY = "section"
ATTRIBUTES: Mapping[str, AttributeTypeName] = {
    "section": "keyword",
    "priority": "keyword",
    "architecture": "keyword",
    "installed_kb": "int",
    "download_bytes": "int",
    "maintainer": "keyword",
    "source": "keyword",
    "tags": "keyword_list",
    "depends": "int",
}
_PAYLOAD = ("title", "text", "version")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """Row i of `vectors` belongs to package i, row j of `query_vectors` to query j.

    vectors, query_vectors: float32, widened from float16, nearly unit length. relevant: for each
    query the row of the package it was taken from, -1 for none known.
    """

    packages: Sequence[Mapping[str, Any]]
    vectors: Floats
    query_vectors: Floats
    relevant: npt.NDArray[np.int64]

    @property
    def ids(self) -> list[str]:
        return [package["id"] for package in self.packages]

    def attributes(self, row: int) -> dict[str, Any]:
        """Returns the declared attributes of a row; what the package does not say stays missing."""
        package = self.packages[row]
        return {name: package[name] for name in ATTRIBUTES if package[name] is not None}

    def payload(self, row: int) -> dict[str, Any]:
        package = self.packages[row]
        return {name: package[name] for name in _PAYLOAD}

    def row_of_section(self, section: str) -> int:
        """Returns the first row of a section."""
        return next(
            row for row, package in enumerate(self.packages) if package["section"] == section
        )


def load_corpus(directory: Path = DATA) -> Corpus:
    """Reads the data that comes with Shoal."""
    with gzip.open(directory / "packages.jsonl.gz", "rt", encoding="utf-8") as lines:
        packages = [json.loads(line) for line in lines]
    with (directory / "queries.jsonl").open(encoding="utf-8") as lines:
        queries = [json.loads(line) for line in lines]
    row_of = {package["id"]: row for row, package in enumerate(packages)}
    relevant = [row_of[query["relevant"][0]] if query.get("relevant") else -1 for query in queries]
    return Corpus(
        packages=packages,
        vectors=np.load(directory / "vectors.f16.npy").astype(np.float32),
        query_vectors=np.load(directory / "query_vectors.f16.npy").astype(np.float32),
        relevant=np.array(relevant, dtype=np.int64),
    )
