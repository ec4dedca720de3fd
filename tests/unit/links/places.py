"""Where the links' contract is checked: real sockets on both loops, and the memory network."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from shoal_cluster.links.address import LinkAddress, parse_address
from shoal_cluster.links.connection import Link, connect
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.memory import MemoryNetwork
from shoal_cluster.links.messages import Handler
from shoal_cluster.links.network import Network, SocketNetwork

SECRET = b"0123456789abcdef0123456789abcdef"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    network: Network
    address: LinkAddress
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Runs the test's coroutine; nothing in these tests may take 20 s."""

        async def bounded() -> T:
            async with asyncio.timeout(20):
                return await main

        with asyncio.Runner(loop_factory=self.loop_factory) as runner:
            return runner.run(bounded())

    @contextlib.asynccontextmanager
    async def listening(
        self, handlers: Mapping[str, Handler], **options: Any
    ) -> AsyncIterator[tuple[Listener, LinkAddress]]:
        listener = Listener(handlers, SECRET, network=self.network, **options)
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
        return await connect(address, secret, network=self.network, **options)


def make_place(kind: str, directory: Path) -> Place:
    loop_factory = uvloop.new_event_loop if kind.endswith("uvloop") else None
    scheme = kind.partition("-")[0]
    if scheme == "memory":
        return Place(network=MemoryNetwork(), address=parse_address("memory:a"), loop_factory=None)
    text = f"unix:{directory}/a.sock" if scheme == "unix" else "tcp:127.0.0.1:0"
    return Place(network=SocketNetwork(), address=parse_address(text), loop_factory=loop_factory)


SOCKETS = ["unix-uvloop", "unix-asyncio", "tcp-uvloop", "tcp-asyncio"]
EVERYWHERE = [*SOCKETS, "memory"]
