"""Chooses the order in which a shard's replicas are tried. Pure."""

from collections.abc import Collection, Mapping

from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.session import Consistency
from shoal_cluster.domain.topology import ShardPlace


def order_replicas(
    place: ShardPlace,
    *,
    in_flight: Mapping[ServerId, int],
    failed_recently: Collection[ServerId],
    consistency: Consistency,
) -> tuple[ServerId, ...]:
    """Returns the servers of a shard, best first, each once.

    Servers that failed recently come last (not never: they may be all there is). Then the fewest
    requests in flight from this coordinator. Ties go to the primary for session and strong reads,
    which it answers without waiting for its log; for eventual reads they rotate by shard number,
    so that the shards of one collection do not all prefer the same server.
    """
    replicas = place.replicas
    if len(replicas) == 1:
        return replicas
    turn = place.shard % len(replicas) if replicas else 0
    rotated = replicas[turn:] + replicas[:turn]
    primary = None if consistency is Consistency.EVENTUAL else place.primary
    return tuple(
        sorted(
            rotated,
            key=lambda server: (
                server in failed_recently,
                in_flight.get(server, 0),
                server != primary,
            ),
        )
    )
