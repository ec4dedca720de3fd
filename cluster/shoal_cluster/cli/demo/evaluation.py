"""Quality of what a search found, against exact search with numpy. Pure.

Ties: packages with the same text have the same vector, so which of them is k-th is arbitrary. A hit
counts as found when its exact similarity reaches the k-th best one, and a known item's rank counts
only the hits that are strictly better than it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal import F, Filter
from shoal_cluster.cli.demo.corpus import Corpus, Floats

TIE = 1e-6
"""Floats closer than this are equal: float32 sums of 384 products in another order differ by
less, distinct texts by more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterCase:
    """A filter as the SDK takes it, and the same condition in Python for the exact answer."""

    name: str
    filter: Filter
    holds: Callable[[Mapping[str, Any]], bool]


FILTER_CASES = (
    FilterCase(
        name="section == python",
        filter=F("section") == "python",
        holds=lambda package: package["section"] == "python",
    ),
    FilterCase(
        name="installed_kb >= 1000",
        filter=F("installed_kb") >= 1000,
        # A package that does not state its size satisfies no comparison on it.
        holds=lambda package: (package["installed_kb"] or 0) >= 1000,
    ),
    FilterCase(
        name="tags any_of role::program and architecture == amd64",
        filter=F("tags").any_of(["role::program"]) & (F("architecture") == "amd64"),
        holds=lambda package: (
            "role::program" in package["tags"] and package["architecture"] == "amd64"
        ),
    ),
)


class ExactSearch:
    """Exact cosine similarities of every query with every package."""

    def __init__(self, corpus: Corpus) -> None:
        self._similarity = _unit(corpus.query_vectors) @ _unit(corpus.vectors).T
        self._row_of = {point_id: row for row, point_id in enumerate(corpus.ids)}
        self._packages = corpus.packages

    def matching(self, case: FilterCase | None) -> npt.NDArray[np.bool_]:
        """Returns which rows satisfy the filter, all of them for None."""
        if case is None:
            return np.ones(len(self._packages), dtype=np.bool_)
        return np.array([case.holds(package) for package in self._packages], dtype=np.bool_)

    def recall(
        self,
        found: Sequence[Sequence[str]],
        *,
        k: int,
        case: FilterCase | None = None,
        queries: Sequence[int] | None = None,
    ) -> float:
        """Returns the mean recall@k. found: ids for each of `queries`, None for all in order.

        A hit that violates the filter, is unknown, or comes twice counts for nothing.
        """
        matching = self.matching(case)
        wanted = min(k, int(matching.sum()))
        if wanted == 0 or not found:
            return 1.0
        numbers = range(len(found)) if queries is None else queries
        shares = [
            self._correct(number, ids[:k], matching, wanted) / wanted
            for number, ids in zip(numbers, found, strict=True)
        ]
        return float(np.mean(shares))

    def _correct(
        self, query: int, ids: Sequence[str], matching: npt.NDArray[np.bool_], wanted: int
    ) -> int:
        allowed = np.where(matching, self._similarity[query], -np.inf)
        worst = np.partition(allowed, -wanted)[-wanted]
        rows = {self._row_of[point_id] for point_id in ids if point_id in self._row_of}
        return sum(1 for row in rows if allowed[row] >= worst - TIE)


def mean_reciprocal_rank(
    found: Sequence[Sequence[str]],
    scores: Sequence[Floats],
    relevant: Sequence[str | None],
) -> float:
    """Returns the MRR over the queries that have a relevant id.

    found, scores: hits of each query, best first. A relevant id that was not found counts 0.
    """
    reciprocal = []
    for ids, similarity, wanted in zip(found, scores, relevant, strict=True):
        if wanted is None:
            continue
        if wanted not in ids:
            reciprocal.append(0.0)
            continue
        own = similarity[ids.index(wanted)]
        reciprocal.append(1.0 / (1 + int((similarity > own + TIE).sum())))
    return float(np.mean(reciprocal))


def _unit(vectors: Floats) -> Floats:
    """Returns the vectors divided by their lengths."""
    scaled: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled
