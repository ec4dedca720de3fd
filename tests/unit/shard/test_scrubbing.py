"""The scrubber: what is damaged under a running replica is found, named, never served, repaired."""

import asyncio

import numpy as np
import pytest

from shoal_cluster.domain.errors import Corrupt, Unavailable
from shoal_cluster.domain.ids import Slot
from shoal_cluster.domain.observation import ReplicaState
from shoal_cluster.index import cost_model
from shoal_cluster.segment import format as layout
from shoal_cluster.shard import host as hosting
from shoal_cluster.shard import scrubbing
from shoal_cluster.shard.calls import CountCall, GetCall, SearchCall
from shoal_cluster.shard.scrubbing import RECHECK_S, ROUND_S, SCRUB_BYTES_PER_S
from tests.unit.shard.in_place import flip
from tests.unit.shard.nodes import (
    KEYS,
    SCHEMA,
    SHARD,
    delete,
    ids,
    patch,
    points_of,
    upsert,
    vector,
)
from tests.unit.shard.served import (
    LEFT,
    NAME,
    Served,
    always_codes,
    assert_loads_elsewhere,
    scenario,
    settled,
)


@pytest.fixture(autouse=True)
def small_segments_have_codes(monkeypatch):
    monkeypatch.setattr(cost_model, "choose_family", always_codes)


def test_a_sound_shard_is_read_whole_and_slowly(tmp_path):
    """Z-3."""

    async def test(served: Served) -> None:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        assert await served.scrub() == [] and served.said() == ""
        (entry,) = served.replica.manifest.segments
        listed = sum(file.size_bytes for file in entry.files) + entry.tombstones.size_bytes
        tail = len(served.shard.objects[KEYS.slot(served.replica.state.slot)])
        read = served.host.scrubber.read_bytes
        assert read == listed + tail
        assert loop.time() - started_s == pytest.approx(read / SCRUB_BYTES_PER_S, rel=0.01)
        assert served.host.reports()[0].leads

    scenario(tmp_path, test)


@pytest.mark.parametrize("name", [layout.VECTORS, layout.IDS, layout.PAYLOAD])
def test_damaged_rows_put_the_replica_in_quarantine(tmp_path, name):
    """Z-1: a directory has no second copy, so it stays there until the object is put back."""

    async def test(served: Served) -> None:
        file = served.file(name)
        sound = served.shard.objects[file.key]
        served.damage(file.key)
        assert await served.scrub() == [file.key]
        report = served.host.reports()[0]
        assert report.state is ReplicaState.FAILED and not report.leads
        assert "put back from a copy" in report.reason
        for call in (
            served.host.count(CountCall(collection=SCHEMA.id, shard=SHARD)),
            served.host.get(GetCall(collection=SCHEMA.id, shard=SHARD, ids=ids(["p001"]))),
            served.host.search(
                SearchCall(collection=SCHEMA.id, shard=SHARD, k=3), vector(1).tobytes()
            ),
            served.write(upsert(9, {"late": 1})),
            served.host.promote(NAME),
        ):
            with pytest.raises(Unavailable):
                await call
        for _ in range(300):
            served.host.open(SCHEMA, SHARD)
            await asyncio.sleep(0.3)
            assert served.host.reports()[0].state is not ReplicaState.READY
        assert file.key in served.said() and "shoal check" in served.said()
        served.shard.objects[file.key] = sound
        await served.open()
        assert served.points() == LEFT

    scenario(tmp_path, test)


def test_opening_a_damaged_replica_backs_off(tmp_path, monkeypatch):
    """The controller asks three times a second for ever; a whole segment is read each time."""

    async def test(served: Served) -> None:
        loads = []
        load = hosting.Replica.load

        async def counted(self):
            loads.append(asyncio.get_running_loop().time())
            await load(self)

        monkeypatch.setattr(hosting.Replica, "load", counted)
        served.damage(served.file(layout.VECTORS).key)
        await served.scrub()
        for _ in range(6000):
            served.host.open(SCHEMA, SHARD)
            await asyncio.sleep(0.3)
        assert 30 < len(loads) < 40
        assert max(np.diff(loads)) < hosting.REOPEN_S_MAX + 1

    scenario(tmp_path, test)


@pytest.mark.parametrize("name", [layout.CODES, layout.META])
def test_a_damaged_file_that_can_be_derived_is_built_again_while_it_serves(tmp_path, name):
    async def test(served: Served) -> None:
        file = served.file(name)
        served.damage(file.key)
        assert await served.scrub() == [file.key]
        assert served.host.reports()[0].leads and served.points() == LEFT
        await settled(served)
        assert file.key not in {entry.key for entry in served.replica.manifest.segments[0].files}
        assert await served.scrub() == [] and served.said() == ""
        assert served.points() == LEFT and served.replica.manifest.segments[0].dead == 0
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test)


def test_damaged_attributes_stop_the_replica_and_are_built_again(tmp_path):
    """They are mapped, so the replica stops; it opens with its own copy, leads and repairs."""

    async def test(served: Served) -> None:
        file = served.file(layout.ATTRIBUTES)
        served.damage(file.key)
        assert await served.scrub() == [file.key]
        assert served.host.reports()[0].state is ReplicaState.FAILED
        await served.open()
        assert served.points() == LEFT
        await served.host.promote(NAME)
        await served.host.scrubber.visit_due()
        assert file.key in served.said()
        await settled(served)
        assert await served.scrub() == [] and served.said() == ""
        assert served.points() == LEFT
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test)


@pytest.mark.parametrize("name", [layout.CODES, layout.META, layout.ATTRIBUTES])
def test_a_shard_stopped_with_a_damaged_derived_file_starts_and_repairs_itself(tmp_path, name):
    async def test(served: Served) -> None:
        file = served.file(name)
        await served.host.close(NAME)
        served.damage(file.key)
        await served.open()
        assert served.points() == LEFT
        await served.host.promote(NAME)
        served.host.start_scrubbing()
        await asyncio.sleep(2 * ROUND_S)
        await settled(served)
        assert file.key not in {entry.key for entry in served.replica.manifest.segments[0].files}
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test)


def test_damaged_tombstones_are_written_again(tmp_path):
    async def test(served: Served) -> None:
        key = served.damage(served.file("tombstones").key)
        assert await served.scrub() == [key]
        await settled(served)
        assert served.file("tombstones").key != key
        assert await served.scrub() == [] and served.points() == LEFT
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test)


def test_a_damaged_manifest_is_committed_again(tmp_path):
    async def test(served: Served) -> None:
        version = served.replica.manifest.version
        key = served.damage(f"{KEYS.manifests}{version:020d}")
        assert await served.scrub() == [key]
        await settled(served)
        assert served.replica.manifest.version == version + 1
        assert await served.scrub() == [] and served.points() == LEFT
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test)


@pytest.mark.parametrize("kind", ["data", "fence"])
def test_a_damaged_slot_is_sealed_from_memory(tmp_path, kind):
    async def test(served: Served) -> None:
        if kind == "fence":
            await served.host.close(NAME)
            await served.open()
            await served.host.promote(NAME)
        await served.write(delete(4, "p001"))
        slot = Slot(served.replica.state.slot - 1)
        key = served.damage(KEYS.slot(slot))
        assert await served.scrub() == [key]
        # Later writes do not belong to what is sealed: they stay in the log.
        await served.write(upsert(5, {"new": 8.0}))
        await settled(served)
        assert served.replica.manifest.floor_slot >= slot
        expected = {**LEFT, "new": 8.0}
        del expected["p001"]
        assert served.points() == expected
        assert await served.scrub() == []
        await assert_loads_elsewhere(served, expected)

    scenario(tmp_path, test)


def test_a_follower_that_met_a_damaged_slot_goes_on_once_it_is_sealed(tmp_path):
    async def test(served: Served) -> None:
        follower = await served.shard.node(store=served.store).load()
        served.shard.network.connected = False
        await served.write(upsert(4, {"more": 1.0}))
        key = served.damage(KEYS.slot(served.replica.state.slot))
        with pytest.raises(Corrupt, match=key):
            await follower.replica.probe()
        await served.scrub()
        await settled(served)
        await follower.replica.probe()
        assert points_of(follower.replica) == {**LEFT, "more": 1.0}
        await follower.crash()

    scenario(tmp_path, test)


def test_a_damaged_cached_copy_is_fetched_again(tmp_path):
    async def test(served: Served) -> None:
        files = served.host._ports.files
        (entry,) = served.replica.manifest.segments
        vectors = next(file for file in files.local_files(entry) if file.entry.name == "vectors")
        assert vectors.fetched
        with vectors.path.open("r+b") as file:
            file.seek(100)
            file.write(b"\xff")
        await served.scrub()
        report = served.host.reports()[0]
        assert report.state is ReplicaState.FAILED and "fetched again" in report.reason
        await served.open()
        assert served.points() == LEFT
        await served.host.promote(NAME)
        assert await served.scrub() == [] and served.said() == ""

    scenario(tmp_path, test, in_place=False)


def test_a_damaged_copy_that_nobody_reads_is_only_removed(tmp_path):
    async def test(served: Served) -> None:
        (entry,) = served.replica.manifest.segments
        files = served.host._ports.files.local_files(entry)
        codes = next(file for file in files if file.entry.name == layout.CODES)
        codes.path.write_bytes(flip(codes.path.read_bytes(), 90))
        assert await served.scrub() == [] and served.host.reports()[0].leads
        assert not codes.path.exists()

    scenario(tmp_path, test, in_place=False)


def test_bytes_damaged_on_the_way_are_no_damage(tmp_path, monkeypatch):
    async def test(served: Served) -> None:
        get, flipped = served.store.get, []

        async def once(key):
            body = await get(key)
            if body is not None and key not in flipped:
                flipped.append(key)
                return flip(body, len(body) // 2)
            return body

        monkeypatch.setattr(served.store, "get", once)
        assert await served.scrub() == [] and served.said() == ""
        assert len(flipped) == 3  # manifest, tombstones, slot

    scenario(tmp_path, test)


def test_what_a_newer_manifest_has_replaced_is_not_called_damaged(tmp_path):
    """Z-2: a pass over a large shard takes hours, and the shard goes on meanwhile."""

    async def test(served: Served) -> None:
        served.hosted.primary._sealer._compact(served.replica.manifest.segments)
        await settled(served)
        await served.write(delete(7, "p002"))
        await served.seal()
        before = served.replica.manifest
        old = before.segments[0]
        served.hosted.primary._sealer._compact(before.segments)
        await settled(served)
        for file in (*old.files, old.tombstones):
            del served.shard.objects[file.key]
        del served.shard.objects[f"{KEYS.manifests}{before.version:020d}"]
        newest = served.replica.manifest
        served.replica.manifest = before
        found = [damage async for damage in served.host.scrubber.scrub(served.replica)]
        served.replica.manifest = newest
        assert found == []

    scenario(tmp_path, test)


def test_a_read_that_meets_damage_puts_the_replica_in_quarantine(tmp_path):
    """Before the scrubber comes by: a block of payloads carries its own checksum."""

    async def test(served: Served) -> None:
        file = served.file(layout.PAYLOAD)
        for at in range(layout.HEADER_BYTES, file.size_bytes // 2, 16):
            served.damage(file.key, at)
        call = GetCall(collection=SCHEMA.id, shard=SHARD, ids=ids(["p003"]))
        with pytest.raises(Unavailable, match="quarantine"):
            await served.host.get(call)
        assert served.host.reports()[0].state is ReplicaState.FAILED

    scenario(tmp_path, test)


def test_a_patch_does_not_write_damaged_bytes_again(tmp_path):
    """S-4: the row's hash is compared before it gets a fresh checksum in the log."""

    async def test(served: Served) -> None:
        served.damage(served.file(layout.VECTORS).key, layout.HEADER_BYTES + 16 * 5)
        with pytest.raises(Corrupt, match="row 5"):
            await served.write(patch(8, {"p005": {"color": "blue"}}))
        assert not served.hosted.primary.serving and served.replica.suspected
        await served.host.scrubber.visit_due()
        assert served.host.reports()[0].state is ReplicaState.FAILED

    scenario(tmp_path, test)


def test_a_merge_that_meets_damage_is_given_up_and_the_epoch_goes_on(tmp_path):
    """Each end of an epoch leaves a fence for ever: damage must not end them in a row."""

    async def test(served: Served) -> None:
        sealer = served.hosted.primary._sealer
        served.damage(served.file(layout.IDS).key, layout.HEADER_BYTES)
        sealer._compact(served.replica.manifest.segments)
        await settled(served)
        assert served.hosted.primary.serving and served.replica.suspected
        assert sealer._mergeable() == ()
        await served.write(upsert(9, {"after": 1.0}))

    scenario(tmp_path, test)


def test_passes_come_by_themselves_and_seldom(tmp_path, monkeypatch):
    pass_s = 3 * RECHECK_S  # an hour of a shard's polling takes long even in virtual time
    monkeypatch.setattr(scrubbing, "PASS_S", pass_s)

    async def test(served: Served) -> None:
        served.host.start_scrubbing()
        await asyncio.sleep(pass_s / 2)
        assert served.host.scrubber.passes == 0  # loading has just read everything
        await asyncio.sleep(pass_s)
        assert served.host.scrubber.passes == 1
        key = served.damage(served.file("tombstones").key)
        await asyncio.sleep(pass_s + ROUND_S)
        assert served.file("tombstones").key != key
        await asyncio.sleep(RECHECK_S)
        assert served.said() == ""

    scenario(tmp_path, test)


def test_a_pass_that_the_bucket_cuts_short_begins_again(tmp_path, monkeypatch):
    async def test(served: Served) -> None:
        files = served.host._ports.files
        tombstones, refusals = files.tombstones, []

        async def refuse_once(entry):
            if not refusals:
                refusals.append(entry)
                raise Unavailable("slow down")
            return await tombstones(entry)

        monkeypatch.setattr(files, "tombstones", refuse_once)
        served.host.start_scrubbing()
        await asyncio.sleep(ROUND_S)
        served.replica.suspected = True
        await asyncio.sleep(2 * ROUND_S)
        assert refusals and served.host.scrubber.passes == 0
        await asyncio.sleep(RECHECK_S + 2 * ROUND_S)
        assert served.host.scrubber.passes == 1

    scenario(tmp_path, test)


def test_a_segment_cannot_be_salvaged_when_its_rows_are_damaged_too(tmp_path):
    async def test(served: Served) -> None:
        served.damage(served.file(layout.CODES).key)
        key = served.damage(served.file(layout.PAYLOAD).key)
        with pytest.raises(Corrupt, match=key):
            await served.shard.node(store=served.store).load()

    scenario(tmp_path, test)
