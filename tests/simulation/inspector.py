"""Strong reads of replicas that no coordinator would prefer.

Routing sends most reads to the primary, or away from whoever is slow. But what a read may show does
not depend on routing, so an inspector asks any replica, a slow, fenced or forgotten one above all.
Its answers are judged by the audit.
"""

import asyncio
import functools

from shoal_cluster.domain.errors import Outcome, ShoalError, Unavailable
from shoal_cluster.domain.session import Consistency
from shoal_cluster.shard.calls import ReadLevel, ScrollCall
from tests.simulation.clients import ALL, COLLECTION
from tests.simulation.cluster import Cluster, SimulatedCoordinator

PATIENCE_S = 15.0
"""Longer than any stall: the answer of a replica that slept meanwhile is the one to see."""


class Inspector:
    """Reads one server's replicas, one after the other, whatever becomes of the server."""

    def __init__(self, cluster: Cluster, server: str, number: int, pause_s: float) -> None:
        self._cluster = cluster
        self._server = server
        self._pause_s = pause_s
        self._rng = cluster.world.rng(f"inspector {number} of {server}")

    async def work(self, until_s: float) -> None:
        world = self._cluster.world
        while world.loop.time() < until_s:
            await asyncio.sleep(self._rng.random() * self._pause_s)
            through = self._rng.choice(self._cluster.coordinators)
            read = functools.partial(self._read, through)
            try:
                await world.remote_call(
                    through.process, read, rng=self._rng, timeout_s=PATIENCE_S, lost=Unavailable
                )
            except ShoalError as error:
                if error.outcome is not Outcome.NOT_APPLIED:
                    world.violate(f"a read of {self._server} is unknown: {error.message}")

    async def _read(self, through: SimulatedCoordinator) -> None:
        place = through.board.current().collections.get(COLLECTION)
        held = [] if place is None else [s for s in place.shards if self._server in s.replicas]
        if place is None or not held:
            return
        call = ScrollCall(
            collection=place.schema.id,
            shard=self._rng.choice(held).shard,
            after=b"",
            limit=ALL,
            level=ReadLevel(consistency=Consistency.STRONG),
        )
        await through.caller.call(
            self._server,  # type: ignore[arg-type]
            ScrollCall.METHOD,
            call.to_wire(),
            timeout_s=PATIENCE_S,
            on_lost=Outcome.NOT_APPLIED,
        )
