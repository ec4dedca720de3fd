"""Pushes a primary's durable records to its followers over links. Best effort and bounded."""

import asyncio

from shoal_cluster.domain.errors import Outcome, ShoalError
from shoal_cluster.domain.ids import CollectionId, ShardNumber, Slot
from shoal_cluster.domain.limits import PUSH_BYTES_MAX, PUSHES_MAX
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.pool import LinkPool

PUSH_TIMEOUT_S = 5.0

PUSH = "push"
WAKE = "wake"


class FollowerFeed:
    """The Publisher (shard/ports.py) of one shard.

    In flight: the sizes of the pushes on their way to each follower.
    """

    def __init__(self, pool: LinkPool, collection: CollectionId, shard: ShardNumber) -> None:
        self._pool = pool
        self._collection = collection
        self._shard = shard
        self._in_flight: dict[LinkAddress, list[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.addresses: tuple[LinkAddress, ...] = ()

    def record(self, slot: Slot, body: bytes) -> None:
        self._send(PUSH, [self._collection, self._shard, slot], body)

    def manifest(self) -> None:
        self._send(WAKE, [self._collection, self._shard], b"")

    def _send(self, method: str, header: object, body: bytes) -> None:
        for address in self.addresses:
            sizes = self._in_flight.setdefault(address, [])
            if len(sizes) >= PUSHES_MAX or sum(sizes) + len(body) > PUSH_BYTES_MAX:
                continue
            sizes.append(len(body))
            task = asyncio.ensure_future(self._push(address, method, header, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _push(self, address: LinkAddress, method: str, header: object, body: bytes) -> None:
        try:
            await self._pool.call(
                address,
                method,
                header,
                body,
                timeout_s=PUSH_TIMEOUT_S,
                on_lost=Outcome.NOT_APPLIED,
            )
        except ShoalError:
            # The follower polls the bucket anyway; the controller notices a dead one.
            return
        finally:
            self._in_flight[address].remove(len(body))
