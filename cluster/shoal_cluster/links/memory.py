"""A network within one event loop, for simulation and tests: same links, no sockets.

Only the bytes' way differs from sockets; frames, handshake, limits and errors are the real code.
Everything happens through the loop's `call_soon` and `call_later`, in a fixed order, so a loop with
virtual time replays it exactly. Faults are told by address: `sever`, `freeze`, `thaw`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from shoal_cluster.domain.errors import Conflict, Unavailable
from shoal_cluster.domain.limits import KIB
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.network import ProtocolT, Served

_CHUNK_BYTES: Final = 256 * KIB
"""What one receive hands over at most, as both asyncio and uvloop do with sockets."""

_HIGH_BYTES: Final = 64 * KIB


class MemoryNetwork:
    """The addresses `memory:…` of one event loop and the connections among them.

    delay_s: called for each delivery of bytes; the simulation draws it from its seed.
    """

    def __init__(self, *, delay_s: Callable[[], float] = lambda: 0.0) -> None:
        self._delay_s = delay_s
        self._served: dict[LinkAddress, Callable[[], asyncio.Protocol]] = {}
        self._pipes: dict[LinkAddress, list[tuple[MemoryTransport, MemoryTransport]]] = {}
        self._frozen: set[LinkAddress] = set()

    async def serve(self, address: LinkAddress, factory: Callable[[], asyncio.Protocol]) -> Served:
        if address in self._served:
            raise Conflict(
                f"cannot listen at {address}: the address is in use", field="link_address"
            )
        self._served[address] = factory
        return _ServedMemory(address, self._served)

    async def open(self, address: LinkAddress, factory: Callable[[], ProtocolT]) -> ProtocolT:
        accept = self._served.get(address)
        if accept is None:
            raise Unavailable(f"cannot connect to {address}: nobody listens there")
        caller, accepted = factory(), accept()
        near = MemoryTransport(caller, "", self._delay_s)
        far = MemoryTransport(accepted, "memory", self._delay_s)
        near.peer, far.peer = far, near
        pipes = self._pipes.setdefault(address, [])
        pipes[:] = [pipe for pipe in pipes if not pipe[0].lost]
        pipes.append((near, far))
        if address in self._frozen:
            near.frozen = far.frozen = True
        accepted.connection_made(far)
        caller.connection_made(near)
        return caller

    def sever(self, address: LinkAddress) -> None:
        """Resets every connection to the address, as the death of its process does."""
        for near, _ in self._pipes.pop(address, []):
            near.abort()

    def freeze(self, address: LinkAddress) -> None:
        """Delivers nothing to or from the address until `thaw`, as a partition does."""
        self._frozen.add(address)
        self._set_frozen(address, True)

    def thaw(self, address: LinkAddress) -> None:
        """Delivers what was held back, and everything from now on."""
        self._frozen.discard(address)
        self._set_frozen(address, False)

    def _set_frozen(self, address: LinkAddress, frozen: bool) -> None:
        for pipe in self._pipes.get(address, []):
            for transport in pipe:
                transport.frozen = frozen
                transport.schedule()


class _ServedMemory:
    def __init__(
        self, address: LinkAddress, served: dict[LinkAddress, Callable[[], asyncio.Protocol]]
    ) -> None:
        self.address = address
        self._served = served

    def stop(self) -> None:
        self._served.pop(self.address, None)


class MemoryTransport(asyncio.Transport):
    """One end of a connection; what is written to it arrives at the peer's protocol, in order."""

    def __init__(
        self, protocol: asyncio.Protocol, peername: str, delay_s: Callable[[], float]
    ) -> None:
        super().__init__({"peername": peername})
        self.peer: MemoryTransport
        self.frozen = False
        self.lost = False
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._delay_s = delay_s
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._high_bytes = _HIGH_BYTES
        self._scheduled = False
        self._closing = False
        self._reading = True
        self._write_paused = False

    # -- what a protocol asks of its transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not len(data):
            return
        # A copy, as a socket makes one: the buffer is the caller's again afterwards.
        self._unsent.append(bytes(data))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > self._high_bytes and not self._write_paused:
            self._write_paused = True
            self._protocol.pause_writing()
        self.schedule()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.write(data)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = _HIGH_BYTES if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self.peer.schedule()

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Closes both ends once the peer has received what was written."""
        if not self._closing:
            self._closing = True
            self.schedule()

    def abort(self) -> None:
        self._lose(None)
        self.peer._lose(ConnectionResetError("reset by the peer"))

    # -- the way to the peer

    def schedule(self) -> None:
        """Arranges the next delivery, unless one is under way or there is nothing to deliver."""
        blocked = self.frozen or self.lost or not self.peer._reading
        if self._scheduled or blocked or not (self._unsent or self._closing):
            return
        self._scheduled = True
        delay_s = self._delay_s()
        if delay_s > 0:
            self._loop.call_later(delay_s, self._deliver)
        else:
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        if self.frozen or self.lost or not self.peer._reading:
            return
        if self._unsent:
            chunk = self._take_chunk()
            self.peer._protocol.data_received(chunk)
            if self._write_paused and self._unsent_bytes <= self._high_bytes // 4:
                self._write_paused = False
                self._protocol.resume_writing()
            self.schedule()
        elif self._closing:
            self._lose(None)
            self.peer._lose(None)

    def _take_chunk(self) -> bytes:
        parts = [self._unsent.popleft()]
        size = len(parts[0])
        while self._unsent and size + len(self._unsent[0]) <= _CHUNK_BYTES:
            parts.append(self._unsent.popleft())
            size += len(parts[-1])
        chunk = b"".join(parts)
        if size > _CHUNK_BYTES:
            self._unsent.appendleft(chunk[_CHUNK_BYTES:])
            chunk = chunk[:_CHUNK_BYTES]
        self._unsent_bytes -= len(chunk)
        return chunk

    def _lose(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = self._closing = True
            self._unsent.clear()
            self._unsent_bytes = 0
            self._loop.call_soon(self._protocol.connection_lost, error)
