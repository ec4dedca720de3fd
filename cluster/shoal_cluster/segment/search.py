"""Chooses how a segment answers a search: which rows may be returned, and what to compute.

Pure decisions over counts and packed bits; the reader (reader.py) holds the files. Every choice
comes with its reason, which `explain` shows.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.filtering import bitmaps
from shoal_cluster.index import row_bits
from shoal_cluster.index.distances import NO_ROW, Keys, Rows
from shoal_cluster.index.families import Effort, Family
from shoal_cluster.index.row_bits import RowBits
from shoal_cluster.index.settings import Setting

ROW_LIST_MAX: Final = 8192
"""A filter that passes at most so many rows starts as a row list (7 µs for 4,000 rows), a wider one
as packed bits: only wide roaring bitmaps hold packed bits inside, to be copied."""


class SearchPlan(enum.Enum):
    NO_ROWS = "no_rows"
    """No row is alive and matches."""
    EXACT = "exact"
    """Every allowed row was compared."""
    GATHER = "gather"
    """Few rows match: they were gathered and compared exactly."""
    SCAN = "scan"
    """Codes were scanned, the best candidates rescored exactly."""
    SCAN_BITMAP = "scan_bitmap"
    """The same, with the allowed rows as a bitmap in the scan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReport:
    """How one segment was searched and why. Rows are per query.

    rescore_factor: candidates rescored per hit, 0 when everything was computed exactly.
    probes: lists scanned, at most, of `lists`; both 0 when exact.
    expected_recall: what the segment's own curve promises; 1.0 for exact plans.
    rows_scanned: rows compared, by code or exactly. rows_rescored: at most, after a code scan.
    """

    plan: SearchPlan
    reason: str
    family: Family
    rescore_factor: int
    expected_recall: float
    rows_scanned: int
    rows_rescored: int
    probes: int = 0
    lists: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHits:
    """The nearest rows of one segment.

    keys: (nq, k) float32, ascending, +inf where there are fewer than k rows. rows: (nq, k) row
    numbers in the segment, NO_ROW beside +inf padding. Ties stand in row order.
    """

    keys: Keys
    rows: Rows
    report: SearchReport


@dataclass(slots=True, kw_only=True)
class AllowedRows:
    """The rows a search may return, as a list, as bits, or as both once both were needed.

    total: rows of the segment. count: rows allowed. everything: no row is excluded, so neither
    form is needed.
    """

    total: int
    count: int
    everything: bool = False
    listed: npt.NDArray[np.int64] | None = None
    packed: RowBits | None = None

    def rows(self) -> npt.NDArray[np.int64]:
        """Returns the allowed rows, ascending."""
        if self.listed is None:
            if self.packed is None:
                self.listed = np.arange(self.total)
            else:
                self.listed = row_bits.rows_of_bits(self.packed, self.total)
        return self.listed

    def bits(self) -> RowBits | None:
        """Returns the allowed rows as bits, None when every row is allowed."""
        if self.everything:
            return None
        if self.packed is None:
            assert self.listed is not None, "a partial set has one form at least"
            self.packed = row_bits.bits_of_rows(self.listed, self.total)
        return self.packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """setting: how deep to scan; None for plans that compute exactly."""

    plan: SearchPlan
    reason: str
    setting: Setting | None = None


def allowed_rows(total: int, alive: RowBits | None, matching: BitMap | None) -> AllowedRows:
    """Returns the rows that are alive and match. None means all, for either."""
    if matching is None:
        if alive is None:
            return AllowedRows(total=total, count=total, everything=True)
        count = row_bits.count_bits(alive)
        return AllowedRows(total=total, count=count, everything=count == total, packed=alive)
    if len(matching) <= ROW_LIST_MAX:
        rows = bitmaps.to_rows(matching).astype(np.int64)
        if alive is not None:
            rows = rows[row_bits.rows_in_bits(rows, alive)]
        count = rows.size
        return AllowedRows(total=total, count=count, everything=count == total, listed=rows)
    bits = bitmaps.to_packed_bits(matching, total)
    if alive is not None:
        bits = bits & alive
    count = row_bits.count_bits(bits)
    return AllowedRows(total=total, count=count, everything=count == total, packed=bits)


def decide(
    allowed: AllowedRows,
    *,
    live: int,
    family: Family,
    exact: bool,
    setting: Callable[[], Setting],
    gather_ns: Callable[[int], float],
    scan_ns: Callable[[Effort], float],
) -> Decision:
    """Returns the cheapest plan that reaches the recall target.

    live: rows that are not dead, whether they match or not. setting: chooses how to scan, asked
    only when a scan is possible. gather_ns, scan_ns: costs of the two.
    """
    if allowed.count == 0:
        return Decision(plan=SearchPlan.NO_ROWS, reason="no live row matches")
    if exact:
        return Decision(plan=SearchPlan.EXACT, reason="exact search was asked for")
    if family is Family.FLAT:
        return Decision(plan=SearchPlan.EXACT, reason="the segment is small: no codes were built")
    chosen = setting()
    if chosen.effort is None:
        return Decision(plan=SearchPlan.EXACT, reason=chosen.reason)
    if chosen.effort.depth >= allowed.count:
        reason = f"{allowed.count} rows are no more than the {chosen.effort.depth} to rescore"
        return Decision(plan=SearchPlan.GATHER, reason=reason)
    if allowed.count < live:
        gather, scan = gather_ns(allowed.count), scan_ns(chosen.effort)
        if gather <= scan:
            reason = (
                f"{allowed.count} of {live} rows match ({allowed.count / live:.2%}): comparing "
                f"them costs {gather / 1e6:.2f} ms, a scan {scan / 1e6:.2f}"
            )
            return Decision(plan=SearchPlan.GATHER, reason=reason)
    plan = SearchPlan.SCAN if allowed.everything else SearchPlan.SCAN_BITMAP
    return Decision(plan=plan, reason=chosen.reason, setting=chosen)


def no_hits(queries: int, k: int, report: SearchReport) -> SegmentHits:
    """Returns a result of padding only."""
    return SegmentHits(
        keys=np.full((queries, k), np.inf, dtype=np.float32),
        rows=np.full((queries, k), NO_ROW, dtype=np.int64),
        report=report,
    )
