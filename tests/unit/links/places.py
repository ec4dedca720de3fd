"""Where the links' contract is checked: real sockets on both loops, and the memory
network in virtual time."""

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from shoal_cluster.domain.clock import Clock, SystemClock
from shoal_cluster.links.address import LinkAddress, parse_address
from shoal_cluster.links.connection import Link, connect
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.memory import MemoryNetwork
from shoal_cluster.links.messages import Handler
from shoal_cluster.links.network import Network, SocketNetwork

SECRET = b"0123456789abcdef0123456789abcdef"

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer instead of waiting for it, so no load makes a test late."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now_s = max(self._now_s, self._scheduled[0].when())
        super()._run_once()


class LoopClock:
    """The time of the running loop, virtual or not."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_ms(self) -> int:
        return 0

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


def run_on(
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None, main: Coroutine[Any, Any, T]
) -> T:
    """Runs a test's coroutine, which must take under 20 s and leave nothing open."""

    async def bounded() -> T:
        async with asyncio.timeout(20):
            return await main

    runner = asyncio.Runner(loop_factory=loop_factory)
    try:
        result = runner.run(bounded())
    finally:
        # Recorded and not raised: where warnings are errors, uvloop hangs in `close` if a failed
        # test left a connection open.
        with warnings.catch_warnings(record=True) as left_open:
            warnings.simplefilter("always")
            runner.close()
    assert [str(warning.message) for warning in left_open] == []
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    network: Network
    address: LinkAddress
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None
    clock: Clock = field(default_factory=SystemClock)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        return run_on(self.loop_factory, main)

    @contextlib.asynccontextmanager
    async def listening(
        self, handlers: Mapping[str, Handler], **options: Any
    ) -> AsyncIterator[tuple[Listener, LinkAddress]]:
        options.setdefault("clock", self.clock)
        listener = Listener(handlers, shared_secret(SECRET), network=self.network, **options)
        address = await listener.listen(self.address)
        try:
            yield listener, address
        finally:
            await listener.close(drain_s=0)

    @contextlib.asynccontextmanager
    async def linked(self, handlers: Mapping[str, Handler], **options: Any) -> AsyncIterator[Link]:
        """A link to a listener with these handlers; `in_flight_max` is the caller's."""
        in_flight_max = options.pop("in_flight_max", 4096)
        async with self.listening(handlers, **options) as (_, address):
            link = await self.connect(address, in_flight_max=in_flight_max)
            try:
                yield link
            finally:
                await link.close()

    async def connect(self, address: LinkAddress, **options: Any) -> Link:
        secret = options.pop("secret", SECRET)
        options.setdefault("clock", self.clock)
        return await connect(address, secret, network=self.network, **options)


def make_place(kind: str, directory: Path) -> Place:
    loop_factory = uvloop.new_event_loop if kind.endswith("uvloop") else None
    scheme = kind.partition("-")[0]
    if scheme == "memory":
        return Place(
            network=MemoryNetwork(),
            address=parse_address("memory:a"),
            loop_factory=VirtualTimeLoop,
            clock=LoopClock(),
        )
    text = f"unix:{directory}/a.sock" if scheme == "unix" else "tcp:127.0.0.1:0"
    return Place(network=SocketNetwork(), address=parse_address(text), loop_factory=loop_factory)


SOCKETS = ["unix-uvloop", "unix-asyncio", "tcp-uvloop", "tcp-asyncio"]
EVERYWHERE = [*SOCKETS, "memory"]
