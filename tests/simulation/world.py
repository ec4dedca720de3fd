"""What all simulated processes share: seed, event log, true time, message delays.

Every random number comes from a stream named after its use, so that a change in one place does not
move the others.
"""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shoal_cluster.domain.errors import ShoalError, Unavailable
from tests.simulation.ambush import Ambush
from tests.simulation.loop import Process, SimulatedLoop

T = TypeVar("T")

LOG_LINES_MAX = 200_000
"""Kept as text; the digest covers every line."""


class EventLog:
    """Everything that happened, one line an event; equal seeds give equal bytes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._digest = hashlib.sha256()

    def add(self, time_s: float, process: str, event: str) -> None:
        line = f"{time_s:12.6f} {process:16} {event}"
        self._digest.update(line.encode())
        self._digest.update(b"\n")
        if len(self.lines) < LOG_LINES_MAX:
            self.lines.append(line)

    def digest(self) -> str:
        return self._digest.hexdigest()


class SimulatedClock:
    """A process's clock: its own start, its own rate, and jumps forward as a suspend makes them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, offset_s: float, rate: float) -> None:
        self._loop = loop
        self._offset_s = offset_s
        self._rate = rate

    def monotonic_s(self) -> float:
        return self._offset_s + self._loop.time() * self._rate

    def wall_ms(self) -> int:
        return round(1000 * self.monotonic_s())

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s / self._rate)

    def jump(self, forward_s: float) -> None:
        self._offset_s += forward_s


class SeededIds:
    """Ids of one process."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def put_id(self) -> bytes:
        return self._rng.randbytes(16)

    def hex(self, size_bytes: int) -> str:
        return self._rng.randbytes(size_bytes).hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """How long a message takes: usually `usual_s` at most, sometimes up to `rare_s`."""

    usual_s: float
    rare_s: float
    rare: float

    def draw(self, rng: random.Random) -> float:
        if rng.random() < self.rare:
            return rng.random() * self.rare_s
        return rng.random() * self.usual_s


@dataclass(slots=True)
class World:
    """One run's surroundings. violations: what must never happen and did, in order.

    stall, takeover_stall: the chance that a process is stopped at a store call, and at one of a
    takeover, where a sleeper does the most harm. ambush: the one section of the code where they
    fall asleep more often. servers_apart: servers cannot connect to each other, nor push.
    """

    seed: int
    loop: SimulatedLoop
    scratch: Path
    log: EventLog = field(default_factory=EventLog)
    counts: Counter[str] = field(default_factory=Counter)
    bucket_faults: list[Counter[str]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    delays: Delays = field(default_factory=lambda: Delays(usual_s=0.002, rare_s=0.5, rare=0.01))
    reply_loss: float = 0.0
    stall: float = 0.0
    takeover_stall: float = 0.0
    ambush: Ambush | None = None
    servers_apart: bool = False
    _context: Any = field(default_factory=copy_context)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def rng(self, use: str) -> random.Random:
        """Returns the random stream of one use."""
        return random.Random(f"{self.seed}/{use}")

    def spawn(self, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task that belongs to no process: the network's, the bucket's, fate's."""
        task = self.loop.create_task(coro, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def note(self, process: str, event: str) -> None:
        self.log.add(self.loop.time(), process, event)

    def violate(self, violation: str) -> None:
        """Notes what must never happen."""
        self.note("checker", f"VIOLATION {violation}")
        self.violations.append(violation)

    async def remote_call(
        self,
        target: Process | None,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        rng: random.Random,
        timeout_s: float,
        lost: Callable[[str], ShoalError],
    ) -> T:
        """Runs `work` as the target's own and returns its answer, as a Ray or gRPC call does.

        Raises: what `work` raises; `lost(why)` when no answer came. Cancelled with the caller.
        """
        if target is None or not target.alive:
            await asyncio.sleep(self.delays.draw(rng))
            raise Unavailable("nobody answers to the name; nothing was sent")
        answer: asyncio.Future[T] = self.loop.create_future()

        def reset() -> None:
            if not answer.done():
                answer.set_exception(lost("the process died"))

        target.on_kill(reset)
        delivery = self.spawn(self._deliver(target, work, answer, rng))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise lost(f"no answer within {timeout_s:g} s") from None
        finally:
            target.off_kill(reset)
            delivery.cancel()

    async def _deliver(
        self,
        target: Process,
        work: Callable[[], Coroutine[Any, Any, T]],
        answer: "asyncio.Future[T]",
        rng: random.Random,
    ) -> None:
        await asyncio.sleep(self.delays.draw(rng))
        if not target.alive:
            return  # who asked was told when it died
        task = target.spawn(work())
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            raise
        await asyncio.sleep(self.delays.draw(rng))
        if rng.random() < self.reply_loss:
            self.counts["replies lost"] += 1
            return
        if answer.done():
            return
        if task.cancelled():
            answer.set_exception(Unavailable("the call was cancelled"))
            return
        error = task.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(task.result())
