"""What `status` says of the collection under load."""

import shoal
from chaos.workloads.upserts import COLLECTION
from shoal_protos.v1.admin_pb2 import REPLICA_ROLE_PRIMARY


def leading_server(client: shoal.Client) -> str:
    (collection,) = client.status(COLLECTION).collections
    leaders = [
        replica.server
        for shard in collection.shards
        for replica in shard.replicas
        if replica.role == REPLICA_ROLE_PRIMARY
    ]
    return max(set(leaders), key=leaders.count)


def pid_of(client: shoal.Client, server: str) -> int:
    return next(actor.pid for actor in client.status().actors if actor.id == server)


def ready_replicas(client: shoal.Client, server: str | None) -> int:
    (collection,) = client.status(COLLECTION).collections
    return sum(
        replica.state == "ready" and server in (None, replica.server)
        for shard in collection.shards
        for replica in shard.replicas
    )


def replicas_agree(client: shoal.Client, name: str) -> bool:
    (collection,) = client.status(name).collections
    return all(
        len(shard.replicas) == 2
        and len({(r.position.seq, r.set_checksum) for r in shard.replicas}) == 1
        for shard in collection.shards
    )
