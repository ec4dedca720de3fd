"""What servers report of themselves, for the controller and for status. Pure values."""

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from shoal_cluster.domain.ids import (
    CollectionId,
    Epoch,
    ManifestVersion,
    Seq,
    ServerId,
    ShardNumber,
    Slot,
)
from shoal_cluster.domain.recall import RecallEstimate


class ReplicaState(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """One replica. sum: set checksum of its live rows at (epoch, seq); equal on equal positions.

    memory_bytes: resident; mapped_bytes: mapped files, resident as the page cache pleases.
    appends, operations: since the replica became primary. reason: what is wrong with it, or fails
    in its background; failures: how often in a row. recall: what sampled searches reach.
    """

    collection: CollectionId
    shard: ShardNumber
    state: ReplicaState
    reason: str
    leads: bool
    epoch: Epoch
    seq: Seq
    slot: Slot
    schema_version: int
    manifest_version: ManifestVersion
    floor_slot: Slot
    live_rows: int
    unsealed_rows: int
    segments: int
    sum: int
    memory_bytes: int
    mapped_bytes: int
    appends: int
    operations: int
    sealing: bool
    failures: int = 0
    recall: tuple[RecallEstimate, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in _REPLICA_FIELDS},
            "state": self.state.value,
            "recall": [estimate.to_wire() for estimate in self.recall],
        }

    @staticmethod
    def from_wire(fields: Mapping[str, Any]) -> "ReplicaReport":
        return ReplicaReport(
            **{
                **fields,
                "state": ReplicaState(fields["state"]),
                "recall": tuple(RecallEstimate.from_wire(each) for each in fields["recall"]),
            }
        )


_REPLICA_FIELDS = tuple(field.name for field in fields(ReplicaReport))
"""`asdict` copies every value deeply: 20 µs a replica, of all that a server holds, three times a
second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReport:
    """The machine a server runs on. address: as Ray knows it; "" where nobody asked."""

    address: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    memory_used_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """One shard server. incarnation changes with every process that carries the server's name.

    followers: per led shard "collection/shard", the link addresses it pushes to.
    """

    server: ServerId
    incarnation: str
    address: str
    node: str
    pid: int
    memory_bytes: int
    started_ms: int
    replicas: tuple[ReplicaReport, ...]
    followers: Mapping[str, tuple[str, ...]]
    machine: MachineReport = MachineReport()

    def to_wire(self) -> dict[str, Any]:
        return {
            "server": self.server,
            "incarnation": self.incarnation,
            "address": self.address,
            "node": self.node,
            "pid": self.pid,
            "memory_bytes": self.memory_bytes,
            "started_ms": self.started_ms,
            "replicas": [replica.to_wire() for replica in self.replicas],
            "followers": {shard: list(to) for shard, to in self.followers.items()},
            "machine": asdict(self.machine),
        }

    @staticmethod
    def from_wire(fields: Mapping[str, Any]) -> "ServerReport":
        return ServerReport(
            server=fields["server"],
            incarnation=fields["incarnation"],
            address=fields["address"],
            node=fields["node"],
            pid=fields["pid"],
            memory_bytes=fields["memory_bytes"],
            started_ms=fields["started_ms"],
            replicas=tuple(ReplicaReport.from_wire(entry) for entry in fields["replicas"]),
            followers={shard: tuple(to) for shard, to in fields["followers"].items()},
            machine=MachineReport(**fields["machine"]),
        )
