"""Works on several requests of a bidirectional stream at a time, and answers each when it is done.

A client that sends more than its window is not read from until a request is done: HTTP/2 then
stops it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


async def answer_in_window(
    requests: AsyncIterator[RequestT],
    answer: Callable[[RequestT], Coroutine[Any, Any, ResponseT]],
    *,
    window: int,
) -> AsyncIterator[ResponseT]:
    """Yields the answers in the order in which they are ready.

    answer: must not raise what concerns one request only. When the stream ends early, answers
    under way are cancelled.
    """
    incoming = aiter(requests)
    working: set[asyncio.Task[ResponseT]] = set()
    reading: asyncio.Task[RequestT | None] | None = None
    ended = False
    try:
        while working or not ended:
            if reading is None and not ended and len(working) < window:
                reading = asyncio.ensure_future(_next(incoming))
            await asyncio.wait(
                [*working, reading] if reading else working,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if reading is not None and reading.done():
                request = reading.result()
                reading = None
                if request is None:
                    ended = True
                else:
                    working.add(asyncio.ensure_future(answer(request)))
            for task in [task for task in working if task.done()]:
                working.discard(task)
                yield task.result()
    finally:
        for task in working:
            task.cancel()
        if reading is not None:
            reading.cancel()


async def _next(incoming: AsyncIterator[RequestT]) -> RequestT | None:
    async for request in incoming:
        return request
    return None
