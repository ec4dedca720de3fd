"""How a coordinator reaches shard servers, and what it knows of where they are."""

import asyncio
from typing import Any

from shoal_cluster.domain.errors import Outcome, Unavailable
from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.shard_caller import Body
from shoal_cluster.domain.topology import Topology
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.pool import LinkPool


class TopologyBoard:
    """The TopologySource port (domain/shard_caller.py): the newest topology the controller sent."""

    def __init__(self, cluster_uuid: bytes) -> None:
        self._current = Topology(version=0, cluster_uuid=cluster_uuid)
        self._changed: asyncio.Future[None] | None = None

    def current(self) -> Topology:
        return self._current

    async def newer_than(self, version: int, timeout_s: float) -> Topology:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        # Not "<=": a restarted controller numbers its topologies from 1 again.
        while self._current.version == version:
            left_s = deadline_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            if self._changed is None:
                self._changed = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._changed], timeout=left_s)
        return self._current

    def post(self, topology: Topology) -> None:
        """Takes a topology; the controller sends them in order, its restart begins anew."""
        self._current = topology
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None


class LinkCaller:
    """The ShardCaller port (domain/shard_caller.py) over links."""

    def __init__(self, pool: LinkPool, board: TopologyBoard) -> None:
        self._pool = pool
        self._board = board

    async def call(
        self,
        server: ServerId,
        method: str,
        header: object,
        body: Body = b"",
        *,
        timeout_s: float,
        on_lost: Outcome,
    ) -> tuple[Any, memoryview]:
        address = self._board.current().servers.get(server)
        if address is None:
            raise Unavailable(f"server {server} is not part of the topology now; nothing was sent")
        reply = await self._pool.call(
            LinkAddress(address), method, header, body, timeout_s=timeout_s, on_lost=on_lost
        )
        return reply.header, reply.body
