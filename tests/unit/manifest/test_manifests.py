"""Manifests: what they say, what must hold of them, and how versions are committed."""

import asyncio
from dataclasses import replace

import pytest

from shoal_cluster.bucket.envelope import EnvelopeKind, encode
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Corrupt, Unavailable
from shoal_cluster.domain.ids import (
    CollectionId,
    Epoch,
    ManifestVersion,
    SegmentId,
    Seq,
    ShardNumber,
    Slot,
)
from shoal_cluster.domain.keys import ShardKeys, padded
from shoal_cluster.domain.limits import LOADS_MAX, LOADS_REMEMBERED
from shoal_cluster.manifest import invariants
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.manifest.manifest import FileEntry, Manifest, SegmentEntry

KEYS = ShardKeys(CollectionId("c" * 32), ShardNumber(0))


def put_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def file(name: str) -> FileEntry:
    return FileEntry(name=name, key=f"{KEYS.segments}x/{name}", size_bytes=1, sha256="0" * 64)


SEGMENT = SegmentEntry(
    id=SegmentId(f"{2:020d}-000001-abcdef01"),
    files=(file("vectors"), file("meta")),
    rows=10,
    min_seq=Seq(3),
    max_seq=Seq(30),
    tombstones=file("tombstones-1"),
    dead=2,
    sum=77,
)
MANIFEST = Manifest(
    version=ManifestVersion(4),
    parent_put_id=put_id(3),
    put_id=put_id(4),
    epoch=Epoch(2),
    floor_slot=Slot(9),
    floor_epoch=Epoch(2),
    floor_seq=Seq(30),
    floor_put_id=put_id(99),
    segments=(SEGMENT,),
    dedup=[0, [["client", 1, 0, 0, 9, [[1, 1, 3, 1, 3, False, 9]]]]],
    schema_version=1,
    sum=77,
)


def test_a_manifest_comes_back_as_it_went():
    again = Manifest.from_wire(4, MANIFEST.put_id, MANIFEST.to_wire())
    assert again == MANIFEST
    assert SEGMENT.live == 8


def test_a_sound_manifest_keeps_all_invariants():
    """M-1 to M-7."""
    assert invariants.violations(MANIFEST) == []


@pytest.mark.parametrize(
    ("invariant", "broken"),
    [
        ("M-1", replace(MANIFEST, sum=78)),
        ("M-2", replace(MANIFEST, segments=(replace(SEGMENT, dead=0),))),
        ("M-2", replace(MANIFEST, segments=(replace(SEGMENT, tombstones=None),))),
        ("M-2", replace(MANIFEST, segments=(replace(SEGMENT, dead=11),))),
        ("M-3", replace(MANIFEST, epoch=Epoch(1), floor_epoch=Epoch(1))),
        ("M-3", replace(MANIFEST, segments=(SEGMENT, SEGMENT), sum=154)),
        ("M-4", replace(MANIFEST, floor_seq=Seq(29))),
        ("M-4", replace(MANIFEST, segments=(replace(SEGMENT, min_seq=Seq(31)),))),
        ("M-6", replace(MANIFEST, floor_epoch=Epoch(3))),
        ("M-7", replace(MANIFEST, loads=("a", "b", "a"))),
        ("M-7", replace(MANIFEST, loads=tuple(map(str, range(LOADS_REMEMBERED + LOADS_MAX + 1))))),
    ],
)
def test_a_broken_invariant_is_named(invariant, broken):
    assert [line[:3] for line in invariants.violations(broken)] == [invariant]
    with pytest.raises(Corrupt, match=invariant):
        invariants.require(broken, None, where="here")


def child_of(parent: Manifest, **changes: object) -> Manifest:
    return replace(
        parent,
        version=ManifestVersion(parent.version + 1),
        parent_put_id=parent.put_id,
        put_id=put_id(parent.version + 1),
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "broken",
    [
        {"version": ManifestVersion(6)},
        {"parent_put_id": put_id(8)},
        {"epoch": Epoch(1)},
        {"floor_slot": Slot(8)},
        {"floor_seq": Seq(29)},
    ],
)
def test_a_step_that_goes_back_is_refused(broken):
    """M-5."""
    assert invariants.step_violations(MANIFEST, child_of(MANIFEST)) == []
    child = replace(child_of(MANIFEST), **broken)
    assert [line[:3] for line in invariants.step_violations(MANIFEST, child)] == ["M-5"]


def manifests(store: MemoryStore) -> Manifests:
    return Manifests(store, KEYS, SystemClock())


async def first(store: MemoryStore) -> Manifest:
    await manifests(store).create_first()
    newest = await manifests(store).newest()
    assert newest is not None
    return newest


def test_an_empty_shard_is_created_once_by_however_many():
    async def scenario():
        store = MemoryStore()
        assert await manifests(store).newest() is None
        await asyncio.gather(*(manifests(store).create_first() for _ in range(5)))
        newest = await manifests(store).newest()
        assert (newest.version, newest.epoch, newest.floor_slot, newest.segments) == (0, 0, 0, ())
        assert len(store.objects) == 1

    asyncio.run(scenario())


def test_of_two_commits_of_one_version_one_wins():
    async def scenario():
        store = MemoryStore()
        root = await first(store)
        claims = [replace(child_of(root), put_id=put_id(n), epoch=Epoch(1)) for n in (7, 8, 9)]
        won = await asyncio.gather(*(manifests(store).commit(root, claim) for claim in claims))
        assert sorted(won) == [False, False, True]
        newest = await manifests(store).newest()
        assert newest == claims[won.index(True)]

    asyncio.run(scenario())


def test_a_step_that_breaks_an_invariant_writes_nothing():
    async def scenario():
        store = MemoryStore()
        root = await first(store)
        with pytest.raises(Corrupt, match="M-1"):
            await manifests(store).commit(root, child_of(root, sum=1))
        assert len(store.objects) == 1

    asyncio.run(scenario())


def test_a_version_created_in_place_of_a_collected_one_is_a_conflict():
    """The boundary check: without it a stalled claimant would take a burned version for its own."""

    async def scenario():
        store = MemoryStore()
        root = await first(store)
        stalled = child_of(root, epoch=Epoch(1))
        parent = root
        for number in range(1, 6):
            child = replace(child_of(parent, epoch=Epoch(2)), put_id=put_id(100 + number))
            assert await manifests(store).commit(parent, child)
            parent = child
        deleted = await manifests(store).versions.collect(5, put_id(50))
        assert [key.rsplit("/", 1)[1] for key in deleted] == [padded(n) for n in range(5)]
        assert not await manifests(store).commit(root, stalled)
        assert (await manifests(store).newest()).version == 5
        # A later collection moves the marker and removes the stray version as well.
        await manifests(store).versions.collect(5, put_id(51))
        stored = sorted(key.removeprefix(KEYS.prefix) for key in store.objects)
        assert stored == [f"floor/{padded(4)}", f"man/{padded(5)}"] or stored == [
            f"floor/{padded(1)}",
            f"floor/{padded(4)}",
            f"man/{padded(5)}",
        ]
        assert await manifests(store).versions.floor() == 4

    asyncio.run(scenario())


def test_a_version_that_is_collected_between_list_and_get_is_looked_for_again():
    class Collecting(MemoryStore):
        async def get(self, key: str) -> bytes | None:
            if key.endswith(padded(1)):
                self.objects.pop(key, None)
            return await super().get(key)

    async def scenario():
        store = Collecting()
        root = await first(store)
        child = child_of(root, epoch=Epoch(1))
        await manifests(store).commit(root, child)
        await manifests(store).commit(child, child_of(child))
        assert (await manifests(store).newest()).version == 2
        del store.objects[f"{KEYS.manifests}{padded(2)}"]
        store.objects[f"{KEYS.manifests}{padded(1)}"] = b"listed, and gone when asked for"
        assert (await manifests(store).newest()).version == 0

    asyncio.run(scenario())


def test_versions_that_always_vanish_are_not_waited_for_for_ever():
    class Vanishing(MemoryStore):
        async def get(self, key: str) -> bytes | None:
            return None

    async def scenario():
        store = Vanishing({f"{KEYS.manifests}{padded(3)}": b"?"})
        with pytest.raises(Unavailable, match="vanished"):
            await manifests(store).newest()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("man/not-a-number", b"?"),
        (f"man/{padded(1)}", b"?"),
        (f"man/{padded(1)}", encode(EnvelopeKind.MANIFEST, {"version": 2, "put_id": put_id(1)})),
        (f"man/{padded(1)}", encode(EnvelopeKind.MANIFEST, {"version": 1, "put_id": put_id(1)})),
        (f"man/{padded(1)}", encode(EnvelopeKind.CATALOG, {"version": 1, "put_id": put_id(1)})),
    ],
)
def test_an_object_that_is_no_manifest_is_corrupt_by_name(name, body):
    async def scenario():
        store = MemoryStore()
        await first(store)
        store.objects[KEYS.prefix + name] = body
        with pytest.raises(Corrupt, match=name):
            await manifests(store).newest()

    asyncio.run(scenario())
