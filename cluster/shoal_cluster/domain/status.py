"""The state of the cluster as an operator sees it. Pure values; the controller fills them in."""

from dataclasses import dataclass

from shoal_cluster.domain.ids import ServerId, ShardNumber
from shoal_cluster.domain.recall import RecallEstimate
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import ORIGIN, Position


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """A machine. state: alive, suspect or dead."""

    id: str
    address: str
    state: str
    cpus: int = 0
    memory_bytes: int = 0
    memory_used_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorStatus:
    """A process. kind: coordinator, shard_server, controller or builder.

    state: starting, ready, suspect, draining or dead. node: NodeStatus.id. address: where it takes
    requests (gRPC for a coordinator, its link for others).
    """

    id: str
    kind: str
    pid: int
    node: str
    state: str
    memory_bytes: int = 0
    address: str = ""
    uptime_ms: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One copy of a shard. state: opening, ready, lagging, failed or closing.

    lag_seq: operations behind the primary. set_checksum: sum of its live rows' hashes modulo 2**64;
    replicas at equal positions must have equal sums. reason: what is wrong with it, or fails in its
    background, failures times in a row. memory_bytes: held; mapped_bytes: of mapped files, kept in
    memory as the page cache pleases.
    """

    server: ServerId
    primary: bool
    state: str
    position: Position = ORIGIN
    lag_seq: int = 0
    staleness_ms: int = 0
    rows: int = 0
    memory_bytes: int = 0
    mapped_bytes: int = 0
    set_checksum: int = 0
    reason: str = ""
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """position: the primary's. memtable_rows: visible and not yet indexed."""

    shard: ShardNumber
    position: Position = ORIGIN
    floor_slot: int = 0
    manifest_version: int = 0
    memtable_rows: int = 0
    segments: int = 0
    rows_live: int = 0
    replicas: tuple[ReplicaStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionStatus:
    """rows_live: as the shards last reported. recall: what searches of all replicas reach."""

    schema: CollectionSchema
    rows_live: int = 0
    shards: tuple[ShardStatus, ...] = ()
    recall: tuple[RecallEstimate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """version, cluster_uuid and uptime_ms are those of the coordinator that answers.

    age_ms: how old the controller's report is. bucket: without credentials.
    """

    version: str
    cluster_uuid: str
    uptime_ms: int
    bucket: str
    nodes: tuple[NodeStatus, ...] = ()
    actors: tuple[ActorStatus, ...] = ()
    collections: tuple[CollectionStatus, ...] = ()
    age_ms: int = 0
