"""What the simulation found, each shown by itself."""

import asyncio
import random
from collections.abc import Mapping

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import ObjectEntry
from shoal_cluster.control.catalog import CollectionRecord, Owner
from shoal_cluster.control.controller import ControlLoop
from shoal_cluster.control.reconcile import Command
from shoal_cluster.domain.errors import NotFound, Unavailable
from shoal_cluster.domain.ids import CollectionId, ServerId
from shoal_cluster.domain.observation import ServerReport
from shoal_cluster.domain.topology import Topology
from shoal_cluster.query.plan import collection_of
from tests.simulation.clients import schema_of
from tests.simulation.loop import SimulatedLoop, run
from tests.simulation.world import SeededIds, SimulatedClock


class SlowFirstListing(MemoryStore):
    """The first listing of floor markers, which ends a catalog commit, takes a second."""

    waited = False

    async def list(self, prefix: str) -> list[ObjectEntry]:
        if prefix.endswith("floor/") and not self.waited:
            self.waited = True
            await asyncio.sleep(1.0)
        return await super().list(prefix)


class NoServers:
    def placed(self) -> Mapping[ServerId, str]:
        return {}

    async def report(self, server: ServerId) -> ServerReport:
        raise NotFound(f"no server {server}")

    async def carry_out(self, command: Command) -> None:
        return None

    def publish(self, topology: Topology) -> None:
        return None


def test_catalog_in_memory_does_not_go_back_when_updates_end_in_another_order() -> None:
    """An update whose last step is slow must not replace what a later one has read."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        control = ControlLoop(
            store=SlowFirstListing(),
            clock=SimulatedClock(loop, offset_s=0.0, rate=1.0),
            ids=SeededIds(random.Random(1)),
            servers=NoServers(),
            audience=NoServers(),
            cluster_uuid=bytes(16),
            owner=Owner(incarnation="x", address="", since_ms=0, host="h"),
        )
        claim = asyncio.ensure_future(control.claim())
        await asyncio.sleep(0.1)
        record = CollectionRecord(schema=schema_of(1, 1), assignment=())
        await control._owned.update(lambda catalog: catalog.with_record(record))
        await claim
        assert CollectionId("") in control.catalog.collections

    run(main(), limit_s=100)


def test_coordinator_without_a_topology_does_not_say_that_a_collection_is_missing() -> None:
    with pytest.raises(Unavailable):
        collection_of(Topology(version=0, cluster_uuid=bytes(16)), "points")
    with pytest.raises(NotFound):
        collection_of(Topology(version=1, cluster_uuid=bytes(16)), "points")
