"""One timer for all deadlines of a link: a call costs a comparison, not a timer of its own."""

import asyncio
import math
from collections.abc import Callable
from typing import Final

from shoal_cluster.domain.clock import Clock

_WAKE_DELAY_S_MIN: Final = 0.001
"""uvloop counts milliseconds, and a scan of 4,096 calls each millisecond is still affordable."""


class DeadlineTimer:
    """Calls `expire(now)` soon after the earliest watched deadline, never before it.

    expire: ends everything due at `now` and returns the earliest deadline left, or infinity.
    Finished calls are not unwatched: they cost one early scan at most, since replies come in far
    less time than deadlines allow.
    """

    def __init__(self, clock: Clock, expire: Callable[[float], float]) -> None:
        self._clock = clock
        self._expire = expire
        self._wake_at_s = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, deadline_s: float) -> None:
        """Makes sure that the timer fires for a deadline, by the injected clock."""
        if deadline_s < self._wake_at_s:
            self.stop()
            self._wake_at_s = deadline_s
            delay_s = max(deadline_s - self._clock.monotonic_s(), _WAKE_DELAY_S_MIN)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._fire)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._wake_at_s = math.inf

    def _fire(self) -> None:
        self._timer = None
        self._wake_at_s = math.inf
        next_deadline_s = self._expire(self._clock.monotonic_s())
        if next_deadline_s < math.inf:
            self.watch(next_deadline_s)
