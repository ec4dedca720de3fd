"""Both clients behind one synchronous face, so that every behaviour is shown for both."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shoal
from tests.unit.client.fake_server import FakeServer

Connect = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.fixture
def other_server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


class Awaited:
    """An asyncio client or collection whose methods wait for their result on `loop`."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target = target
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._target, name)
        if inspect.iscoroutinefunction(member):
            return lambda *args, **kwargs: self._wrap(
                self._loop.run_until_complete(member(*args, **kwargs))
            )
        if inspect.isasyncgenfunction(member):
            return lambda *args, **kwargs: self._loop.run_until_complete(
                _collect(member(*args, **kwargs))
            )
        if inspect.ismethod(member):
            return lambda *args, **kwargs: self._wrap(member(*args, **kwargs))
        return member

    def _wrap(self, value: Any) -> Any:
        return Awaited(value, self._loop) if isinstance(value, shoal.AsyncCollection) else value


async def _collect(points: Any) -> list[Any]:
    return [point async for point in points]


@pytest.fixture(params=["sync", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Returns a function that makes a client with the given arguments; closes them at the end."""
    opened: list[Any] = []
    if request.param == "sync":

        def open_sync(*args: Any, **kwargs: Any) -> Any:
            opened.append(shoal.Client(*args, **kwargs))
            return opened[-1]

        yield open_sync
        for client in opened:
            client.close()
        return
    with asyncio.Runner() as runner:

        def open_asyncio(*args: Any, **kwargs: Any) -> Any:
            opened.append(Awaited(shoal.AsyncClient(*args, **kwargs), runner.get_loop()))
            return opened[-1]

        yield open_asyncio
        for client in opened:
            client.close()
