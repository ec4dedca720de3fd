"""What a shard needs from outside, injected: the same code runs in actors and in simulation."""

from dataclasses import dataclass
from typing import Protocol

from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.ids import IdGenerator, Slot
from shoal_cluster.shard.building import Builds
from shoal_cluster.shard.compute import Compute
from shoal_cluster.shard.segment_files import SegmentFiles


class Publisher(Protocol):
    """Tells a shard's followers what became durable. Best effort: followers also poll."""

    def record(self, slot: Slot, body: bytes) -> None:
        """Sends a WAL record that is durable."""
        ...

    def manifest(self) -> None:
        """Says that a newer manifest was committed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPorts:
    """compute: where searches run, search_workers of them at once. background: where work runs that
    searches must not wait for."""

    store: Store
    clock: Clock
    ids: IdGenerator
    compute: Compute
    search_workers: int
    background: Compute
    files: SegmentFiles
    builds: Builds
    cluster_uuid: bytes
