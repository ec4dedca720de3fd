"""Runs the parts of a read side by side; the first failure ends them all."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def gather(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns the results in the order of the parts.

    When one fails or the caller is cancelled, the others are cancelled and waited for, so nothing
    runs on after the return. One part runs in the caller's task: most searches of a partitioned
    collection reach one shard, and a task costs more than the plan.
    """
    if len(parts) == 1:
        return [await parts[0]]
    if not parts:
        return []
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, unfinished = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if unfinished:
            for task in done:
                task.result()
        return [task.result() for task in tasks]
    finally:
        unfinished = {task for task in tasks if not task.done()}
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # noted: only the first failure is raised
