"""Where every shard is right now. Published by the controller, read by coordinators. Pure values.

A topology is a hint: it may be old. Only the bucket decides who is primary, so a write sent by an
old topology is refused by the replica it reaches (NotPrimary), never misapplied.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.domain.ids import Epoch, ServerId, ShardNumber
from shoal_cluster.domain.schema import CollectionSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlace:
    """One shard's replicas. primary is None while a takeover is under way.

    replicas: servers that hold a loaded replica, the primary included, in a fixed order.
    """

    shard: ShardNumber
    primary: ServerId | None
    epoch: Epoch
    replicas: tuple[ServerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionPlace:
    """shards: by shard number, every one present. Rows go to a shard by domain/partition.py."""

    schema: CollectionSchema
    shards: tuple[ShardPlace, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """servers: link address of each live server, `unix:/path` or `tcp:host:port`."""

    version: int
    cluster_uuid: bytes
    servers: Mapping[ServerId, str] = field(default_factory=dict)
    collections: Mapping[str, CollectionPlace] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "cluster_uuid": self.cluster_uuid,
            "servers": dict(self.servers),
            "collections": [
                {
                    "schema": place.schema.to_wire(),
                    "shards": [
                        [shard.primary, shard.epoch, list(shard.replicas)] for shard in place.shards
                    ],
                }
                for place in self.collections.values()
            ],
        }

    @staticmethod
    def from_wire(fields: Mapping[str, Any]) -> "Topology":
        collections = {}
        for place in fields["collections"]:
            schema = CollectionSchema.from_wire(place["schema"])
            shards = tuple(
                ShardPlace(
                    shard=ShardNumber(number),
                    primary=primary,
                    epoch=epoch,
                    replicas=tuple(replicas),
                )
                for number, (primary, epoch, replicas) in enumerate(place["shards"])
            )
            collections[schema.name] = CollectionPlace(schema=schema, shards=shards)
        return Topology(
            version=fields["version"],
            cluster_uuid=fields["cluster_uuid"],
            servers=fields["servers"],
            collections=collections,
        )


def require_topology(topology: Topology) -> None:
    """Refuses the empty topology a coordinator starts with: it does not say what exists.

    Raises: Unavailable (nothing was applied).
    """
    if topology.version == 0:
        raise Unavailable("this coordinator has not been told yet what there is; try again")
