"""The memory network between simulated processes: each end's callbacks run in its own process.

Bytes, frames, handshakes and limits are the real links' (links/memory.py); only here it is decided
when bytes arrive, and that a dead process's connections are reset.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.memory import MemoryNetwork, MemoryTransport
from shoal_cluster.links.network import Served
from tests.simulation.loop import Process
from tests.simulation.world import World

ProtocolT = TypeVar("ProtocolT", bound=asyncio.Protocol)


class _End(asyncio.Protocol):
    """One end of a connection: hands everything on as a callback of the process it belongs to."""

    def __init__(self, process: Process, inner: asyncio.Protocol) -> None:
        self.inner = inner
        self.transport: MemoryTransport | None = None
        self._process = process
        process.on_kill(self._reset)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, MemoryTransport)
        self.transport = transport
        self._process.call_soon(self.inner.connection_made, transport)

    def data_received(self, data: bytes) -> None:
        self._process.call_soon(self.inner.data_received, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._process.call_soon(self.inner.connection_lost, exc)

    def pause_writing(self) -> None:
        self.inner.pause_writing()  # from within a write of the process itself

    def resume_writing(self) -> None:
        self._process.call_soon(self.inner.resume_writing)

    def _reset(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class SimulatedNetwork:
    """All connections of a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.rng("network")
        self._memory = MemoryNetwork(delay_s=lambda: world.delays.draw(self._rng))

    def port(self, process: Process) -> "NetworkPort":
        """Returns the network as one process sees it."""
        return NetworkPort(self._world, self._memory, process)

    def sever(self, address: LinkAddress) -> None:
        """Resets the connections to an address; both ends live on."""
        self._memory.sever(address)

    def partition(self, address: LinkAddress) -> None:
        """Holds back every byte to and from an address until `heal`."""
        self._memory.freeze(address)

    def heal(self, address: LinkAddress) -> None:
        self._memory.thaw(address)


class NetworkPort:
    """links/network.py Network, for one process. is_server: all it opens are links for pushes."""

    def __init__(self, world: World, memory: MemoryNetwork, process: Process) -> None:
        self._world = world
        self._memory = memory
        self._process = process
        self.is_server = False

    async def serve(self, address: LinkAddress, factory: Callable[[], asyncio.Protocol]) -> Served:
        process = self._process
        served = await self._memory.serve(address, lambda: _End(process, process.run(factory)))
        process.on_kill(served.stop)
        return served

    async def open(self, address: LinkAddress, factory: Callable[[], ProtocolT]) -> ProtocolT:
        if not self._process.alive:
            raise Unavailable("the process is dead")
        if self.is_server and self._world.servers_apart:
            raise Unavailable(f"no way from {self._process.name} to {address}")
        end: Any = await self._memory.open(address, lambda: _End(self._process, factory()))
        inner: ProtocolT = end.inner
        return inner
