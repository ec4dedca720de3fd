"""The catalog in the hands of the cluster that owns the bucket: claimed, read again, changed.

Every change is a pure function of the newest catalog, refused when another cluster has taken the
bucket over. A request that changed the catalog is remembered in it, so that it changes nothing
when it is sent again.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import structlog

from shoal_cluster.bucket.store import Store
from shoal_cluster.control.catalog import Catalog, CatalogLog, CollectionRecord, Owner
from shoal_cluster.control.placement import place_all, require_servers
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import AlreadyExists, Conflict, NotFound, Unavailable
from shoal_cluster.domain.ids import CollectionId, IdGenerator, ServerId, ShardNumber
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema, validate_schema
from shoal_cluster.domain.schema_change import SchemaChange, apply_change
from shoal_cluster.manifest.commit import Manifests

_log = structlog.get_logger()

CATALOG_REREAD_S = 5.0
"""How long a controller may act on a catalog that another one has changed. Two live at once while
one that froze has been replaced; without this the old one would for ever open what was dropped and
close what was created."""

CLAIM_RETRY_S = 0.3
"""Before a bucket that does not answer is claimed again; doubles up to CATALOG_REREAD_S."""

COLLECTIONS_MAX = 1000

SHARDS_MADE_AT_ONCE = 16
"""A thousand shards on a bucket that takes 100 ms a put are made in 13 s."""


class Deposed(Conflict):
    """Another cluster owns the bucket."""


class CatalogChange(Protocol):
    def __call__(self, catalog: Catalog, /) -> Catalog: ...


class OwnedCatalog:
    """placed: every server of the cluster and its node. on_change: called after each change."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        ids: IdGenerator,
        owner: Owner,
        placed: Callable[[], Mapping[ServerId, str]],
        on_change: Callable[[], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._owner = owner
        self._placed = placed
        self._on_change = on_change
        self._catalog_log = CatalogLog(store, clock, ids)
        # Two updates side by side may end in the other order than they were committed in; the
        # earlier catalog would then stay in memory.
        self._updating = asyncio.Lock()
        self._read_s = float("-inf")
        self.current = Catalog()
        self.creating: set[CollectionId] = set()
        """Collections whose shards are being made by this process."""

    async def claim(self) -> None:
        """Makes this cluster the bucket's owner. Whether the former one lives is checked before.

        Raises: Conflict, Unavailable.
        """
        delay_s = CLAIM_RETRY_S
        while True:
            try:
                async with self._updating:
                    self.current = await self._catalog_log.update(
                        lambda catalog: replace(catalog, owner=self._owner)
                    )
                return
            except Unavailable as error:
                _log.warning("bucket_not_claimed", reason=error.message)
            await self._clock.sleep(delay_s)
            delay_s = min(2 * delay_s, CATALOG_REREAD_S)

    async def release(self) -> None:
        """Gives the bucket up, so that any machine may serve it. Call when nothing serves any more.

        Raises: Conflict when it is another cluster's already; Unavailable.
        """
        await self.update(lambda catalog: replace(catalog, owner=None))

    async def refresh(self) -> None:
        """Reads the catalog again when it is time to, and places what has to be placed anew.

        Raises: Deposed; Conflict, Unavailable when a placement could not be committed.
        """
        now_s = self._clock.monotonic_s()
        if now_s - self._read_s >= CATALOG_REREAD_S:
            self._read_s = now_s
            try:
                async with self._updating:
                    self.current = await self._catalog_log.read()
                self._require_ownership(self.current)
            except Unavailable as error:
                _log.warning("catalog_not_reread", reason=error.message)
        if place_all(self.current, self._placed()) != self.current:
            await self.update(lambda catalog: place_all(catalog, self._placed()))

    async def create(self, schema: CollectionSchema, request: RequestName) -> CollectionSchema:
        """Lists a collection; `finish_creating` makes its shards. `schema.id` is ignored.

        Raises: InvalidRequest; AlreadyExists unless `request` is the one that created it.
        """
        validate_schema(schema)
        if request in self.current.requests:
            return self.existing(schema.name)
        require_servers(schema.replicas, len(self._placed()))
        created = replace(schema, id=CollectionId(self._ids.hex(16)), version=1)

        def add(catalog: Catalog) -> Catalog:
            if request in catalog.requests:
                return catalog  # the same request, sent again, was faster
            _refuse_duplicate(catalog, created)
            return catalog.with_record(CollectionRecord(schema=created, assignment=()))

        await self.update(add, request)
        return self.existing(created.name)

    async def finish_creating(self) -> None:
        """Makes and places the shards of collections that are only listed, whoever listed them.

        Crash anywhere: the catalog still lists them, and whoever reads it next goes on.

        Raises: Deposed; Conflict, Unavailable.
        """
        for record in self.current.unfinished:
            collection = record.schema.id
            if collection not in self.current.collections:
                continue  # dropped while another was being made
            self.creating.add(collection)
            try:
                await self._make_shards(record.schema)
                await self.update(functools.partial(self._place_created, collection))
            finally:
                self.creating.discard(collection)

    async def _make_shards(self, schema: CollectionSchema) -> None:
        free = asyncio.Semaphore(SHARDS_MADE_AT_ONCE)

        async def make(shard: int) -> None:
            async with free:
                keys = ShardKeys(schema.id, ShardNumber(shard))
                await Manifests(self._store, keys, self._clock).create_first()

        made = await asyncio.gather(*map(make, range(schema.shards)), return_exceptions=True)
        for failure in made:
            if failure is not None:
                raise failure

    def _place_created(self, collection: CollectionId, catalog: Catalog) -> Catalog:
        if collection in catalog.collections:
            return place_all(catalog, self._placed(), created=collection)
        # Dropped meanwhile, and perhaps deleted before we made a shard: then it goes once more.
        if collection in catalog.dropped:
            return catalog
        return replace(catalog, dropped=(*catalog.dropped, collection))

    async def alter(self, change: SchemaChange, request: RequestName) -> CollectionSchema:
        """Raises: NotFound, InvalidRequest, Conflict."""

        def alter(catalog: Catalog) -> Catalog:
            record = _record_of(catalog, change.name)
            altered = replace(record, schema=apply_change(record.schema, change))
            return place_all(catalog.with_record(altered), self._placed())

        if request not in self.current.requests:
            if change.replicas is not None:
                require_servers(change.replicas, len(self._placed()))
            await self.update(alter, request)
        return self.existing(change.name)

    async def drop(self, name: str, request: RequestName) -> None:
        """Raises: NotFound unless `request` is the one that dropped it."""
        if request not in self.current.requests:
            await self.update(
                lambda catalog: catalog.without(_record_of(catalog, name).schema.id), request
            )

    async def forget_dropped(self, collection: CollectionId) -> None:
        """Notes that nothing is left of a dropped collection."""
        await self.update(
            lambda catalog: replace(
                catalog, dropped=tuple(name for name in catalog.dropped if name != collection)
            )
        )

    def existing(self, name: str) -> CollectionSchema:
        """Raises: NotFound."""
        return _record_of(self.current, name).schema

    async def update(self, change: CatalogChange, request: RequestName | None = None) -> None:
        """Commits a change to the newest catalog.

        Raises: Deposed; what `change` raises; Conflict, Unavailable.
        """

        def owned(catalog: Catalog) -> Catalog:
            self._require_ownership(catalog)
            changed = change(catalog)
            if request is None or request in changed.requests:
                return changed
            return changed.with_request(request)

        async with self._updating:
            self.current = await self._catalog_log.update(owned)
        self._on_change()

    def _require_ownership(self, catalog: Catalog) -> None:
        owner = catalog.owner
        if owner is None or owner.incarnation != self._owner.incarnation:
            raise Deposed(
                "another cluster has taken this bucket over "
                f"({'nobody' if owner is None else owner.address}); this one must be shut down"
            )


def _refuse_duplicate(catalog: Catalog, schema: CollectionSchema) -> None:
    if catalog.by_name(schema.name) is not None:
        raise AlreadyExists(
            f"collection {schema.name!r} exists already; drop it first or choose another name",
            field="name",
        )
    if len(catalog.collections) >= COLLECTIONS_MAX:
        raise Conflict(
            f"there are {len(catalog.collections)} collections already",
            limit=f"{COLLECTIONS_MAX} collections",
        )


def _record_of(catalog: Catalog, name: str) -> CollectionRecord:
    record = catalog.by_name(name)
    if record is None:
        known = ", ".join(sorted(entry.schema.name for entry in catalog.collections.values()))
        raise NotFound(
            f"there is no collection {name[:80]!r}; there are: {known or 'none'}",
            field="collection",
        )
    return record
