"""Compares what should run with what was observed, and says what to do. Pure.

Each command is idempotent, and a command that is lost is simply given again on the next round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal_cluster.control.catalog import Catalog
from shoal_cluster.domain.ids import CollectionId, Epoch, ServerId, ShardNumber
from shoal_cluster.domain.observation import ReplicaReport, ReplicaState, ServerReport
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.topology import CollectionPlace, ShardPlace, Topology

Reports = Mapping[ServerId, ServerReport]


@dataclass(frozen=True, slots=True)
class OpenReplica:
    server: ServerId
    schema: CollectionSchema
    shard: ShardNumber


@dataclass(frozen=True, slots=True)
class CloseReplica:
    server: ServerId
    collection: CollectionId
    shard: ShardNumber


@dataclass(frozen=True, slots=True)
class Promote:
    server: ServerId
    collection: CollectionId
    shard: ShardNumber


@dataclass(frozen=True, slots=True)
class SetFollowers:
    """addresses: links of the servers that the primary should push to."""

    server: ServerId
    collection: CollectionId
    shard: ShardNumber
    addresses: tuple[str, ...]


Command = OpenReplica | CloseReplica | Promote | SetFollowers


def shard_name(collection: CollectionId, shard: ShardNumber) -> str:
    """Returns how a shard is named in reports."""
    return f"{collection}/{shard}"


def diff(catalog: Catalog, reports: Reports) -> list[Command]:
    """Returns what brings the observed state closer to the catalog. reports: live servers only."""
    commands: list[Command] = []
    wanted: set[tuple[ServerId, CollectionId, ShardNumber]] = set()
    held = _held(reports)
    for record in catalog.collections.values():
        for number, servers in enumerate(record.assignment):
            shard = ShardNumber(number)
            live = [server for server in servers if server in reports]
            wanted.update((server, record.schema.id, shard) for server in live)
            found = held.get((record.schema.id, shard), {})
            commands += _diff_shard(record.schema, shard, live, found, reports)
    for server, report in reports.items():
        for replica in report.replicas:
            if (server, replica.collection, replica.shard) not in wanted:
                commands.append(CloseReplica(server, replica.collection, replica.shard))
    return commands


def _held(
    reports: Reports,
) -> dict[tuple[CollectionId, ShardNumber], dict[ServerId, ReplicaReport]]:
    """Returns the reports of each shard's replicas, so that nobody searches for them by shard."""
    held: dict[tuple[CollectionId, ShardNumber], dict[ServerId, ReplicaReport]] = {}
    for server, report in reports.items():
        for replica in report.replicas:
            held.setdefault((replica.collection, replica.shard), {})[server] = replica
    return held


def _among(
    found: Mapping[ServerId, ReplicaReport], servers: Sequence[ServerId]
) -> dict[ServerId, ReplicaReport]:
    return {server: found[server] for server in servers if server in found}


def _diff_shard(
    schema: CollectionSchema,
    shard: ShardNumber,
    live: Sequence[ServerId],
    found: Mapping[ServerId, ReplicaReport],
    reports: Reports,
) -> list[Command]:
    """live: servers that should hold a replica, preferred first. found: who holds one."""
    commands: list[Command] = []
    found = _among(found, live)
    for server in live:
        replica = found.get(server)
        if (
            replica is None
            or replica.state is ReplicaState.FAILED
            or replica.schema_version < schema.version
        ):
            commands.append(OpenReplica(server, schema, shard))
    leader = leader_of(found)
    if leader is None:
        ready = [server for server in live if _is_ready(found.get(server))]
        if ready:
            # The most advanced replica has the least to replay; ties go to the preferred server.
            best = max(ready, key=lambda server: (found[server].seq, -live.index(server)))
            commands.append(Promote(best, schema.id, shard))
        return commands
    followers = tuple(
        reports[server].address
        for server in live
        if server != leader and found.get(server) is not None
    )
    if reports[leader].followers.get(shard_name(schema.id, shard), ()) != followers:
        commands.append(SetFollowers(leader, schema.id, shard, followers))
    return commands


def leader_of(found: Mapping[ServerId, ReplicaReport]) -> ServerId | None:
    """Returns the server that leads with the highest epoch: a fenced one may not know it yet."""
    leaders = [server for server, replica in found.items() if replica.leads]
    return max(leaders, key=lambda server: found[server].epoch, default=None)


def _is_ready(replica: ReplicaReport | None) -> bool:
    return replica is not None and replica.state is ReplicaState.READY


def topology_of(catalog: Catalog, reports: Reports, cluster_uuid: bytes, version: int) -> Topology:
    """Returns what coordinators should know: live servers and loaded replicas only."""
    collections = {}
    held = _held(reports)
    for record in catalog.collections.values():
        if not record.is_created:
            continue
        shards = []
        for number, servers in enumerate(record.assignment):
            found = _among(held.get((record.schema.id, ShardNumber(number)), {}), servers)
            leader = leader_of(found)
            shards.append(
                ShardPlace(
                    shard=ShardNumber(number),
                    primary=leader,
                    epoch=Epoch(0 if leader is None else found[leader].epoch),
                    replicas=tuple(server for server in servers if _is_ready(found.get(server))),
                )
            )
        collections[record.schema.name] = CollectionPlace(
            schema=record.schema, shards=tuple(shards)
        )
    return Topology(
        version=version,
        cluster_uuid=cluster_uuid,
        servers={server: report.address for server, report in reports.items()},
        collections=collections,
    )
