"""What the background work of one replica fails at, and when it is to be tried again.

Work in the background has no caller who would hear of its errors: seals, merges, repairs, garbage
collection, scrubbing. What is noted here is logged, paused with a pause that doubles, and shown by
`status` until the same work succeeds. A bug is noted like any other failure, under an incident id
that leads to its traceback in the log.
"""

from collections.abc import Collection
from dataclasses import dataclass

import structlog

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.domain.ids import IdGenerator, ShardNumber

RETRY_S_MIN = 1.0
RETRY_S_MAX = 60.0
_INCIDENT_BYTES = 6
_SHOWN = 3

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failing:
    """count: in a row. retry_s: monotonic, when it may be tried again."""

    count: int
    message: str
    retry_s: float


class Failures:
    """Keeps one entry for each piece of work that failed last time. Used on the event loop."""

    def __init__(self, clock: Clock, ids: IdGenerator, shard: ShardNumber) -> None:
        self._clock = clock
        self._ids = ids
        self._shard = shard
        self._failing: dict[str, _Failing] = {}

    def note(
        self,
        error: Exception,
        *works: str,
        shortest_s: float = RETRY_S_MIN,
        longest_s: float = RETRY_S_MAX,
    ) -> float:
        """Notes that all of `works` failed by one error; returns the longest of their pauses."""
        message = self._described(error)
        pause_s = 0.0
        for work in works:
            before = self._failing.get(work)
            count = 1 if before is None else before.count + 1
            # Bounded before the power is: something may fail for a year.
            delay_s = min(shortest_s * 2.0 ** min(count - 1, 30), longest_s)
            pause_s = max(pause_s, delay_s)
            self._failing[work] = _Failing(
                count=count, message=message, retry_s=self._clock.monotonic_s() + delay_s
            )
        _log.warning(
            "background_work_failed",
            shard=self._shard,
            work=works[0],
            reason=message,
            failures=max(self._failing[work].count for work in works),
            again_in_s=pause_s,
        )
        return pause_s

    def _described(self, error: Exception) -> str:
        if isinstance(error, ShoalError):
            return error.message
        incident = self._ids.hex(_INCIDENT_BYTES)
        _log.error(
            "background_work_met_a_bug", shard=self._shard, incident=incident, exc_info=error
        )
        return f"a bug, {error!r}; this server's log has the details under incident {incident}"

    def clear(self, work: str) -> None:
        """Forgets a failure: the work succeeded."""
        self._failing.pop(work, None)

    def keep(self, prefix: str, names: Collection[str]) -> None:
        """Forgets the works `prefix + name` whose name is not among `names` any more."""
        self._failing = {
            work: failing
            for work, failing in self._failing.items()
            if not work.startswith(prefix) or work.removeprefix(prefix) in names
        }

    def is_failing(self, work: str) -> bool:
        return work in self._failing

    def may_try(self, work: str) -> bool:
        failing = self._failing.get(work)
        return failing is None or self._clock.monotonic_s() >= failing.retry_s

    @property
    def count(self) -> int:
        """How often what fails most has failed in a row; 0 when nothing fails."""
        return max((failing.count for failing in self._failing.values()), default=0)

    def reason(self) -> str:
        """Returns what fails and why, in words; "" when nothing does."""
        first: dict[str, str] = {}
        for work, failing in self._failing.items():
            first.setdefault(failing.message, work)  # the sources of a merge fail together
        return "; ".join(f"{work}: {why}" for why, work in list(first.items())[:_SHOWN])
