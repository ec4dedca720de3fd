"""Who deleted an object and why: the bucket itself can tell."""

import asyncio
import json

import pytest
from click.testing import CliRunner

from shoal_cluster.bucket import envelope
from shoal_cluster.bucket.envelope import EnvelopeKind
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.cli.main import cli
from shoal_cluster.domain.errors import Corrupt, NotFound, Unavailable
from shoal_cluster.domain.ids import CollectionId, Epoch, ShardNumber
from shoal_cluster.domain.keys import CLUSTER_KEY, ShardKeys
from shoal_cluster.shard import deletions, garbage
from shoal_cluster.shard.deletions import (
    Deletion,
    DeletionJournal,
    decode_deletion,
    encode_deletion,
    read_deletions,
    runs,
)
from shoal_cluster.shard.garbage_survey import survey_garbage
from tests.unit.shard.nodes import (
    CLUSTER_UUID,
    KEYS,
    LoopClock,
    SeededIds,
    Shard,
    delete,
    run,
    upsert,
)

DELETION = Deletion(
    epoch=Epoch(3),
    manifest_version=17,
    manifest_put_id=bytes(range(16)),
    floor_slot=9,
    wall_ms=1_700_000_000_000,
    segment_objects=("seg/a/vectors", "seg/a/ids"),
    slots=((1, 4), (6, 9)),
    versions=((2, 9),),
)


def test_an_entry_reads_as_it_was_written_and_tells_whose_it_is():
    body = encode_deletion(DELETION, KEYS, bytes(16))
    assert decode_deletion(body, KEYS, key="k") == DELETION
    other = ShardKeys(CollectionId("d" * 32), ShardNumber(0))
    with pytest.raises(Corrupt, match="object k is of another shard"):
        decode_deletion(body, other, key="k")


def test_runs_name_every_number_once():
    assert runs([1, 2, 3, 5, 8, 9]) == ((1, 3), (5, 5), (8, 9))
    assert runs([]) == ()


def test_an_entry_tells_why_an_object_went():
    def why(key):
        return DELETION.reason_of(KEYS, KEYS.prefix + key)

    assert why("seg/a/ids") == deletions.NOT_LISTED and why("seg/b/ids") is None
    assert why(f"wal/{4:020d}") == deletions.SEALED and why(f"wal/{5:020d}") is None
    assert why(f"man/{2:020d}") == deletions.SUPERSEDED and why(f"man/{10:020d}") is None
    assert DELETION.reason_of(KEYS, "catalog/v/1") is None
    assert len(DELETION.lines(KEYS)) == 5


async def with_garbage(tmp_path):
    """Returns a shard with a fenced primary, whose successor leads, and a few seals and merges."""
    shard = await Shard(tmp_path).create()
    header = {"put_id": bytes(16), "cluster_uuid": CLUSTER_UUID, "conformance": {}}
    shard.objects[CLUSTER_KEY] = envelope.encode(EnvelopeKind.CLUSTER, header)
    request = 0
    node = await led_without_collection(shard)
    for turn in range(10):
        for step in range(3):
            request += 1
            await node.write(upsert(request, {f"p{(turn + step) % 7}": float(request)}))
        await node.write(delete(request + 1, f"p{turn % 7}"))
        request += 1
        await node.seal()
        if turn == 4:
            await node.crash()
            node = await led_without_collection(shard)
    return shard, node


async def led_without_collection(shard):
    """Returns a leading node that collects garbage only when the test does."""
    node = await shard.lead()
    node.primary._sealer.tidy = lambda: None
    return node


async def collected(node):
    """Runs the collector until nothing is left to delete."""
    collector = node.primary._sealer._garbage
    deleted = list(await collector.collect(lambda segment: False))
    await asyncio.sleep(garbage.GRACE_S)
    while found := await collector.collect(lambda segment: False):
        deleted += found
    return deleted


def test_every_deletion_is_in_the_journal_with_its_manifest_and_nothing_else_is(tmp_path):
    async def scenario():
        shard, node = await with_garbage(tmp_path)
        before = set(shard.objects)
        manifest = node.replica.manifest
        deleted = set(await collected(node))
        assert deleted == before - set(shard.objects) != set()
        journal = await read_deletions(shard.bucket, KEYS)
        assert {entry.epoch for entry in journal} == {2}
        assert {entry.manifest_put_id for entry in journal} == {manifest.put_id}
        for key in before:
            reasons = [entry.reason_of(KEYS, key) for entry in journal]
            # A floor marker is replaced by the next, which says the same of more versions.
            assert any(reasons) == (key in deleted and not key.startswith(KEYS.floors)), key
        await node.crash()

    run(scenario())


def test_an_object_is_journaled_before_it_goes(tmp_path):
    """Or a crash in between would leave an object gone without a reason."""

    async def scenario():
        shard, node = await with_garbage(tmp_path)
        store = node.ports.store
        inner, unexplained = store.delete, []

        async def watched(key):
            journal = await read_deletions(shard.bucket, KEYS)
            if not any(entry.reason_of(KEYS, key) for entry in journal):
                unexplained.append(key)
            await inner(key)

        store.delete = watched
        assert await collected(node)
        assert unexplained == []
        await node.crash()

    run(scenario())


def test_a_full_disk_is_emptied_first_and_the_journal_written_after(tmp_path):
    async def scenario():
        shard, node = await with_garbage(tmp_path)
        journal = node.primary._sealer._garbage._journal
        inner, deleted = node.ports.store.create, []

        class FullUntilDeleted(MemoryStore):
            async def create(self, key, body):
                if not deleted:
                    raise Unavailable("disk full")
                return await inner(key, body)

        forget = node.ports.store.delete

        async def delete_one(key):
            deleted.append(key)
            await forget(key)

        node.ports.store.delete = delete_one
        journal._store = FullUntilDeleted(shard.objects)
        gone = await collected(node)
        entries = await read_deletions(shard.bucket, KEYS)
        data = [key for key in gone if key.startswith((KEYS.wal, KEYS.segments))]
        assert data and all(any(e.reason_of(KEYS, key) for e in entries) for key in data)
        await node.crash()

    run(scenario())


def test_the_oldest_entries_go_also_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(deletions, "ENTRIES_KEPT", 5)

    async def scenario():
        store = MemoryStore()
        for epoch in (1, 2):
            journal = DeletionJournal(store, KEYS, Epoch(epoch), LoopClock(), SeededIds(epoch))
            for number in range(4):
                await journal.write(
                    Deletion(
                        epoch=Epoch(epoch),
                        manifest_version=number,
                        manifest_put_id=bytes(16),
                        floor_slot=0,
                        wall_ms=0,
                    )
                )
        kept = [(e.epoch, e.manifest_version) for e in await read_deletions(store, KEYS)]
        assert kept == [(1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]

    run(scenario())


def test_a_dry_run_names_what_is_deleted_then_and_changes_nothing(tmp_path):
    async def scenario():
        shard, node = await with_garbage(tmp_path)
        before = dict(shard.objects)
        (found,) = await survey_garbage(shard.bucket, LoopClock())
        assert shard.objects == before and found.deleted == () and found.unreadable == ()
        named = {key for key in before if found.due.reason_of(KEYS, key)}
        deleted = set(await collected(node))
        # Seen from outside, what our epoch made and nothing lists may be under construction.
        ours = {key for key in deleted if key.startswith(f"{KEYS.segments}{2:020d}-")}
        assert named == deleted - ours != set()
        assert any(key.startswith(KEYS.segments) for key in named)
        (found,) = await survey_garbage(shard.bucket, LoopClock())
        assert found.due is None
        assert {entry.epoch for entry in found.deleted} == {2}
        await node.crash()

    run(scenario())


def test_check_lists_what_was_deleted_and_what_would_be(tmp_path):
    async def scenario():
        shard, node = await with_garbage(tmp_path)
        deleted = await collected(node)
        await node.write(upsert(90, {"later": 1.0}))
        await node.seal()
        await node.crash()
        return shard.objects, deleted

    objects, deleted = run(scenario())
    bucket = tmp_path / "bucket"
    for key, body in objects.items():
        (bucket / key).parent.mkdir(parents=True, exist_ok=True)
        (bucket / key).write_bytes(body)
    ran = CliRunner().invoke(cli, ["check", str(bucket), "--garbage", "--json"])
    told = json.loads(ran.stdout)
    assert ran.exit_code == 0 and told["unreadable"] == []
    (segment, *_) = [key for key in deleted if key.startswith(KEYS.segments)]
    (line,) = [line for line in told["deleted"] if line["objects"] == segment]
    assert line["epoch"] == 2 and line["why"] == deletions.NOT_LISTED
    assert line["at"].startswith("1970-01-01T00:")
    assert {line["why"] for line in told["due"]} >= {deletions.SEALED}
    plain = CliRunner().invoke(cli, ["check", str(bucket), "--garbage"])
    assert "nothing was changed" in plain.stdout and segment in plain.stdout
    assert {f"{path.relative_to(bucket)}" for path in bucket.rglob("*") if path.is_file()} == set(
        objects
    )


def test_a_dry_run_keeps_what_it_cannot_read_and_refuses_what_is_no_bucket(tmp_path):
    async def scenario():
        shard, node = await with_garbage(tmp_path)
        await node.crash()
        key = KEYS.slot(2)
        shard.objects[key] = shard.objects[key][:-1]
        (found,) = await survey_garbage(shard.bucket, LoopClock())
        assert found.unreadable == (key,) and found.due.reason_of(KEYS, key) is None
        with pytest.raises(NotFound, match="no bucket"):
            await survey_garbage(MemoryStore(), LoopClock())

    run(scenario())
