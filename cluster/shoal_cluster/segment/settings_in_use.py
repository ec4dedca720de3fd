"""Which setting a segment is searched with for a recall target, by the curve in use."""

from collections.abc import Callable

from shoal_cluster.index.calibration import RecallCurve
from shoal_cluster.index.families import Effort
from shoal_cluster.index.settings import Setting, rank_measured, setting_for

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
        self, in_use: CurveInUse, *, rows: int, lists: int, scan_ns: Callable[[Effort], float]
    ) -> None:
        self._in_use = in_use
        self._rows = rows
        self._lists = lists
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


class _Chosen:
    """The choices by one curve."""

    def __init__(self, curve: RecallCurve) -> None:
        self.curve = curve
        self.settings: dict[tuple[float, int, int | None], Setting] = {}
