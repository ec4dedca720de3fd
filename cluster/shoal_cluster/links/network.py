"""The port through which links reach each other, and its real side: Unix and TCP sockets.

The other side is memory.py. Both only move bytes between asyncio protocols; frames, handshake and
calls are the same code above either.
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from shoal_cluster.domain.errors import Conflict, InvalidRequest, Unavailable
from shoal_cluster.links.address import LinkAddress, tcp_address, tcp_endpoint, unix_path

_BACKLOG: Final = 256
"""Connections that wait to be accepted; every actor of a node may connect in one tick."""

ProtocolT = TypeVar("ProtocolT", bound=asyncio.Protocol)


class Served(Protocol):
    """An address that accepts connections."""

    @property
    def address(self) -> LinkAddress:
        """The address callers use, with the port that was assigned."""
        ...

    def stop(self) -> None:
        """Accepts no more connections and gives the address back; open ones stay."""
        ...


class Network(Protocol):
    async def serve(self, address: LinkAddress, factory: Callable[[], asyncio.Protocol]) -> Served:
        """Accepts connections at the address, each with a protocol from the factory.

        Raises: Conflict (NOT_APPLIED) if somebody listens there already.
        """
        ...

    async def open(self, address: LinkAddress, factory: Callable[[], ProtocolT]) -> ProtocolT:
        """Connects to the address and returns the protocol made by the factory.

        Raises: Unavailable (NOT_APPLIED) if nobody answers. Takes as long as the system likes:
        the caller bounds it.
        """
        ...


class SocketNetwork:
    """Unix sockets within a node, TCP between nodes."""

    async def serve(self, address: LinkAddress, factory: Callable[[], asyncio.Protocol]) -> Served:
        path, endpoint = unix_path(address), tcp_endpoint(address)
        loop = asyncio.get_running_loop()
        try:
            if path is not None:
                listening = _bind_unix(path)
                server = await loop.create_unix_server(factory, sock=listening, backlog=_BACKLOG)
                return _ServedSocket(server, address, path, os.stat(path).st_ino)
            if endpoint is not None:
                server = await loop.create_server(factory, *endpoint, backlog=_BACKLOG)
                port = server.sockets[0].getsockname()[1]
                return _ServedSocket(server, tcp_address(endpoint[0], port), None, 0)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Conflict(
                    f"cannot listen at {address}: the address is in use", field="link_address"
                ) from error
            raise InvalidRequest(
                f"cannot listen at {address}: {error}", field="link_address"
            ) from error
        raise _not_a_socket(address)

    async def open(self, address: LinkAddress, factory: Callable[[], ProtocolT]) -> ProtocolT:
        path, endpoint = unix_path(address), tcp_endpoint(address)
        loop = asyncio.get_running_loop()
        try:
            if path is not None:
                return (await loop.create_unix_connection(factory, path))[1]
            if endpoint is not None:
                return (await loop.create_connection(factory, *endpoint))[1]
        except OSError as error:
            raise Unavailable(f"cannot connect to {address}: {error}") from error
        raise _not_a_socket(address)


def _not_a_socket(address: LinkAddress) -> InvalidRequest:
    return InvalidRequest(
        f"{address} cannot be reached through sockets; pass the memory network it belongs to",
        field="link_address",
    )


def _bind_unix(path: str) -> socket.socket:
    """Returns a socket bound to the path and readable by this user only, not listening yet.

    A socket file that nobody listens at is what a killed process left: it is replaced. Raises
    EADDRINUSE where somebody does listen (asyncio alone would silently take the path over).
    """
    with contextlib.suppress(FileNotFoundError):
        in_use = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise in_use
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except BlockingIOError as error:
                # Somebody listens and has a full backlog.
                raise in_use from error
            else:
                raise in_use
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(path)
        os.chmod(path, 0o600)
    except OSError:
        listening.close()
        raise
    return listening


class _ServedSocket:
    def __init__(
        self, server: asyncio.Server, address: LinkAddress, path: str | None, inode: int
    ) -> None:
        self.address = address
        self._server = server
        self._path = path
        self._inode = inode

    def stop(self) -> None:
        self._server.close()
        if self._path is None:
            return
        # Only our own file: a successor may have bound the same path since.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
