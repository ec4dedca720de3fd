"""Where work that would hold up the loop runs: threads in a server, inline in a simulation."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")


class Compute(Protocol):
    def run(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Runs `work` to its end; the future has what it returns or raises."""
        ...


class _Job(NamedTuple):
    work: Callable[[], Any]
    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop


class ThreadCompute:
    """A fixed set of threads; FAISS and numpy release the GIL, so `threads` = cores is right.

    Our own queue instead of concurrent.futures: its future, condition and callbacks cost a third
    of what handing over a small search costs at all (150–210 against 220–250 µs there and back).
    """

    def __init__(self, threads: int) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"shoal-compute-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(work, future, loop))
        return future

    def close(self) -> None:
        """Lets the threads end once the work queued so far is done."""
        for _ in self._threads:
            self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.future.cancelled():
                continue
            result, error = None, None
            try:
                result = job.work()
            except BaseException as raised:  # noqa: BLE001  it belongs to whoever awaits the work
                error = raised
            # A closed loop has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                job.loop.call_soon_threadsafe(_settle, job.future, result, error)


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class InlineCompute:
    """Runs work at once, in the caller: deterministic."""

    def run(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  it belongs to whoever awaits the work
            future.set_exception(error)
        return future
