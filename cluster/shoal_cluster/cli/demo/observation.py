"""Reads the demo's questions out of a status report: indexed yet, whole yet, whom to kill. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from shoal_cluster.cli.demo.corpus import COLLECTION
from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.domain.limits import SETTLE_OPERATIONS
from shoal_protos.v1 import admin_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A shard server's process, and the shards of the demo's collection it leads."""

    server: str
    pid: int
    leads: tuple[int, ...]


def shards_of(report: admin_pb2.StatusResponse) -> list[admin_pb2.ShardStatus]:
    """Returns the shards of the demo's collection."""
    return [
        shard
        for collection in report.collections
        if collection.schema.name == COLLECTION
        for shard in collection.shards
    ]


def rows_not_indexed(report: admin_pb2.StatusResponse) -> int:
    return sum(shard.memtable_rows for shard in shards_of(report))


def sealing_is_due(report: admin_pb2.StatusResponse) -> bool:
    """Says whether a shard still holds enough rows to be made a segment, now that it is quiet."""
    return any(shard.memtable_rows >= SETTLE_OPERATIONS for shard in shards_of(report))


def is_whole(
    report: admin_pb2.StatusResponse, *, shards: int, replicas: int, without_pid: int | None = None
) -> bool:
    """Says whether every shard has all replicas ready in live processes, one of them leading.

    without_pid: a killed process; a report that still counts on it is old.
    """
    ready = {
        actor.id for actor in report.actors if actor.state == "ready" and actor.pid != without_pid
    }
    found = shards_of(report)
    return len(found) == shards and all(
        len(list(_ready_replicas(shard, ready))) >= replicas
        and any(
            replica.role == admin_pb2.REPLICA_ROLE_PRIMARY
            for replica in _ready_replicas(shard, ready)
        )
        for shard in found
    )


def choose_victim(report: admin_pb2.StatusResponse) -> Victim:
    """Returns the shard server that leads most shards; of equals the first by name.

    Raises: Unavailable when no live server leads any.
    """
    leads: dict[str, list[int]] = {}
    for shard in shards_of(report):
        for replica in shard.replicas:
            if replica.role == admin_pb2.REPLICA_ROLE_PRIMARY:
                leads.setdefault(replica.server, []).append(shard.shard)
    servers = {
        actor.id: actor.pid
        for actor in report.actors
        if actor.kind == "shard_server" and actor.pid and actor.id in leads
    }
    if not servers:
        raise Unavailable("status names no shard server that leads a shard")
    server = min(servers, key=lambda name: (-len(leads[name]), name))
    return Victim(server=server, pid=servers[server], leads=tuple(leads[server]))


def _ready_replicas(
    shard: admin_pb2.ShardStatus, ready: set[str]
) -> Iterator[admin_pb2.ReplicaStatus]:
    return (
        replica
        for replica in shard.replicas
        if replica.state == "ready" and replica.server in ready
    )
