"""Ports through which queries and writes reach shard servers, and learn where shards are.

The links implement `ShardCaller`, the coordinator's view of the controller implements
`TopologySource`; tests and the simulation pass fakes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from shoal_cluster.domain.errors import Outcome
from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.topology import Topology

Body = bytes | memoryview | Sequence[bytes | memoryview]
"""One buffer, or several that are sent as one."""


class ShardCaller(Protocol):
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
        """Sends one message of shard/calls.py to a server and returns the reply's header and body.

        on_lost: what a timeout or a broken link after sending means. NOT_APPLIED (reads) ends as
        Unavailable, MAYBE_APPLIED (writes) as Indeterminate. Cancelling the call cancels the work
        at the server.

        Raises: the server's own ShoalError; Unavailable when nothing was sent, so also for a
        server that is not in the topology any more; Indeterminate as above.
        """
        ...


class TopologySource(Protocol):
    def current(self) -> Topology:
        """Returns the newest topology this process has seen. Costs nothing."""
        ...

    async def newer_than(self, version: int, timeout_s: float) -> Topology:
        """Returns the first topology above `version`, or the current one after `timeout_s`."""
        ...
