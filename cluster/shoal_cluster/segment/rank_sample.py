"""Notices when what a filtered search found lies further out than a filter of its size explains.

Codes rank rows near a query well, because few rows are near; further out rows stand so dense that
codes cannot tell them apart. A filter whose rows are all far from the query (another language,
everything but the section that is asked about) makes those the answer: of the farther half of
100,000 × 384 a scan that reaches 0.96 without a filter finds 0.02. So after a filtered scan a few
of the rows that were *not* allowed are compared with the query: how many of them are nearer than
the k-th hit says how far out it is, the finer the fewer are excluded.
"""

from typing import Final

import numpy as np

from shoal_cluster.index.distances import Keys, Rows
from shoal_cluster.index.row_bits import RowBits, rows_in_bits

SAMPLED_MAX: Final = 128
"""Excluded rows compared: 25 µs at 384-d."""

POOL_ROWS: Final = 4_096
"""Rows looked through where many are excluded: 10 µs."""

POOL_SHARE_MIN: Final = 0.1
"""From this share of excluded rows on, three times as many as needed are in the pool; below it, the
packed bits are searched for them (100,000 rows: 10 µs)."""

CHANCE_ERRORS: Final = 3.0
"""A count is unexpected past so many standard errors, and one more."""

TOLERATED: Final = 0.5
"""Excluded rows before the last hit that change nothing, as a share of the hits wanted."""


class RankSample:
    """Which rows of a segment are looked at; the same at every opening."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._pool: Rows = np.random.default_rng(0).permutation(rows)[:POOL_ROWS]

    def excluded(self, allowed: RowBits, count: int) -> Rows:
        """Returns some rows that are not allowed. count: rows that are."""
        if self._rows - count >= POOL_SHARE_MIN * self._rows:
            found: Rows = self._pool[~rows_in_bits(self._pool, allowed)][:SAMPLED_MAX]
            return found
        holed = np.flatnonzero(allowed != 0xFF)
        if holed.size > SAMPLED_MAX:
            holed = holed[np.arange(SAMPLED_MAX) * holed.size // SAMPLED_MAX]
        inside = np.unpackbits(allowed[holed], bitorder="little").reshape(-1, 8) == 0
        rows: Rows = (holed[:, np.newaxis] * 8 + np.arange(8))[inside]
        rows = rows[rows < self._rows]
        return rows[:: -(-rows.size // SAMPLED_MAX)] if rows.size > SAMPLED_MAX else rows

    def unexpected(
        self, keys: Keys, last_keys: Keys, *, wanted: int, allowed: int
    ) -> dict[int, float]:
        """Returns, for each query whose last hit is too far out, the share of all rows before it.

        keys: (nq, m) of the excluded rows that were compared, m ≥ 1. last_keys: (nq,) of each
        query's last hit, +inf if there is none. wanted: hits there should be. allowed: rows that
        may be returned: a filter that does not care for the query leaves wanted / allowed of the
        others nearer.
        """
        sampled = keys.shape[1]
        excluded = self._rows - allowed
        chance = sampled * wanted / allowed
        most = chance + CHANCE_ERRORS * np.sqrt(chance)
        # One sampled row by chance, unless all of them were compared.
        most = max(most + (sampled < excluded), TOLERATED * wanted * sampled / excluded)
        nearer = np.count_nonzero(keys < last_keys[:, np.newaxis], axis=1)
        return {
            int(number): float(nearer[number]) / sampled * excluded / self._rows
            for number in np.flatnonzero(nearer > most)
        }
