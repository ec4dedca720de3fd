"""Which servers should hold which replicas. Pure and deterministic.

Replicas of a shard go to different servers, to different nodes while there are enough, and each new
replica to the server that holds the fewest. What is placed stays placed: only servers that are no
longer part of the cluster are replaced.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from shoal_cluster.control.catalog import Catalog, CollectionRecord
from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import CollectionId, ServerId

Assignment = tuple[tuple[ServerId, ...], ...]


def require_servers(replicas: int, servers: int) -> None:
    """Raises InvalidRequest when a shard cannot have so many replicas on servers of their own."""
    if replicas > servers:
        raise InvalidRequest(
            f"{replicas} replicas need as many servers, the cluster has {servers}; ask for fewer, "
            "or start it with more (`shoal up --servers`)",
            field="replicas",
            limit=f"{servers} servers",
        )


def place(
    record: CollectionRecord,
    servers: Mapping[ServerId, str],
    load: Counter[ServerId],
    leaders: Counter[ServerId],
) -> Assignment:
    """Returns the assignment of a collection, keeping what can stay.

    servers: every server of the cluster and the node it is on. load: replicas per server so far,
    leaders: preferred primaries per server so far; both are updated. A cluster that came back with
    fewer servers than a collection has replicas places what it can, and `status` shows what lacks.
    """
    wanted = min(record.schema.replicas, len(servers))
    assignment = []
    for shard in range(record.schema.shards):
        before = record.assignment[shard] if shard < len(record.assignment) else ()
        kept = [server for server in before if server in servers][:wanted]
        load.update(kept)
        while len(kept) < wanted:
            kept.append(_next_server(kept, servers, load))
            load[kept[-1]] += 1
        if not before:
            # The preferred primary goes where the fewest are, so that writes spread too.
            kept.sort(key=lambda server: (leaders[server], server))
        leaders[kept[0]] += 1
        assignment.append(tuple(kept))
    return tuple(assignment)


def _next_server(
    taken: Sequence[ServerId], servers: Mapping[ServerId, str], load: Counter[ServerId]
) -> ServerId:
    nodes = {servers[server] for server in taken}
    candidates: Iterable[ServerId] = (server for server in servers if server not in taken)
    return min(candidates, key=lambda server: (servers[server] in nodes, load[server], server))


def place_all(
    catalog: Catalog, servers: Mapping[ServerId, str], created: CollectionId | None = None
) -> Catalog:
    """Returns the catalog with every collection placed on the servers there are.

    created: one whose shards exist by now; others that are being created are left alone.
    """
    load: Counter[ServerId] = Counter()
    leaders: Counter[ServerId] = Counter()
    for record in catalog.collections.values():
        if not record.is_created and record.schema.id != created:
            continue
        placed = CollectionRecord(
            schema=record.schema, assignment=place(record, servers, load, leaders)
        )
        if placed != record:
            catalog = catalog.with_record(placed)
    return catalog
