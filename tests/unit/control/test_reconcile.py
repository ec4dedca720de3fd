"""Planning of a round: what it costs with many shards. What it decides test_controller.py shows."""

from dataclasses import replace

from shoal_cluster.control.catalog import Catalog, CollectionRecord
from shoal_cluster.control.placement import place_all
from shoal_cluster.control.reconcile import OpenReplica, Promote, diff, topology_of
from shoal_cluster.domain.ids import CollectionId, ServerId, ShardNumber
from shoal_cluster.domain.observation import ReplicaReport, ServerReport
from tests.unit.control.test_controller import a_replica
from tests.unit.shard.nodes import CLUSTER_UUID, SCHEMA

SERVERS = (ServerId("a"), ServerId("b"))
SHARDS, COLLECTIONS = 4, 50


class Counted(tuple[ReplicaReport, ...]):
    """Says how often somebody went through it."""

    walks = 0

    def __iter__(self):
        type(self).walks += 1
        return super().__iter__()


def test_reports_are_gone_through_once_however_many_shards_there_are():
    catalog = Catalog()
    for number in range(COLLECTIONS):
        schema = replace(
            SCHEMA,
            id=CollectionId(f"{number:032x}"),
            name=f"c{number}",
            shards=SHARDS,
            replicas=2,
        )
        catalog = catalog.with_record(CollectionRecord(schema=schema, assignment=()))
        catalog = place_all(catalog, dict.fromkeys(SERVERS, "node"), created=schema.id)
    reports = {
        server: ServerReport(
            server=server,
            incarnation="1",
            address=f"unix:/{server}",
            node="node",
            pid=1,
            memory_bytes=0,
            started_ms=0,
            replicas=Counted(
                a_replica(OpenReplica(server, record.schema, ShardNumber(shard)))
                for record in catalog.collections.values()
                for shard in range(SHARDS)
            ),
            followers={},
        )
        for server in SERVERS
    }
    Counted.walks = 0
    commands = diff(catalog, reports)
    assert {type(command) for command in commands} == {Promote}
    assert len(commands) == COLLECTIONS * SHARDS
    # To find each shard's replicas, and to find those that nobody wants.
    assert Counted.walks == 2 * len(SERVERS)
    topology = topology_of(catalog, reports, CLUSTER_UUID, 1)
    assert len(topology.collections) == COLLECTIONS
    assert Counted.walks == 3 * len(SERVERS)
