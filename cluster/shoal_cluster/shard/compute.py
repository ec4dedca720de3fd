"""Where work that would hold up the event loop runs: in threads, or inline in a simulation."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Compute(Protocol):
    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` to its end and returns or raises what it does."""
        ...


class ThreadCompute:
    """A bounded pool; FAISS and numpy release the GIL, so `threads` = cores is right."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shoal-compute")

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class InlineCompute:
    """Runs work at once, in the caller: deterministic."""

    async def run(self, work: Callable[[], T]) -> T:
        return work()
