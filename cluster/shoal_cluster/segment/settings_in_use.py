"""Which setting a segment is searched with for a recall target, by the curve in use."""

from collections.abc import Callable

from shoal_cluster.domain.point import Vectors
from shoal_cluster.index.calibration import RecallCurve
from shoal_cluster.index.families import CandidateIndex, Effort
from shoal_cluster.index.settings import Setting, rank_measured, setting_for
from shoal_cluster.segment.search import AllowedRows

WIDE_SHARE_MIN = 0.9
"""With so many rows allowed, as when few are dead, nobody looks where they are."""

LOCAL_SHARE_MIN = 0.6
"""A filter counts as thinner around a query than elsewhere below this share of its selectivity: of
256 sampled rows at 5 %, chance alone takes one query in fifteen there, to no harm but its time."""

SETTINGS_KEPT_MAX = 256
"""Choices remembered, one for each (target, k, rank) asked for: a choice looks at every point of
the curve, 30 to 150 µs."""


class CurveInUse:
    """The curve that settings are chosen by; readers of one segment in other tiers share it."""

    def __init__(self, curve: RecallCurve) -> None:
        self.curve = curve


class SettingsInUse:
    """The choices of one reader. With another curve, other ones are remembered."""

    def __init__(
        self,
        in_use: CurveInUse,
        *,
        rows: int,
        index: CandidateIndex | None,
        scan_ns: Callable[[Effort], float],
    ) -> None:
        self._in_use = in_use
        self._rows = rows
        self._index = index
        self._lists = 0 if index is None else index.shape.lists
        self._scan_ns = scan_ns
        self._chosen = _Chosen(in_use.curve)

    def setting(self, recall_target: float, k: int, selectivity: float) -> Setting:
        """Returns the cheapest setting for a target; the same question is answered from memory."""
        chosen = self._chosen
        if chosen.curve is not self._in_use.curve:
            chosen = self._chosen = _Chosen(self._in_use.curve)
        rank = rank_measured(chosen.curve, k, selectivity)
        asked = (recall_target, k, rank)
        found = chosen.settings.get(asked)
        if found is None:
            found = setting_for(
                chosen.curve,
                recall_target,
                k,
                rows=self._rows,
                lists=self._lists,
                rank=rank,
                cost_ns=self._scan_ns,
            )
            if len(chosen.settings) >= SETTINGS_KEPT_MAX:
                chosen.settings.clear()
            chosen.settings[asked] = found
        return found

    def under(
        self,
        setting: Setting,
        queries: Vectors,
        k: int,
        recall_target: float,
        allowed: AllowedRows,
    ) -> list[Setting]:
        """Returns how to search for each query under a restriction, looking around the query.

        setting: right where the allowed rows are as dense as on the whole. Where they are thinner
        the nearest of them lie further out, in more lists, up to all of them.
        """
        index, effort = self._index, setting.effort
        assert index is not None and effort is not None, "a scan has an index and an effort"
        bits = allowed.bits()
        share = allowed.count / self._rows
        if bits is None or effort.probes >= self._lists or share >= WIDE_SHARE_MIN:
            return [setting] * len(queries)
        found = []
        for local in index.allowed_shares(queries, effort.probes, bits).tolist():
            if local >= LOCAL_SHARE_MIN * share:
                found.append(setting)
                continue
            thinner = self.setting(recall_target, k, min(local, share))
            found.append(thinner if thinner.effort is not None else setting)
        return found


class _Chosen:
    """The choices by one curve."""

    def __init__(self, curve: RecallCurve) -> None:
        self.curve = curve
        self.settings: dict[tuple[float, int, int | None], Setting] = {}
