"""The kinds of vector index a segment can have, and what the rest of Shoal knows of them.

An index proposes candidates from compressed codes; their exact keys are computed from the vectors
(rescoring.py). Only the proposal can miss a row. A flat segment has no index: every allowed row is
compared. Which family a segment gets is the cost model's choice (cost_model.py).

Thread rule: an index never changes after it is opened, and any number of threads may ask it at
once; FAISS releases the GIL while it scans.
"""

import enum
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.point import Vectors
from shoal_cluster.index.distances import Rows
from shoal_cluster.index.row_bits import RowBits


class Family(enum.Enum):
    FLAT = "flat"
    """No codes: every allowed row is compared."""
    FAST_SCAN = "fast_scan"
    """4-bit codes of every row, scanned whole."""
    INVERTED = "inverted"
    """The same codes in lists of neighbours, of which a query scans the nearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeShape:
    """What codes there are. values_a_code: values of a vector that share a 4-bit code.

    lists: 1 when every scan is a scan of all rows.
    """

    values_a_code: int
    lists: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How hard to look. depth: candidates a query gets. probes: lists it scans, at least 1."""

    depth: int
    probes: int


class CandidateIndex(Protocol):
    """Rows that are likely to be near a query, by code."""

    @property
    def family(self) -> Family: ...

    @property
    def shape(self) -> CodeShape: ...

    def candidates(self, queries: Vectors, effort: Effort, allowed: RowBits | None = None) -> Rows:
        """Returns the `depth` best allowed rows of each query, (nq, depth), padded with NO_ROW.

        queries: (nq, d), C-contiguous. Ascending by approximate key; ties in no promised order. At
        most as many columns as there are rows.
        """
        ...

    def list_places(self, queries: Vectors, rows: Rows) -> Rows:
        """Returns how many lists are nearer to each query than the list of each of its rows.

        rows: (nq, m); so is the result, 0 for a row in the nearest list.
        """
        ...

    def allowed_shares(
        self, queries: Vectors, probes: int, allowed: RowBits
    ) -> npt.NDArray[np.float64]:
        """Returns, for each query, the share of allowed rows where it will look, (nq,).

        Estimated from a few rows of each of the `probes` nearest lists, and of the first of them
        alone; the smaller of the two.
        """
        ...

    def memory_bytes(self) -> int:
        """Returns the resident bytes the index itself holds; mapped vectors are not counted."""
        ...
