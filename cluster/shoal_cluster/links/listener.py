"""Serves handlers at one or more link addresses."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, cast

import structlog

from shoal_cluster.domain.clock import Clock, SystemClock
from shoal_cluster.domain.ids import IdGenerator, SystemIdGenerator
from shoal_cluster.domain.limits import LINK_IN_FLIGHT_MAX
from shoal_cluster.links.accepted import AcceptedLink, Service
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.handshake import SecretOf
from shoal_cluster.links.messages import Handler, Reply
from shoal_cluster.links.network import Network, Served, SocketNetwork

_log = structlog.get_logger(__name__)

CONNECTIONS_MAX: Final = 1024
"""Of one listener: each process of a cluster of some hundred nodes links to it once."""

HANDSHAKE_S: Final = 5.0
"""For a stranger to authenticate itself; a caller needs two round trips."""

_FLUSH_S: Final = 1.0
"""For peers to read the last replies of a listener that closes."""


class Listener:
    """Accepts links and serves their calls with the handlers, on the loop it was started on.

    handlers: method name to handler; what a handler may be is told at `Handler`.
    secret_of: what callers must know, by the name they give; `shared_secret` between actors.
    reply_of: makes the reply of a handler that answers with bytes; None: no handler does.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        secret_of: SecretOf,
        *,
        clock: Clock | None = None,
        ids: IdGenerator | None = None,
        network: Network | None = None,
        handshake_s: float = HANDSHAKE_S,
        in_flight_max: int = LINK_IN_FLIGHT_MAX,
        connections_max: int = CONNECTIONS_MAX,
        reply_of: Callable[[bytes], Reply] | None = None,
    ) -> None:
        self._service = Service(
            handlers=dict(handlers),
            secret_of=secret_of,
            clock=clock or SystemClock(),
            ids=ids or SystemIdGenerator(),
            handshake_s=handshake_s,
            in_flight_max=in_flight_max,
            reply_of=reply_of,
        )
        self._network = network or SocketNetwork()
        self._connections_max = connections_max
        self._served: list[Served] = []
        self._links: set[AcceptedLink] = set()
        self._closing = False

    @property
    def addresses(self) -> list[LinkAddress]:
        """Where callers reach this listener, in the order of the `listen` calls."""
        return [served.address for served in self._served]

    @property
    def links_open(self) -> int:
        return len(self._links)

    async def listen(self, address: LinkAddress) -> LinkAddress:
        """Accepts links at the address and returns it with the port that was assigned (tcp: 0).

        A tcp address should name a loopback or private interface: the handshake authenticates,
        it does not encrypt. Raises: Conflict (NOT_APPLIED) if the address is in use;
        InvalidRequest (NOT_APPLIED) if it cannot be listened at.
        """
        served = await self._network.serve(address, self._accept)
        self._served.append(served)
        return served.address

    async def close(self, drain_s: float) -> None:
        """Stops accepting, lets running handlers end for drain_s, cancels the rest. Idempotent.

        Peers are told at once, so they send further calls elsewhere; what crosses the notice is
        refused as Unavailable (NOT_APPLIED).
        """
        self._closing = True
        for served in self._served:
            served.stop()
        for link in list(self._links):
            link.drain()
        running = [future for link in self._links for future in link.running()]
        if running:
            _, unfinished = await asyncio.wait(running, timeout=drain_s)
            if unfinished:
                _log.warning("handlers_cancelled", count=len(unfinished), drain_s=drain_s)
                for future in unfinished:
                    future.cancel()
                # Their callers hear of it before the links close.
                await asyncio.wait(unfinished, timeout=_FLUSH_S)
        for link in list(self._links):
            link.close()
        await self._until_closed()
        for link in list(self._links):
            link.abort()
        await self._until_closed()

    async def _until_closed(self) -> None:
        closed = [link.closed for link in self._links]
        if closed:
            await asyncio.wait(closed, timeout=_FLUSH_S)

    def _accept(self) -> asyncio.Protocol:
        if self._closing or len(self._links) >= self._connections_max:
            _log.warning("link_refused", reason="too many links", limit=self._connections_max)
            return _Refusal()
        link = AcceptedLink(self._service, on_closed=self._links.discard)
        self._links.add(link)
        return link


class _Refusal(asyncio.Protocol):
    """Closes a connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()
