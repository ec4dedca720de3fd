"""Works on several requests of a bidirectional stream at a time, and answers each when it is done.

A client that sends more than its window is not read from until a request is done: HTTP/2 then
stops it. One task reads, whatever the number of requests.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


async def answer_in_window(
    requests: AsyncIterator[RequestT],
    begin: Callable[[RequestT], Awaitable[AnswerT]],
    *,
    window: int,
) -> AsyncGenerator[tuple[RequestT, "asyncio.Future[AnswerT]"], None]:
    """Yields each request with its future, done, in the order in which they are.

    begin: must not raise what concerns one request only. When the stream ends early, answers
    under way are cancelled.
    """
    working: dict[asyncio.Future[AnswerT], RequestT] = {}
    ready: deque[asyncio.Future[AnswerT]] = deque()
    # Set when an answer is ready or the reading has ended; when there is room again.
    news, room = asyncio.Event(), asyncio.Event()

    def done(future: "asyncio.Future[AnswerT]") -> None:
        ready.append(future)
        news.set()

    async def read() -> None:
        async for request in requests:
            future = asyncio.ensure_future(begin(request))
            working[future] = request
            future.add_done_callback(done)
            while len(working) >= window:
                room.clear()
                await room.wait()

    def read_all(_: Any) -> None:
        news.set()

    reading = asyncio.ensure_future(read())
    reading.add_done_callback(read_all)
    try:
        while True:
            while ready:
                future = ready.popleft()
                request = working.pop(future)
                room.set()
                yield request, future
            if reading.done():
                reading.result()
                if not working:
                    return
            news.clear()
            await news.wait()
    finally:
        reading.cancel()
        for future in working:
            future.cancel()
