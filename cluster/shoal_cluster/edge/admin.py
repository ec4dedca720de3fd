"""The Admin service: translates, delegates, translates back."""

from shoal_cluster.domain.errors import NotFound
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.status import (
    ActorStatus,
    CollectionStatus,
    NodeStatus,
    ReplicaStatus,
    ShardStatus,
)
from shoal_cluster.edge.guard import Context, timeout_s
from shoal_cluster.edge.ports import StatusSource
from shoal_cluster.edge.schema_codec import encode_recall, encode_schema
from shoal_protos.v1 import admin_pb2 as pb
from shoal_protos.v1 import types_pb2
from shoal_protos.v1.admin_pb2_grpc import AdminServicer

# The methods' names are those of the protocol.
# ruff: noqa: N802


class AdminService(AdminServicer):
    def __init__(self, source: StatusSource) -> None:
        self._source = source

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        status = await self._source.status(timeout_s=timeout_s(context))
        collections = sorted(status.collections, key=lambda c: c.schema.name)
        if request.collection:
            collections = [c for c in collections if c.schema.name == request.collection]
            if not collections:
                raise NotFound(
                    f"collection {request.collection[:80]!r} does not exist", field="collection"
                )
        return pb.StatusResponse(
            version=status.version,
            cluster_uuid=status.cluster_uuid,
            uptime_ms=status.uptime_ms,
            bucket=status.bucket,
            nodes=[_encode_node(node) for node in status.nodes],
            actors=[_encode_actor(actor) for actor in status.actors],
            collections=[_encode_collection(collection) for collection in collections],
            age_ms=status.age_ms,
        )


def _encode_node(node: NodeStatus) -> pb.NodeStatus:
    return pb.NodeStatus(
        id=node.id,
        address=node.address,
        state=node.state,
        cpus=node.cpus,
        memory_bytes=node.memory_bytes,
        memory_used_bytes=node.memory_used_bytes,
    )


def _encode_actor(actor: ActorStatus) -> pb.ActorStatus:
    return pb.ActorStatus(
        id=actor.id,
        kind=actor.kind,
        pid=actor.pid,
        node=actor.node,
        state=actor.state,
        memory_bytes=actor.memory_bytes,
        address=actor.address,
        uptime_ms=actor.uptime_ms,
        restarts=actor.restarts,
    )


def _encode_collection(collection: CollectionStatus) -> pb.CollectionStatus:
    return pb.CollectionStatus(
        schema=encode_schema(collection.schema),
        rows_live=collection.rows_live,
        shards=[_encode_shard(shard) for shard in collection.shards],
        recall=[encode_recall(estimate) for estimate in collection.recall],
    )


def _encode_shard(shard: ShardStatus) -> pb.ShardStatus:
    return pb.ShardStatus(
        shard=shard.shard,
        epoch=shard.position.epoch,
        seq=shard.position.seq,
        floor_slot=shard.floor_slot,
        manifest_version=shard.manifest_version,
        memtable_rows=shard.memtable_rows,
        segments=shard.segments,
        rows_live=shard.rows_live,
        replicas=[_encode_replica(replica, shard.shard) for replica in shard.replicas],
    )


def _encode_replica(replica: ReplicaStatus, shard: ShardNumber) -> pb.ReplicaStatus:
    return pb.ReplicaStatus(
        server=replica.server,
        role=pb.REPLICA_ROLE_PRIMARY if replica.primary else pb.REPLICA_ROLE_FOLLOWER,
        state=replica.state,
        position=types_pb2.ShardPosition(
            shard=shard, epoch=replica.position.epoch, seq=replica.position.seq
        ),
        lag_seq=replica.lag_seq,
        staleness_ms=replica.staleness_ms,
        rows=replica.rows,
        memory_bytes=replica.memory_bytes,
        mapped_bytes=replica.mapped_bytes,
        set_checksum=replica.set_checksum,
        reason=replica.reason,
        failures=replica.failures,
    )
