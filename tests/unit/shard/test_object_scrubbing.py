"""The scrubber on an object store: objects nobody reads are compared, and put again from copies."""

import asyncio
import hashlib

import pytest

from shoal_cluster.bucket.faults import NO_FAULTS, FaultPlan
from shoal_cluster.domain.observation import ReplicaState
from shoal_cluster.index import cost_model
from shoal_cluster.segment import format as layout
from shoal_cluster.shard import object_scrubbing, paced_reading, sealing
from shoal_cluster.shard.damage import Part
from shoal_cluster.shard.garbage import GRACE_S
from shoal_cluster.shard.host import ShardHost
from shoal_cluster.shard.object_scrubbing import OBJECT_BYTES_PER_S
from shoal_cluster.shard.scrubbing import RECHECK_S, ROUND_S
from shoal_cluster.shard.sealing import MERGE_AGAIN_S_MIN, Sealer
from tests.unit.shard.in_place import flip
from tests.unit.shard.nodes import SCHEMA, SHARD, delete, points_of, upsert
from tests.unit.shard.served import (
    LEFT,
    NAME,
    Served,
    always_codes,
    assert_loads_elsewhere,
    scenario,
    settled,
)

FILES = (
    layout.VECTORS,
    layout.IDS,
    layout.PAYLOAD,
    layout.ATTRIBUTES,
    layout.CODES,
    layout.META,
)


@pytest.fixture(autouse=True)
def small_segments_have_codes(monkeypatch):
    monkeypatch.setattr(cost_model, "choose_family", always_codes)


def objects_of(served: Served):
    return served.host.scrubber.objects


async def find(served: Served) -> list[str]:
    """Has every object of the segment read; returns the keys of the damaged ones."""
    (entry,) = served.replica.manifest.segments
    served.replica.doubted.add(entry.id)
    await objects_of(served).visit_due()
    return [damage.key for damage in objects_of(served).damages_of(served.replica)]


def listed(served: Served) -> set[str]:
    segments = served.replica.manifest.segments
    return {file.key for entry in segments for file in entry.files}


def copy_of(served: Served, name: str):
    """Returns the path of a cached copy."""
    (entry,) = served.replica.manifest.segments
    return {copy.entry.name: copy.path for copy in served.host._ports.files.copies(entry)}[name]


def damage_copy(served: Served, name: str) -> None:
    path = copy_of(served, name)
    with path.open("r+b") as file:  # in place: what has it mapped sees the change
        body = file.read()
        file.seek(0)
        file.write(flip(body, len(body) // 2))


async def until(condition) -> None:
    async with asyncio.timeout(3000):
        while not condition():
            await asyncio.sleep(1)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_object_is_put_again_from_the_cached_copy(tmp_path, name):
    async def test(served: Served) -> None:
        file, before = served.file(name), served.replica.manifest
        readers = [view.reader for view in served.replica.state.segments.values()]
        served.damage(file.key)
        assert await find(served) == [file.key]
        await served.host.scrubber.visit_due()
        await settled(served)

        after = served.file(name)
        assert after.key != file.key and after.sha256 == file.sha256
        assert hashlib.sha256(served.shard.objects[after.key]).hexdigest() == file.sha256
        assert served.replica.manifest.segments[0].id == before.segments[0].id
        assert [view.reader for view in served.replica.state.segments.values()] == readers
        assert served.host.reports()[0].leads and served.points() == LEFT

        assert served.replica.doubted == {before.segments[0].id}, "what was put is read back"
        assert await find(served) == []
        assert await served.scrub() == [] and served.said() == ""
        await asyncio.sleep(2 * GRACE_S)
        assert file.key not in served.shard.objects and after.key in served.shard.objects
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test, in_place=False)


def test_a_damaged_object_is_in_the_status_until_it_is_replaced(tmp_path, monkeypatch):
    async def test(served: Served) -> None:
        key = served.damage(served.file(layout.VECTORS).key)
        with monkeypatch.context() as nobody_repairs:
            nobody_repairs.setattr(Sealer, "repair", lambda *_: None)
            await find(served)
            assert served.replica.suspected, "a whole pass follows, so that all of it is said"
            assert await served.scrub() == [key]
            assert "the cached copy is sound" in served.said()
            assert await served.scrub() == [key], "it stands, though copies are sound"
        served.host.start_scrubbing()
        await until(lambda: served.file(layout.VECTORS).key != key)
        await asyncio.sleep(2 * RECHECK_S)
        assert served.said() == ""

    scenario(tmp_path, test, in_place=False)


def test_every_flipped_bit_of_an_object_is_noticed(tmp_path):
    async def test(served: Served) -> None:
        for name in FILES:
            key = served.file(name).key
            sound = served.shard.objects[key]
            for at in range(0, len(sound), 61):
                served.shard.objects[key] = flip(sound, at, at % 8)
                assert await find(served) == [key], f"{name} byte {at}"
            served.shard.objects[key] = sound
        assert await find(served) == []

    scenario(tmp_path, test, in_place=False)


def test_an_object_is_read_in_ranges_to_its_end_and_no_further(tmp_path, monkeypatch):
    async def test(served: Served) -> None:
        file = served.file(layout.PAYLOAD)
        sound = served.shard.objects[file.key]
        for piece_bytes in (file.size_bytes - 1, file.size_bytes, file.size_bytes + 1, 64):
            monkeypatch.setattr(paced_reading, "FETCH_PIECE_BYTES", piece_bytes)
            before = objects_of(served).read_bytes
            assert await find(served) == []
            read_bytes = objects_of(served).read_bytes - before
            (entry,) = served.replica.manifest.segments
            assert read_bytes == sum(each.size_bytes for each in entry.files)
            for body in (sound[:-1], sound + b"\0", flip(sound, 0), flip(sound, len(sound) - 1)):
                served.shard.objects[file.key] = body
                assert await find(served) == [file.key], f"pieces of {piece_bytes}"
            served.shard.objects[file.key] = sound

    scenario(tmp_path, test, in_place=False)


def test_objects_that_nobody_compares_would_be_caught_here(tmp_path, monkeypatch):
    monkeypatch.setattr(object_scrubbing, "differs", lambda *_: "")

    async def test(served: Served) -> None:
        for name in FILES:
            served.damage(served.file(name).key)
        assert await find(served) == []

    scenario(tmp_path, test, in_place=False)


@pytest.mark.parametrize("change", ["gone", "short", "long", "empty"])
def test_an_object_of_another_size_is_put_again(tmp_path, change):
    async def test(served: Served) -> None:
        key, objects = served.file(layout.PAYLOAD).key, served.shard.objects
        body = objects.pop(key)
        if change != "gone":
            objects[key] = {"short": body[:-1], "long": body + b"\0", "empty": b""}[change]
        assert await find(served) == [key]
        await served.host.scrubber.visit_due()
        await settled(served)
        assert served.file(layout.PAYLOAD).key != key
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test, in_place=False)


def test_damaged_tombstones_in_an_object_store_are_written_again(tmp_path):
    """They are never copied: every replica's own pass reads the object."""

    async def test(served: Served) -> None:
        key = served.damage(served.file("tombstones").key)
        assert await served.scrub() == [key]
        await settled(served)
        assert served.file("tombstones").key != key
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test, in_place=False)


@pytest.mark.parametrize("copy", ["gone", "damaged"])
@pytest.mark.parametrize("name", [layout.VECTORS, layout.IDS, layout.PAYLOAD])
def test_rows_of_which_no_copy_is_sound_put_the_replica_in_quarantine(tmp_path, name, copy):
    """Z-1: as in a local directory, until somebody puts the object back."""

    async def test(served: Served) -> None:
        file = served.file(name)
        sound = served.shard.objects[file.key]
        served.damage(file.key)
        if copy == "gone":
            copy_of(served, name).unlink()
        else:
            damage_copy(served, name)
        assert await find(served) == [file.key]
        await served.host.scrubber.visit_due()
        await asyncio.sleep(0)
        report = served.host.reports()[0]
        assert report.state is ReplicaState.FAILED and not report.leads
        assert file.key in report.reason and f"copy is {copy} too" in report.reason
        assert "put back from a copy" in report.reason
        for _ in range(30):
            await asyncio.sleep(1)
            served.host.open(SCHEMA, SHARD)
            assert served.host.reports()[0].state is not ReplicaState.READY
        assert file.key in served.said()
        served.shard.objects[file.key] = sound
        await served.open()
        assert served.points() == LEFT

    scenario(tmp_path, test, in_place=False)


@pytest.mark.parametrize("name", [layout.CODES, layout.META, layout.ATTRIBUTES])
def test_a_derived_file_of_which_no_copy_is_left_is_built_again(tmp_path, name):
    async def test(served: Served) -> None:
        file = served.file(name)
        served.damage(file.key)
        copy_of(served, name).unlink()
        assert await find(served) == [file.key]
        await served.host.scrubber.visit_due()
        assert served.host.reports()[0].leads
        await settled(served)
        assert file.key not in {each.key for each in served.replica.manifest.segments[0].files}
        assert await served.scrub() == [] and served.points() == LEFT
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test, in_place=False)


def test_attributes_damaged_twice_stop_the_replica_and_are_built_again(tmp_path):
    async def test(served: Served) -> None:
        key = served.damage(served.file(layout.ATTRIBUTES).key)
        damage_copy(served, layout.ATTRIBUTES)
        await find(served)
        await served.host.scrubber.visit_due()
        assert served.host.reports()[0].state is ReplicaState.FAILED and key in served.said()
        await served.open()
        await served.host.promote(NAME)
        await served.host.scrubber.visit_due()
        await settled(served)
        assert await served.scrub() == [] and served.points() == LEFT
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test, in_place=False)


def test_a_copy_that_goes_bad_before_it_is_put_is_not_put(tmp_path):
    async def test(served: Served) -> None:
        key = served.damage(served.file(layout.CODES).key)
        await find(served)
        before = dict(served.shard.objects)
        damage_copy(served, layout.CODES)
        await served.host.scrubber.visit_due()
        await asyncio.sleep(1)
        assert served.file(layout.CODES).key == key
        assert not {at for at in set(served.shard.objects) - set(before) if "/codes-" in at}
        assert objects_of(served).damages_of(served.replica) == [], "the finding no longer holds"
        await objects_of(served).visit_due()
        (found,) = objects_of(served).damages_of(served.replica)
        assert found.part is Part.DERIVED, "judged anew"
        await served.host.scrubber.visit_due()
        await settled(served)
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test, in_place=False)


def test_objects_are_read_slowly_and_seldom(tmp_path, monkeypatch):
    """Z-4."""
    pass_s = 600.0
    monkeypatch.setattr(object_scrubbing, "OBJECT_PASS_S", pass_s)

    async def test(served: Served) -> None:
        loop, objects = asyncio.get_running_loop(), objects_of(served)
        (entry,) = served.replica.manifest.segments
        listed = sum(file.size_bytes for file in entry.files)
        started_s = loop.time()
        await find(served)
        assert objects.read_bytes == listed
        took_s = loop.time() - started_s
        assert took_s == pytest.approx(listed / OBJECT_BYTES_PER_S, rel=0.01)

        served.host.start_scrubbing()
        await asyncio.sleep(pass_s - 2 * ROUND_S)
        assert objects.read_bytes == listed
        await asyncio.sleep(4 * ROUND_S)
        assert objects.read_bytes == 2 * listed
        await asyncio.sleep(pass_s / 2)
        assert objects.read_bytes == 2 * listed

        await served.host.close_all()
        served.host = ShardHost(served.host._ports, lambda _: served.shard.network)
        await served.open()
        await served.host.promote(NAME)
        await objects_of(served).visit_due()
        assert objects_of(served).read_bytes == 0, "another process knows that it was read"

    scenario(tmp_path, test, in_place=False)


def test_what_is_doubted_is_read_before_what_is_due(tmp_path):
    """A pass over all that is due takes a day."""

    async def test(served: Served) -> None:
        await served.write(upsert(4, {f"r{number:03d}": float(number) for number in range(40)}))
        sealer = served.hosted.primary._sealer
        sealer.start()
        await sealer._seal
        first, second = served.replica.manifest.segments
        read, get_range = [], served.store.get_range

        async def noted(key, start, length):
            read.append(key.split("/")[5])
            return await get_range(key, start, length)

        served.store.get_range = noted
        served.replica.doubted.add(second.id)
        await objects_of(served).visit_due()
        assert list(dict.fromkeys(read)) == [second.id, first.id]

    scenario(tmp_path, test, in_place=False)


def test_a_fresh_copy_has_read_the_object(tmp_path):
    async def test(served: Served) -> None:
        (entry,) = served.replica.manifest.segments
        files = served.host._ports.files
        fetched_s = files.compared_s(entry.id)
        assert fetched_s == pytest.approx(copy_of(served, layout.VECTORS).stat().st_mtime, abs=60)
        files.mark_compared(entry.id, 5.0)
        assert files.compared_s(entry.id) == 5.0
        files.forget(entry.id)
        assert files.compared_s(entry.id) == float("-inf")

    scenario(tmp_path, test, in_place=False)


def test_only_the_primary_reads_objects(tmp_path):
    async def test(served: Served) -> None:
        follower = ShardHost(served.shard.node(store=served.store).ports, lambda _: None)
        follower.open(SCHEMA, SHARD)
        await until(lambda: follower.reports()[0].state is ReplicaState.READY)
        await follower.scrubber.objects.visit_due()
        assert follower.scrubber.objects.read_bytes == 0
        await follower.close_all()

    scenario(tmp_path, test, in_place=False)


def test_nothing_is_read_twice_where_files_are_used_in_place(tmp_path):
    async def test(served: Served) -> None:
        served.damage(served.file(layout.CODES).key)
        assert await find(served) == []
        assert objects_of(served).read_bytes == 0

    scenario(tmp_path, test)


def test_bytes_of_an_object_damaged_on_the_way_are_no_damage(tmp_path, monkeypatch):
    async def test(served: Served) -> None:
        get_range, flipped = served.store.get_range, set()

        async def once(key, start, length):
            body = await get_range(key, start, length)
            if key not in flipped:
                flipped.add(key)
                return flip(body, len(body) // 2)
            return body

        monkeypatch.setattr(served.store, "get_range", once)
        assert await find(served) == [] and len(flipped) == len(FILES)

    scenario(tmp_path, test, in_place=False)


def test_an_object_of_a_segment_that_was_merged_meanwhile_is_not_called_damaged(tmp_path):
    """Z-2: at this rate a segment is read for hours."""

    async def test(served: Served) -> None:
        (entry,) = served.replica.manifest.segments
        for file in entry.files:
            served.damage(file.key)
        reading = asyncio.ensure_future(find(served))
        await asyncio.sleep(0.0001)
        assert objects_of(served).read_bytes > 0 and not reading.done()
        sealer = served.hosted.primary._sealer
        for file in entry.files:
            served.damage(file.key)  # sound again, for the builder
        sealer._compact(served.replica.manifest.segments)
        await sealer._compaction
        for file in entry.files:
            served.shard.objects.pop(file.key, None)
        while not reading.done():
            await asyncio.sleep(1)
        assert objects_of(served).damages_of(served.replica) == []

    scenario(tmp_path, test, in_place=False)


def test_a_primary_that_was_deposed_does_not_call_garbage_damaged(tmp_path):
    """Z-2: its manifest is not the newest any more, and it does not know yet."""

    async def test(served: Served) -> None:
        (entry,) = served.replica.manifest.segments
        other = await served.shard.node(store=served.store).load()
        await other.promote()
        other.primary._sealer._compact(other.replica.manifest.segments)
        await other.settle()
        for file in entry.files:
            del served.shard.objects[file.key]
        assert served.hosted.primary.serving and entry in served.replica.manifest.segments
        assert await find(served) == []
        assert served.hosted.primary.serving, "still"
        await other.crash()

    scenario(tmp_path, test, in_place=False)


def test_a_merge_that_meets_a_damaged_object_has_it_put_again(tmp_path):
    """Builders read objects, so seven days would be a long time without merges."""

    async def test(served: Served) -> None:
        served.host.start_scrubbing()
        await asyncio.sleep(2 * ROUND_S)
        (entry,) = served.replica.manifest.segments
        key = served.damage(served.file(layout.IDS).key)
        sealer = served.hosted.primary._sealer
        sealer._compact((entry,))
        await sealer._compaction
        assert served.hosted.primary.serving and served.replica.doubted == {entry.id}
        await until(lambda: served.file(layout.IDS).key != key)
        await asyncio.sleep(MERGE_AGAIN_S_MIN)
        sealer._compact(sealer._mergeable())
        await settled(served)
        assert served.replica.manifest.segments[0].id != entry.id
        assert served.points() == LEFT

    scenario(tmp_path, test, in_place=False)


def test_a_copy_is_put_again_whatever_the_bucket_does(tmp_path):
    async def test(served: Served) -> None:
        damaged = {served.damage(served.file(name).key) for name in FILES}
        served.store.plan = FaultPlan(
            lost_reply=0.15,
            not_applied=0.15,
            applied_late=0.15,
            conflict_not_stored=0.15,
            unavailable=0.05,
            slow=0.1,
        )
        (entry,) = served.replica.manifest.segments
        served.replica.doubted.add(entry.id)
        served.host.start_scrubbing()
        await until(lambda: not damaged & {served.file(name).key for name in FILES})
        served.store.plan = NO_FAULTS
        await served.store.settle()
        await settled(served)
        assert served.host.reports()[0].leads
        await asyncio.sleep(2 * RECHECK_S)
        assert served.said() == ""
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test, in_place=False)


def test_objects_are_read_again_after_the_bucket_did_not_answer(tmp_path):
    async def test(served: Served) -> None:
        key = served.damage(served.file(layout.META).key)
        served.store.plan = FaultPlan(unavailable=1.0)
        assert await find(served) == [] and served.replica.doubted
        assert "reading objects" in served.said()
        served.store.plan = NO_FAULTS
        served.host.start_scrubbing()
        await until(lambda: served.file(layout.META).key != key)
        assert "reading objects" not in served.said()

    scenario(tmp_path, test, in_place=False)


@pytest.mark.parametrize("protected", [True, False])
def test_garbage_collection_spares_an_object_until_it_is_listed(tmp_path, monkeypatch, protected):
    """G-1; without the protection the manifest would list an object that is gone."""
    put_copy = sealing.put_copy

    async def slow(*arguments):
        entry = await put_copy(*arguments)
        await asyncio.sleep(3 * GRACE_S)
        return entry

    monkeypatch.setattr(sealing, "put_copy", slow)
    if not protected:
        monkeypatch.setattr(Sealer, "_is_in_flight", lambda *_: False)

    async def test(served: Served) -> None:
        await served.host.close(NAME)
        await served.open()
        await served.host.promote(NAME)  # the segment is now of an epoch before
        key = served.damage(served.file(layout.VECTORS).key)
        await find(served)
        await served.host.scrubber.visit_due()
        await until(lambda: served.file(layout.VECTORS).key != key)
        assert (served.file(layout.VECTORS).key in served.shard.objects) is protected

    scenario(tmp_path, test, in_place=False)


def test_a_crash_before_the_commit_leaves_a_loose_object_and_the_next_primary_repairs(
    tmp_path, monkeypatch
):
    async def test(served: Served) -> None:
        key = served.damage(served.file(layout.VECTORS).key)
        put_copy, loose = sealing.put_copy, []

        async def and_crash(*arguments):
            loose.append((await put_copy(*arguments)).key)
            raise asyncio.CancelledError

        with monkeypatch.context() as crashing:
            crashing.setattr(sealing, "put_copy", and_crash)
            await find(served)
            await served.host.scrubber.visit_due()
            await settled(served)
        assert loose[0] in served.shard.objects and served.file(layout.VECTORS).key == key

        await served.host.close_all()
        served.host = ShardHost(served.host._ports, lambda _: served.shard.network)
        await served.open()
        await served.host.promote(NAME)
        served.host.start_scrubbing()
        await until(lambda: served.file(layout.VECTORS).key != key)
        await asyncio.sleep(3 * GRACE_S)
        assert not {key, loose[0]} & set(served.shard.objects)
        await assert_loads_elsewhere(served, LEFT)

    scenario(tmp_path, test, in_place=False)


def test_writes_go_on_while_a_copy_is_put_again(tmp_path, monkeypatch):
    put_copy = sealing.put_copy

    async def slow(*arguments):
        await asyncio.sleep(10)
        return await put_copy(*arguments)

    monkeypatch.setattr(sealing, "put_copy", slow)

    async def test(served: Served) -> None:
        key = served.damage(served.file(layout.VECTORS).key)
        await find(served)
        await served.host.scrubber.visit_due()
        await served.write(delete(4, "p001"))
        await served.write(upsert(5, {"more": 3.0}))
        sealer = served.hosted.primary._sealer
        sealer.start()
        await sealer._seal
        assert key in listed(served)
        await until(lambda: key not in listed(served))
        expected = {**LEFT, "more": 3.0}
        del expected["p001"]
        assert points_of(served.replica) == expected
        await settled(served)
        await assert_loads_elsewhere(served, expected)

    scenario(tmp_path, test, in_place=False)
