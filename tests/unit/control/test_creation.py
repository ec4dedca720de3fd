"""Creating a collection, step by step: whatever dies in between, nothing in the bucket is lost."""

import asyncio
from dataclasses import replace

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.control.catalog import CollectionRecord
from shoal_cluster.control.controller import ControlLoop
from shoal_cluster.control.owned_catalog import OwnedCatalog
from shoal_cluster.control.reconcile import CloseReplica, OpenReplica, Promote, SetFollowers, diff
from shoal_cluster.domain.errors import AlreadyExists
from shoal_cluster.domain.ids import Epoch
from shoal_cluster.domain.keys import CATALOG_PREFIX, COLLECTIONS_PREFIX
from shoal_cluster.domain.request import RequestName
from shoal_cluster.shard.checking import check_bucket
from tests.unit.control.test_controller import (
    SERVERS,
    FakeAudience,
    FakeServers,
    a_loop,
    a_replica,
    stop,
)
from tests.unit.shard.nodes import SCHEMA, run

SHARDS = 3
WANTED = replace(SCHEMA, shards=SHARDS, replicas=1)
REQUEST, DROP = RequestName("client", 1), RequestName("client", 2)


class ManyShards(FakeServers):
    """As FakeServers, for more shards than one."""

    async def carry_out(self, command):
        report = self.reports[command.server]
        match command:
            case OpenReplica():
                kept = (*self._others(command, command.schema.id), a_replica(command))
            case CloseReplica():
                kept = self._others(command, command.collection)
            case Promote():
                self.epoch += 1
                kept = tuple(
                    replace(replica, leads=True, epoch=Epoch(self.epoch))
                    if replica.shard == command.shard
                    else replica
                    for replica in report.replicas
                )
            case SetFollowers():
                return
        self.reports[command.server] = replace(report, replicas=kept)

    def _others(self, command, collection):
        return tuple(
            replica
            for replica in self.reports[command.server].replicas
            if (replica.collection, replica.shard) != (collection, command.shard)
        )


class DyingStore(MemoryStore):
    """Ends its process at the nth put: before it, or after it with the reply unseen."""

    def __init__(self, objects, at, *, after):
        super().__init__(objects)
        self._left = at
        self._after = after
        self.died = asyncio.Event()

    async def create(self, key, body):
        self._left -= 1
        if self._left == 0:
            if self._after:
                await super().create(key, body)
            self.died.set()
        await self._unless_dead()
        return await super().create(key, body)

    async def get(self, key):
        await self._unless_dead()
        return await super().get(key)

    async def list(self, prefix):
        await self._unless_dead()
        return await super().list(prefix)

    async def delete(self, key):
        await self._unless_dead()
        await super().delete(key)

    async def _unless_dead(self):
        if self.died.is_set():
            await asyncio.Event().wait()


class HeldStore(MemoryStore):
    """First manifests wait until `go`."""

    def __init__(self, objects):
        super().__init__(objects)
        self.go = asyncio.Event()
        self.asked = asyncio.Event()

    async def create(self, key, body):
        if "/man/" in key:
            self.asked.set()
            await self.go.wait()
        return await super().create(key, body)


def of_collections(objects):
    return sorted(key for key in objects if key.startswith(COLLECTIONS_PREFIX))


def unlisted(objects, loop):
    """Returns the objects of collections that the catalog does not name."""
    named = {*loop.catalog.collections, *loop.catalog.dropped}
    return [key for key in of_collections(objects) if key.split("/")[1] not in named]


async def started(store) -> tuple[ControlLoop, asyncio.Future]:
    # No two processes over one bucket may make the same ids.
    loop = a_loop(ManyShards(), FakeAudience(), store, seed=len(store.objects))
    await loop.claim()
    return loop, asyncio.ensure_future(loop.run())


async def crash_at(objects, at, *, after):
    """Has a creation die at its nth put; False when it takes fewer."""
    loop, running = await started(MemoryStore(objects))
    await stop(running)
    loop._owned._store = store = DyingStore(objects, at, after=after)
    loop._owned._catalog_log._versions._store = store
    running = asyncio.ensure_future(loop.run())
    creating = asyncio.ensure_future(loop.create_collection(WANTED, REQUEST))
    dying = asyncio.ensure_future(store.died.wait())
    await asyncio.wait((creating, dying), return_when=asyncio.FIRST_COMPLETED)
    died = store.died.is_set()
    store.died.set()  # nothing that is left over reaches the bucket
    for task in (creating, dying):
        task.cancel()
    await asyncio.gather(creating, dying, return_exceptions=True)
    await stop(running)
    return died


async def crash_everywhere(check):
    """Calls check(objects, what) with what every crash leaves; returns the number of puts."""
    at = 1
    while True:
        for after in (False, True):
            objects = {}
            if not await crash_at(objects, at, after=after):
                return at - 1
            await check(objects, f"put {at}, after={after}")
        at += 1


def test_a_creation_that_died_anywhere_is_finished_by_the_next_controller():
    async def scenario():
        async def check(objects, what):
            begun = [key for key in objects if key.startswith(f"{CATALOG_PREFIX}v/")]
            loop, running = await started(MemoryStore(objects))
            await asyncio.sleep(10)
            assert not unlisted(objects, loop) and not loop.catalog.unfinished, what
            manifests = of_collections(objects)
            assert len(manifests) in (0, SHARDS), what
            assert bool(manifests) == (len(begun) > 1), what
            created = await loop.create_collection(WANTED, REQUEST)
            assert len(of_collections(objects)) == SHARDS, what
            assert loop.topology.collections[created.name].schema == created
            with pytest.raises(AlreadyExists):
                await loop.create_collection(WANTED, DROP)
            await loop.drop_collection(created.name, DROP)
            await asyncio.sleep(10)
            assert of_collections(objects) == [] and loop.catalog.dropped == (), what
            await stop(running)

        # The catalog, the first manifests, the catalog.
        assert await crash_everywhere(check) == 1 + SHARDS + 1

    run(scenario())


def test_first_manifests_before_the_catalog_would_be_caught_here(monkeypatch):
    create = OwnedCatalog.create

    async def manifests_first(self, schema, request):
        await self._make_shards(replace(schema, id="e" * 32))
        return await create(self, schema, request)

    async def scenario():
        leaks = []

        async def check(objects, what):
            loop, running = await started(MemoryStore(objects))
            await asyncio.sleep(10)
            leaks.extend(unlisted(objects, loop))
            await stop(running)

        with monkeypatch.context() as broken:
            broken.setattr(OwnedCatalog, "create", manifests_first)
            await crash_everywhere(check)
        assert leaks

    run(scenario())


def test_a_collection_is_opened_and_published_only_once_its_shards_exist():
    async def scenario():
        objects = {}
        loop, running = await started(store := HeldStore(objects))
        creating = asyncio.ensure_future(loop.create_collection(WANTED, REQUEST))
        await store.asked.wait()
        await asyncio.sleep(10)
        assert loop.catalog.by_name(WANTED.name) is not None, "its name is taken"
        assert loop.topology.collections == {} and diff(loop.catalog, loop.reports) == []
        store.go.set()
        created = await creating
        assert len(loop.topology.collections[created.name].shards) == SHARDS
        assert {len(servers) for servers in loop.catalog.collections[created.id].assignment} == {1}
        await stop(running)

    run(scenario())


def test_a_collection_dropped_while_it_is_made_leaves_nothing():
    async def scenario():
        objects = {}
        loop, running = await started(store := HeldStore(objects))
        creating = asyncio.ensure_future(loop.create_collection(WANTED, REQUEST))
        await store.asked.wait()
        await loop.drop_collection(WANTED.name, DROP)
        await asyncio.sleep(10)
        assert len(loop.catalog.dropped) == 1, "not deleted while it is still being made"
        store.go.set()
        await asyncio.sleep(10)
        assert of_collections(objects) == [] and loop.catalog.dropped == ()
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        await stop(running)

    run(scenario())


def test_a_slow_controller_cleans_up_what_it_made_of_a_collection_dropped_by_another():
    async def scenario():
        objects = {}
        slow, slow_running = await started(store := HeldStore(objects))
        creating = asyncio.ensure_future(slow.create_collection(WANTED, REQUEST))
        await store.asked.wait()
        other, running = await started(MemoryStore(objects))
        await other.create_collection(WANTED, REQUEST)
        await other.drop_collection(WANTED.name, DROP)
        await asyncio.sleep(10)
        assert of_collections(objects) == [] and other.catalog.dropped == ()
        store.go.set()
        await asyncio.sleep(20)
        assert of_collections(objects) == [] and other.catalog.dropped == ()
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        await stop(slow_running)
        await stop(running)

    run(scenario())


def test_check_notes_a_collection_that_is_being_created():
    async def scenario():
        objects = {}
        loop, running = await started(store := HeldStore(objects))
        creating = asyncio.ensure_future(loop.create_collection(WANTED, REQUEST))
        await store.asked.wait()
        report = await check_bucket(MemoryStore(objects), deep=False, progress=lambda *_: None)
        assert {problem.key for problem in report.problems} == {"cluster"}, "there is no such here"
        assert any("is being created" in note for note in report.notes)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        await stop(running)

    run(scenario())


def test_placing_leaves_alone_what_is_being_created():
    async def scenario():
        loop, running = await started(MemoryStore())
        await stop(running)
        record = CollectionRecord(schema=WANTED, assignment=())
        await loop._owned.update(lambda catalog: catalog.with_record(record))
        await loop._owned.refresh()
        assert loop.catalog.unfinished == (record,)
        await loop._owned.finish_creating()
        (created,) = loop.catalog.collections.values()
        assert created.is_created and {*created.assignment[0]} <= {*SERVERS}
        assert loop._owned.creating == set()

    run(scenario())
