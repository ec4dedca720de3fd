"""What the cluster is meant to hold: collections, where replicas belong, who serves the bucket.

The catalog is a versioned object in the bucket (manifest/version_log.py). Shard safety never
depends on it: it says what should run, the manifests and logs say what is true.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shoal_cluster.bucket.envelope import EnvelopeKind
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Conflict
from shoal_cluster.domain.ids import CollectionId, IdGenerator, ServerId
from shoal_cluster.domain.keys import CATALOG_PREFIX
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.manifest.version_log import VersionLog

_COMMIT_ATTEMPTS_MAX = 20
REQUESTS_REMEMBERED = 256
VERSIONS_KEPT = 20
"""Old catalogs kept for people; none is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The cluster process group that serves the bucket. address: its gRPC address, to ask it.

    host: the machine that address is meant on (control/ownership.py).
    """

    incarnation: str
    address: str
    since_ms: int
    host: str

    def to_wire(self) -> list[Any]:
        return [self.incarnation, self.address, self.since_ms, self.host]

    @staticmethod
    def from_wire(fields: list[Any]) -> "Owner":
        incarnation, address, since_ms, host = fields
        return Owner(incarnation=incarnation, address=address, since_ms=since_ms, host=host)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionRecord:
    """assignment: per shard, the servers that should hold a replica, preferred primary first.

    Empty while the collection is being created: its shards may not exist yet.
    """

    schema: CollectionSchema
    assignment: tuple[tuple[ServerId, ...], ...]

    @property
    def is_created(self) -> bool:
        return bool(self.assignment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """dropped: collections whose objects are still to be deleted. requests: the last requests that
    changed the catalog, so that a retry is recognised after a restart too.
    """

    owner: Owner | None = None
    collections: Mapping[CollectionId, CollectionRecord] = field(default_factory=dict)
    dropped: tuple[CollectionId, ...] = ()
    requests: tuple[RequestName, ...] = ()

    def with_request(self, name: RequestName) -> "Catalog":
        return replace(self, requests=(*self.requests, name)[-REQUESTS_REMEMBERED:])

    def by_name(self, name: str) -> CollectionRecord | None:
        for record in self.collections.values():
            if record.schema.name == name:
                return record
        return None

    def with_record(self, record: CollectionRecord) -> "Catalog":
        return replace(self, collections={**self.collections, record.schema.id: record})

    @property
    def unfinished(self) -> tuple[CollectionRecord, ...]:
        """The collections that are being created."""
        return tuple(record for record in self.collections.values() if not record.is_created)

    def without(self, collection: CollectionId) -> "Catalog":
        rest = {key: record for key, record in self.collections.items() if key != collection}
        return replace(self, collections=rest, dropped=(*self.dropped, collection))

    def to_wire(self) -> dict[str, Any]:
        owner = self.owner
        return {
            "owner": None if owner is None else owner.to_wire(),
            "collections": [
                {
                    "schema": record.schema.to_wire(),
                    "assignment": [list(servers) for servers in record.assignment],
                }
                for record in self.collections.values()
            ],
            "dropped": list(self.dropped),
            "requests": [list(name) for name in self.requests],
        }

    @staticmethod
    def from_wire(fields: Mapping[str, Any]) -> "Catalog":
        owner = fields["owner"]
        records = [
            CollectionRecord(
                schema=CollectionSchema.from_wire(entry["schema"]),
                assignment=tuple(tuple(servers) for servers in entry["assignment"]),
            )
            for entry in fields["collections"]
        ]
        return Catalog(
            owner=None if owner is None else Owner.from_wire(owner),
            collections={record.schema.id: record for record in records},
            dropped=tuple(fields["dropped"]),
            requests=tuple(RequestName(*name) for name in fields["requests"]),
        )


class CatalogLog:
    """Reads and changes the catalog. One controller changes it; races are settled by the bucket."""

    def __init__(self, store: Store, clock: Clock, ids: IdGenerator) -> None:
        self._ids = ids
        self._versions = VersionLog(
            store,
            versions=f"{CATALOG_PREFIX}v/",
            floors=f"{CATALOG_PREFIX}floor/",
            kind=EnvelopeKind.CATALOG,
            floor_kind=EnvelopeKind.CATALOG_FLOOR,
            clock=clock,
        )

    async def read(self) -> Catalog:
        """Returns the newest catalog, an empty one before the first change."""
        version = await self._versions.newest()
        return Catalog() if version is None else Catalog.from_wire(version.fields)

    async def update(self, change: Callable[[Catalog], Catalog]) -> Catalog:
        """Applies a pure change to the newest catalog and commits it; retried when overtaken.

        `change` may raise to refuse; nothing is written then.

        Raises: Conflict when the catalog changes faster than it can be followed.
        """
        for _ in range(_COMMIT_ATTEMPTS_MAX):
            version = await self._versions.newest()
            current = Catalog() if version is None else Catalog.from_wire(version.fields)
            changed = change(current)
            if changed == current:
                return current
            number = 0 if version is None else version.number + 1
            if await self._versions.commit(number, self._ids.put_id(), changed.to_wire()):
                if number % VERSIONS_KEPT == 0:
                    await self._versions.collect(number - VERSIONS_KEPT, self._ids.put_id())
                return changed
        raise Conflict(
            f"the catalog was changed by others {_COMMIT_ATTEMPTS_MAX} times in a row; "
            "nothing was applied"
        )
