"""Links to many addresses: connected when needed, shared by all callers, dropped when lost."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

from shoal_cluster.domain.clock import Clock, SystemClock
from shoal_cluster.domain.errors import Outcome, Overloaded, ShoalError, Unavailable
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.connection import Link
from shoal_cluster.links.messages import ReceivedReply
from shoal_protos.frames import Body

_log = structlog.get_logger(__name__)

BACKOFF_S_MIN: Final = 0.01
BACKOFF_S_MAX: Final = 1.0
"""A restarted server is found again within a second; 100 callers cost it one connect a second."""

ADDRESSES_MAX: Final = 1024
"""As many as a listener accepts. Unreachable addresses are forgotten first: servers that restart
come back at others."""

Connect = Callable[[LinkAddress], Awaitable[Link]]


@dataclass(slots=True)
class _Entry:
    """What is known of one address; at most one of link and connecting is set."""

    link: Link | None = None
    connecting: asyncio.Task[Link] | None = None
    backoff_s: float = 0.0
    retry_at_s: float = 0.0
    failure: str = ""


class LinkPool:
    """One link per address, for the tasks of one event loop.

    connect: makes a link, in bounded time; usually `connection.connect` with secret, clock and
    network bound to it.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        clock: Clock | None = None,
        addresses_max: int = ADDRESSES_MAX,
    ) -> None:
        self._connect = connect
        self._clock = clock or SystemClock()
        self._addresses_max = addresses_max
        self._entries: dict[LinkAddress, _Entry] = {}
        self._open_links: set[Link] = set()
        self._lost_callbacks: list[Callable[[LinkAddress, str], None]] = []
        self._closed = False

    def when_lost(self, callback: Callable[[LinkAddress, str], None]) -> None:
        """Calls back with address and reason, one loop turn after a link of this pool is lost.

        Not called for links that `close_all` closes, nor for addresses that never connected.
        """
        self._lost_callbacks.append(callback)

    def connected(self) -> list[LinkAddress]:
        return [address for address, entry in self._entries.items() if entry.link is not None]

    async def call(
        self,
        address: LinkAddress,
        method: str,
        header: object,
        body: Body = b"",
        *,
        timeout_s: float,
        on_lost: Outcome,
    ) -> ReceivedReply:
        """Calls a method at the address; as `Link.call`, with connecting within the timeout.

        Raises: what `Link.call` and `link` raise.
        """
        entry = self._entries.get(address)
        if entry is not None and entry.link is not None and not entry.link.draining:
            return await entry.link.call(method, header, body, timeout_s=timeout_s, on_lost=on_lost)
        start_s = self._clock.monotonic_s()
        link = await self.link(address, timeout_s=timeout_s)
        left_s = timeout_s - (self._clock.monotonic_s() - start_s)
        return await link.call(method, header, body, timeout_s=left_s, on_lost=on_lost)

    async def link(self, address: LinkAddress, *, timeout_s: float) -> Link:
        """Returns the link to the address, connecting if there is none; one connect at a time.

        After a failed connect the next is tried no sooner than the backoff; until then callers
        fail at once, so that they can go elsewhere.
        Raises: Unavailable with retry_after_ms, Unauthenticated, Conflict, Overloaded; all
        NOT_APPLIED.
        """
        if self._closed:
            raise Unavailable(f"no link to {address}: the pool is closed")
        entry = self._entry(address)
        if entry.link is not None:
            if not entry.link.draining:
                return entry.link
            # Calls in flight end on it; new ones need another.
            entry.link = None
        if entry.connecting is None:
            wait_s = entry.retry_at_s - self._clock.monotonic_s()
            if wait_s > 0:
                raise Unavailable(
                    f"no link to {address}: {entry.failure}; not tried again for {wait_s:.3f} s",
                    retry_after_ms=int(wait_s * 1000) + 1,
                )
            entry.connecting = asyncio.create_task(self._open(address, entry))
            entry.connecting.add_done_callback(_mark_retrieved)
        connecting = entry.connecting
        # `wait` neither cancels the connect, which others wait for too, nor raises its error.
        await asyncio.wait([connecting], timeout=timeout_s)
        if not connecting.done():
            raise Unavailable(f"no link to {address} before the deadline")
        if connecting.cancelled():
            raise Unavailable(f"no link to {address}: the pool was closed")
        return connecting.result()

    async def close_all(self) -> None:
        """Closes every link and ends connecting; the pool cannot be used afterwards."""
        self._closed = True
        entries, self._entries = self._entries, {}
        connecting = [entry.connecting for entry in entries.values() if entry.connecting]
        for task in connecting:
            task.cancel()
        if connecting:
            await asyncio.wait(connecting)
        await asyncio.gather(*(link.close() for link in list(self._open_links)))

    def _entry(self, address: LinkAddress) -> _Entry:
        entry = self._entries.get(address)
        if entry is not None:
            return entry
        if len(self._entries) >= self._addresses_max:
            idle = (
                known
                for known, entry in self._entries.items()
                if entry.link is None and entry.connecting is None
            )
            forgotten = next(idle, None)
            if forgotten is None:
                raise Overloaded(
                    f"no link to {address}: links to {len(self._entries)} addresses are open",
                    limit=f"{self._addresses_max} addresses",
                )
            del self._entries[forgotten]
        entry = self._entries[address] = _Entry()
        return entry

    async def _open(self, address: LinkAddress, entry: _Entry) -> Link:
        try:
            link = await self._connect(address)
        except ShoalError as error:
            entry.backoff_s = min(max(2 * entry.backoff_s, BACKOFF_S_MIN), BACKOFF_S_MAX)
            entry.retry_at_s = self._clock.monotonic_s() + entry.backoff_s
            entry.failure = error.message
            raise
        finally:
            entry.connecting = None
        entry.backoff_s = 0.0
        entry.link = link
        self._open_links.add(link)
        link.closed.add_done_callback(lambda closed: self._lost(address, entry, link, closed))
        return link

    def _lost(
        self, address: LinkAddress, entry: _Entry, link: Link, closed: asyncio.Future[str]
    ) -> None:
        self._open_links.discard(link)
        if entry.link is link:
            entry.link = None
        if self._closed:
            return
        reason = closed.result()
        _log.info("link_lost", address=address, reason=reason)
        for callback in self._lost_callbacks:
            callback(address, reason)


def _mark_retrieved(connecting: asyncio.Task[Link]) -> None:
    """Reads the outcome, so that asyncio does not warn when all who waited for it gave up."""
    if not connecting.cancelled():
        connecting.exception()
