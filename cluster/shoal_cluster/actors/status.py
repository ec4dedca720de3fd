"""Puts together what `status` answers from what the controller has observed."""

from collections.abc import Mapping

from shoal_cluster import __version__
from shoal_cluster.actors.configuration import ClusterConfiguration
from shoal_cluster.actors.coordinator import CoordinatorReport
from shoal_cluster.control.catalog import CollectionRecord
from shoal_cluster.control.controller import ControlLoop
from shoal_cluster.domain.ids import ServerId, ShardNumber, cluster_uuid_text
from shoal_cluster.domain.observation import ReplicaReport, ReplicaState
from shoal_cluster.domain.recall import merged
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.status import (
    ActorStatus,
    ClusterStatus,
    CollectionStatus,
    NodeStatus,
    ReplicaStatus,
    ShardStatus,
)

_STATES = {
    ReplicaState.LOADING: "opening",
    ReplicaState.READY: "ready",
    ReplicaState.FAILED: "failed",
}


def cluster_status(
    configuration: ClusterConfiguration,
    loop: ControlLoop,
    *,
    controller_pid: int,
    controller_memory_bytes: int,
    controller_started_ms: int,
    coordinators: Mapping[str, CoordinatorReport],
    now_ms: int,
) -> ClusterStatus:
    """Returns the cluster as last observed."""
    reports = loop.reports
    nodes = {report.node: report.machine for report in reports.values()}
    home = min(nodes, default="")
    actors = [
        ActorStatus(
            id="controller",
            kind="controller",
            pid=controller_pid,
            node=home,
            state="ready",
            memory_bytes=controller_memory_bytes,
            uptime_ms=now_ms - controller_started_ms,
        ),
    ]
    actors += [
        ActorStatus(
            id=name,
            kind="coordinator",
            pid=coordinator.pid,
            node=home,
            state="ready" if coordinator.pid else "suspect",
            memory_bytes=coordinator.memory_bytes,
            address=coordinator.address,
            uptime_ms=now_ms - coordinator.started_ms if coordinator.pid else 0,
        )
        for name, coordinator in coordinators.items()
    ]
    for server in configuration.servers:
        report = reports.get(server)
        if report is None:
            actors.append(
                ActorStatus(id=server, kind="shard_server", pid=0, node="", state="suspect")
            )
            continue
        actors.append(
            ActorStatus(
                id=server,
                kind="shard_server",
                pid=report.pid,
                node=report.node,
                state="ready",
                memory_bytes=report.memory_bytes,
                address=report.address,
                uptime_ms=now_ms - report.started_ms,
            )
        )
    return ClusterStatus(
        version=__version__,
        cluster_uuid=cluster_uuid_text(configuration.cluster_uuid),
        uptime_ms=now_ms - min(coordinator.started_ms for coordinator in coordinators.values()),
        bucket=configuration.bucket,
        nodes=tuple(
            NodeStatus(
                id=node,
                address=machine.address,
                state="alive",
                cpus=machine.cpus,
                memory_bytes=machine.memory_bytes,
                memory_used_bytes=machine.memory_used_bytes,
            )
            for node, machine in sorted(nodes.items())
        ),
        actors=tuple(actors),
        collections=tuple(
            _collection_status(record, loop)
            for record in sorted(
                loop.catalog.collections.values(), key=lambda record: record.schema.name
            )
        ),
    )


def _collection_status(record: CollectionRecord, loop: ControlLoop) -> CollectionStatus:
    shards = tuple(
        _shard_status(record, ShardNumber(shard), loop) for shard in range(record.schema.shards)
    )
    return CollectionStatus(
        schema=record.schema,
        rows_live=sum(shard.rows_live for shard in shards),
        shards=shards,
        recall=merged(
            estimate
            for report in loop.reports.values()
            for replica in report.replicas
            if replica.collection == record.schema.id
            for estimate in replica.recall
        ),
    )


def _shard_status(record: CollectionRecord, shard: ShardNumber, loop: ControlLoop) -> ShardStatus:
    found: list[tuple[ServerId, ReplicaReport]] = []
    for server in record.assignment[shard] if record.is_created else ():
        report = loop.reports.get(server)
        if report is not None:
            found += [
                (server, replica)
                for replica in report.replicas
                if replica.collection == record.schema.id and replica.shard == shard
            ]
    leaders = [replica for _, replica in found if replica.leads]
    best = max(
        leaders or [replica for _, replica in found],
        key=lambda replica: (replica.epoch, replica.seq),
        default=None,
    )
    if best is None:
        return ShardStatus(shard=shard)
    return ShardStatus(
        shard=shard,
        position=Position(best.epoch, best.seq),
        floor_slot=best.floor_slot,
        manifest_version=best.manifest_version,
        memtable_rows=best.unsealed_rows,
        segments=best.segments,
        rows_live=best.live_rows,
        replicas=tuple(
            ReplicaStatus(
                server=server,
                primary=replica is best and replica.leads,
                state=_STATES[replica.state],
                position=Position(replica.epoch, replica.seq),
                lag_seq=max(0, best.seq - replica.seq),
                rows=replica.live_rows,
                memory_bytes=replica.memory_bytes,
                mapped_bytes=replica.mapped_bytes,
                set_checksum=replica.sum,
                reason=replica.reason,
                failures=replica.failures,
            )
            for server, replica in found
        ),
    )
