"""A seeded world on one event loop: virtual time, and processes that can be killed and frozen.

Time jumps to the next timer; nothing waits for the real clock and there are no threads. Everything
that runs belongs to a `Process`, told by its context: callbacks of a killed process are dropped,
those of a frozen one are held until it thaws. So a crash ends a process between any two steps of
its tasks, without running one more line of its code: no `finally`, as with SIGKILL.

Deterministic: callbacks run in the order they were scheduled; tasks and futures hash by number,
not by address, so sets of them have an order; the garbage collector runs at set moments only.
"""

import asyncio
import gc
import heapq
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")

STEPS_WITHOUT_TIME_MAX = 200_000
"""Loop turns without a jump of time: more is a busy loop."""

BURIAL_TURNS_MAX = 200
BURIAL_IDLE_TURNS = 10_000_000

TURN_S = 1e-6
"""What a turn of the loop costs. Without it, who waits for the last trillionth of a second before a
deadline would wait for ever: clocks of different rates round differently."""

GARBAGE_EVERY_TURNS = 20_000
"""Cycles are collected at the same turns of every run: collecting may run generators' ends."""


class Stuck(AssertionError):
    """The simulation can never end: a deadlock, a busy loop, or too much virtual time."""


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: jumps to the moment it should have waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.limit_s = float("inf")
        self.idle_turns = 0
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        self._turns += 1
        if self._turns % GARBAGE_EVERY_TURNS == 0:
            gc.collect()
        if timeout is None:
            raise Stuck(f"every task waits for another at {self.now_s:.3f} s: a deadlock")
        self.now_s += TURN_S
        if timeout <= 0:
            self.idle_turns += 1
            if self.idle_turns > STEPS_WITHOUT_TIME_MAX:
                raise Stuck(f"a busy loop at {self.now_s:.3f} s: time does not advance")
            return []
        self.idle_turns = 0
        self.now_s += timeout
        if self.now_s > self.limit_s:
            raise Stuck(f"not done after {self.limit_s:.0f} virtual seconds")
        return []


class _Future(asyncio.Future[Any]):
    """Hashes by number, so that sets of futures have the same order in every run."""

    def __init__(self, *, loop: "SimulatedLoop") -> None:
        self._number = loop.next_number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[Any]):
    def __init__(
        self, coro: Coroutine[Any, Any, Any], *, loop: "SimulatedLoop", context: Context | None
    ) -> None:
        self._number = loop.next_number()
        super().__init__(coro, loop=loop, context=context)

    def __hash__(self) -> int:
        return self._number


class _Handle(asyncio.Handle):
    __slots__ = ("_process",)

    def __init__(
        self,
        callback: Callable[..., object],
        args: Any,
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
        process: "Process | None",
    ) -> None:
        super().__init__(callback, args, loop, context)
        self._process = process

    def _run(self) -> None:
        process = self._process
        if process is None or process.takes(self):
            super()._run()


class _TimerHandle(asyncio.TimerHandle):
    __slots__ = ("_process",)

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: Any,
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
        process: "Process | None",
    ) -> None:
        super().__init__(when, callback, args, loop, context)
        self._process = process

    def _run(self) -> None:
        process = self._process
        if process is None or process.takes(self):
            super()._run()


class SimulatedLoop(asyncio.SelectorEventLoop):
    """See the module. `bugs`: what ended a task that is neither a domain error nor a cancel."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        self._numbers = 0
        self.processes: list[Process] = []
        super().__init__(self._jumping)
        self.set_task_factory(_make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        return self._jumping.now_s

    def limit(self, limit_s: float) -> None:
        """Ends the run as Stuck when virtual time passes `limit_s`."""
        self._jumping.limit_s = limit_s

    def lift_limits(self) -> None:
        """Lets what is left run to its end, however long it takes."""
        self._jumping.limit_s = float("inf")
        self._jumping.idle_turns = -BURIAL_IDLE_TURNS

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self)

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[Any]:
        task = _Task(coro, loop=self, context=context)
        process = _process_of(context)
        if process is not None:
            process.adopt(task)
        return task

    def _call_soon(self, callback: Any, args: Any, context: Context | None) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context, _process_of(context))
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _TimerHandle(when, callback, args, self, context, _process_of(context))
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def resume(self, handles: deque[asyncio.Handle]) -> None:
        """Schedules handles that were held, in their order."""
        self._ready.extend(handles)  # type: ignore[attr-defined]


def _make_task(
    loop: SimulatedLoop, coro: Coroutine[Any, Any, Any], context: Context | None = None
) -> asyncio.Task[Any]:
    return loop.create_task(coro, context=context)


_PROCESS: ContextVar["Process | None"] = ContextVar("simulated_process", default=None)


def _process_of(context: Context | None) -> "Process | None":
    return _PROCESS.get() if context is None else context.get(_PROCESS)


def current_process() -> "Process | None":
    """Returns the process that the running code belongs to, None for the world itself."""
    return _PROCESS.get()


class Process:
    """Tasks and callbacks that live and die together.

    held: what became ready while frozen or dead. Kept after a kill too, with the tasks, so that
    nothing of them is collected, and thereby run, before the simulation has ended.
    """

    def __init__(self, loop: SimulatedLoop, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.bugs: list[str] = []
        self._loop = loop
        self._held: deque[asyncio.Handle] = deque()
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._context = copy_context()
        self._context.run(_PROCESS.set, self)
        self._on_kill: dict[Callable[[], None], None] = {}
        loop.processes.append(self)

    def context(self) -> Context:
        """Returns a context in which code belongs to this process."""
        return self._context.copy()

    def run(self, work: Callable[[], T]) -> T:
        """Runs plain code as the process's own."""
        return self.context().run(work)

    def spawn(self, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task of the process."""
        return self._loop.create_task(coro, context=self.context())

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Schedules a callback as the process's own: held when it is frozen, dropped when dead."""
        self._loop.call_soon(callback, *args, context=self.context())

    def on_kill(self, callback: Callable[[], None]) -> None:
        """Has the world call back when the process is killed, in the order of these calls."""
        self._on_kill[callback] = None

    def off_kill(self, callback: Callable[[], None]) -> None:
        self._on_kill.pop(callback, None)

    def kill(self) -> None:
        """Ends the process at once; the callbacks of `on_kill` are the world's, not its own."""
        if self.alive:
            self.alive = False
            for callback in list(self._on_kill):
                callback()

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        if self.alive:
            self._loop.resume(self._held)
            self._held = deque()

    def takes(self, handle: asyncio.Handle) -> bool:
        """Says whether a callback that is due may run now."""
        if self.alive and not self.frozen:
            return True
        self._held.append(handle)
        return False

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(self._forget)

    def revive(self) -> None:
        """Lets what is left of the process run to its end, after the simulation."""
        self.alive = True
        self.thaw()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not _is_domain_error(error):
            self.bugs.append(f"{self.name}: a task ended with {type(error).__name__}: {error}")


def _is_domain_error(error: BaseException) -> bool:
    from shoal_cluster.domain.errors import Internal, ShoalError

    return isinstance(error, ShoalError) and not isinstance(error, Internal)


async def _bury(loop: SimulatedLoop) -> None:
    """Ends every task of every process, dead ones too, so that nothing is left to the collector."""
    this = asyncio.current_task()
    for _ in range(BURIAL_TURNS_MAX):
        for process in loop.processes:
            process.revive()
        left = [task for task in asyncio.all_tasks(loop) if task is not this]
        if not left:
            return
        for task in left:
            task.cancel()
        await asyncio.sleep(0.01)


def run(main: Coroutine[Any, Any, T], *, limit_s: float) -> T:
    """Runs a coroutine in a world of its own; returns or raises what it does.

    limit_s: of virtual time. Raises: Stuck.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    loop = SimulatedLoop()
    loop.limit(limit_s)
    # Tasks that a crash left behind are ended below; asyncio would complain about their errors.
    loop.set_exception_handler(lambda _loop, _context: None)
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        try:
            loop.lift_limits()
            loop.run_until_complete(_bury(loop))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
            if was_enabled:
                gc.enable()
            gc.collect()
