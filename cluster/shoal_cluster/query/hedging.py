"""When a read is slow, asks a second replica and takes the first answer.

Source: Dean and Barroso, "The Tail at Scale", CACM 2013, hedged requests; the budget is that of
gRPC's retry throttling (A6): each read earns a fraction of a hedge, so a slow cluster is not asked
twice for everything.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

HEDGE_DELAY_MIN_S = 0.020
"""Below this a hedge costs more than it saves: a garbage collection pause is no failure."""

HEDGE_DELAY_COLD_S = 0.250
"""Until enough reads were timed to know what is usual."""

HEDGE_P95_FACTOR = 4

HEDGE_SHARE = 0.1
"""Hedges are at most this share of reads, in the long run."""

HEDGE_BURST = 10
"""Hedges that may be saved up: enough for the reads in flight when one server stops answering."""

LATENCY_WINDOW = 256
LATENCY_SAMPLES_MIN = 20

T = TypeVar("T")


class HedgeBudget:
    """Guards HEDGE_SHARE. Starts full, so that the first failure after a start is covered."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = float(HEDGE_BURST)

    def earn(self) -> None:
        self._tokens = min(self._tokens + HEDGE_SHARE, HEDGE_BURST)

    def spend(self) -> bool:
        """Takes one hedge from the budget; False when there is none."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class LatencyWindow:
    """The last reads of one kind, and their 95th percentile. Sorting happens every 32nd read."""

    __slots__ = ("_p95_s", "_samples_s", "_since_sorted")

    def __init__(self) -> None:
        self._samples_s: deque[float] = deque(maxlen=LATENCY_WINDOW)
        self._since_sorted = 0
        self._p95_s: float | None = None

    def add(self, duration_s: float) -> None:
        self._samples_s.append(duration_s)
        self._since_sorted += 1
        if self._since_sorted >= 32 or (
            self._p95_s is None and len(self._samples_s) >= LATENCY_SAMPLES_MIN
        ):
            self._since_sorted = 0
            ordered = sorted(self._samples_s)
            self._p95_s = ordered[int(0.95 * len(ordered))]

    def hedge_delay_s(self) -> float:
        if self._p95_s is None:
            return HEDGE_DELAY_COLD_S
        return max(HEDGE_DELAY_MIN_S, HEDGE_P95_FACTOR * self._p95_s)


async def first_answer(
    first: Awaitable[T],
    second: Callable[[], Coroutine[Any, Any, T] | None],
    delay_s: float,
    *,
    elsewhere: tuple[type[Exception], ...],
) -> tuple[T, bool]:
    """Awaits `first`; after `delay_s` also starts `second`. Returns the first answer to come.

    The flag tells that it came from `second`. The loser is cancelled. `second` returns None when
    the budget allows no hedge. A failure of `first` of the kinds `elsewhere` waits for a running
    second; when both fail, the failure of `first` is raised.

    `first` runs in the caller's task: a read that is not slow costs one timer and no task. When
    the second wins, it interrupts the caller's task as `asyncio.timeout` does.
    """
    loop = asyncio.get_running_loop()
    caller = asyncio.current_task()
    assert caller is not None, "reads run in a task"
    hedge: asyncio.Task[T] | None = None
    interrupted = False
    # A done callback may still be queued when we return; it must not cancel what comes after.
    settled = False

    def interrupt(done: "asyncio.Task[T]") -> None:
        nonlocal interrupted
        if not settled and not done.cancelled() and done.exception() is None:
            interrupted = True
            caller.cancel()

    def start() -> None:
        nonlocal hedge
        coroutine = second()
        if coroutine is not None:
            hedge = loop.create_task(coroutine)
            hedge.add_done_callback(interrupt)

    timer = loop.call_later(delay_s, start)
    try:
        return await first, False
    except asyncio.CancelledError:
        settled = True
        if not interrupted or caller.uncancel() > 0 or hedge is None:
            raise
        return hedge.result(), True
    except elsewhere:
        settled = True
        timer.cancel()
        if hedge is None:
            raise
        with contextlib.suppress(*elsewhere):
            return await hedge, True
        raise
    finally:
        settled = True
        timer.cancel()
        if hedge is not None:
            _abandon(hedge)


def _abandon(task: "asyncio.Task[T]") -> None:
    """Cancels the loser, or takes note of how it failed, so that asyncio does not complain."""
    if not task.done():
        task.cancel()
    elif not task.cancelled():
        task.exception()
