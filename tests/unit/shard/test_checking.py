"""check_bucket: a sound bucket has no problems, and any damage is named by its object."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal_cluster.bucket import envelope
from shoal_cluster.bucket.envelope import EnvelopeKind
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.control.catalog import Catalog, CatalogLog, CollectionRecord
from shoal_cluster.domain.errors import Conflict
from shoal_cluster.domain.ids import Epoch, Slot
from shoal_cluster.domain.keys import CLUSTER_KEY, LoadKeys
from shoal_cluster.segment.build import build_segment
from shoal_cluster.shard import building
from shoal_cluster.shard.checking import CheckReport, check_bucket
from shoal_cluster.shard.deletions import Deletion, DeletionJournal
from shoal_cluster.shard.load_objects import (
    ABORT,
    Prepared,
    Receipt,
    StagedRows,
    decide,
    give_receipt,
    record_prepared,
    stage_rows,
)
from tests.unit.shard.nodes import (
    CLUSTER_UUID,
    KEYS,
    SCHEMA,
    SHARD,
    LoopClock,
    SeededIds,
    Shard,
    delete,
    points_of,
    run,
    tail,
    upsert,
)

FLIPS_AN_OBJECT = 5


async def bucket_with_everything(scratch: Path) -> dict[str, bytes]:
    """Returns the objects of a bucket with two reigns, two segments, tombstones and a tail."""
    shard = await Shard(scratch).create()
    header = {"put_id": bytes(16), "cluster_uuid": CLUSTER_UUID, "conformance": {}}
    shard.objects[CLUSTER_KEY] = envelope.encode(EnvelopeKind.CLUSTER, header)
    log = CatalogLog(shard.bucket, LoopClock(), SeededIds(1))
    record = CollectionRecord(schema=SCHEMA, assignment=(("server-1",),))
    await log.update(lambda catalog: catalog.with_record(record))
    node = await shard.lead()
    await node.write(upsert(1, {f"p{number}": number for number in range(12)}))
    await node.write(upsert(2, {f"q{number}": number for number in range(12)}, color="blue"))
    await node.seal()
    await node.write(delete(3, "p3", "q1"))
    await node.write(upsert(4, {"r": 1, "p4": 9}))
    await node.seal()
    await node.crash()
    node = await shard.lead()
    await node.write(upsert(5, {"s": 1, "p5": 9}))
    await node.write(delete(6, "p6"))
    assert len(points_of(node.replica)) == 23
    journal = DeletionJournal(shard.bucket, KEYS, Epoch(2), LoopClock(), SeededIds(2))
    await journal.write(
        Deletion(
            epoch=Epoch(2),
            manifest_version=2,
            manifest_put_id=bytes(16),
            floor_slot=1,
            wall_ms=0,
            segment_objects=("seg/gone/vectors",),
        )
    )
    await node.crash()
    await stage_a_load(shard)
    return shard.objects


async def stage_a_load(shard: Shard) -> None:
    """Adds each kind of object that a bulk load has."""
    store, clock, keys = shard.bucket, LoopClock(), LoadKeys(SCHEMA.id, SHARD, "l1")
    rows = StagedRows(ids=[b"x"], vectors=np.ones((1, 4), dtype=np.float32), tails=[tail()])
    put_id = await stage_rows(store, clock, keys, "0-0", rows)
    await give_receipt(
        store, clock, keys, "0-0", Receipt(digest=1, schema_version=1, rows={SHARD: 1}), put_id
    )
    prepared = Prepared(epoch=Epoch(2), rows=1, segments=())
    await record_prepared(store, clock, keys, prepared, bytes(16))
    await decide(store, clock, LoadKeys(SCHEMA.id, SHARD, "l2"), ABORT, bytes(16))


async def report_of(objects: dict[str, bytes], *, deep: bool = True) -> CheckReport:
    return await check_bucket(MemoryStore(objects), deep=deep, progress=lambda done, total: None)


def problems_of(objects: dict[str, bytes], *, deep: bool = True) -> set[str]:
    return {problem.key for problem in run(report_of(objects, deep=deep)).problems}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return run(bucket_with_everything(tmp_path_factory.mktemp("bucket")))


@pytest.mark.parametrize("deep", [True, False])
def test_a_sound_bucket_has_no_problems(sound, deep):
    seen: list[tuple[int, int | None]] = []

    async def check() -> CheckReport:
        return await check_bucket(
            MemoryStore(sound), deep=deep, progress=lambda done, total: seen.append((done, total))
        )

    report = run(check())
    assert report.problems == ()
    assert (report.collections, report.shards, report.rows) == (1, 1, 23)
    assert (report.objects, report.bytes) == (len(sound), sum(map(len, sound.values())))
    assert seen == [(number, len(sound)) for number in range(1, len(sound) + 1)]
    kinds = {key.removeprefix(KEYS.prefix).split("/")[0] for key in sound}
    assert kinds >= {"cluster", "catalog", "wal", "man", "seg", "load"}
    assert any("tombstones" in key for key in sound)


def test_every_flipped_byte_is_named_by_its_object_and_by_no_other(sound):
    """B-4, S-5."""
    rng = random.Random(7)
    for key, body in sound.items():
        places = {0, len(body) - 1, *(rng.randrange(len(body)) for _ in range(FLIPS_AN_OBJECT))}
        for place in places:
            damaged = bytearray(body)
            damaged[place] ^= 1 << rng.randrange(8)
            found = problems_of({**sound, key: bytes(damaged)}, deep=place == 0)
            assert found == {key}, f"byte {place} of {key}"


def test_an_object_cut_short_is_named(sound):
    for key, body in sound.items():
        assert problems_of({**sound, key: body[:-1]}, deep=False) == {key}


def test_a_missing_object_that_is_needed_is_named(sound):
    newest = max(key for key in sound if key.startswith(KEYS.manifests))
    needed = [key for key in sound if key.startswith(KEYS.segments)]
    for key in needed:
        rest = {other: body for other, body in sound.items() if other != key}
        found = problems_of(rest, deep=False)
        assert found in ({key}, set()), key
        if key.encode() in sound[newest]:
            assert found == {key}
    assert problems_of({k: v for k, v in sound.items() if k != CLUSTER_KEY}) == {CLUSTER_KEY}


def test_a_gap_in_the_log_is_found_behind_the_floor_only(sound):
    """W-1."""
    slots = sorted(key for key in sound if key.startswith(KEYS.wal))
    for place, key in enumerate(slots[:-1]):
        rest = {other: body for other, body in sound.items() if other != key}
        found = problems_of(rest, deep=False)
        behind_floor = place >= len(slots) - 3  # the second reign's fence and its two writes
        assert found == ({slots[place + 1]} if behind_floor else set())


def test_a_copied_object_is_noticed(sound):
    slots = sorted(key for key in sound if key.startswith(KEYS.wal))
    after = KEYS.slot(Slot(len(slots) + 1))
    assert problems_of({**sound, after: sound[slots[-1]]}) == {after}
    versions = sorted(key for key in sound if key.startswith(KEYS.manifests))
    assert problems_of({**sound, versions[-1]: sound[versions[0]]}) == {versions[-1]}


def test_what_nothing_lists_is_a_note(sound):
    loose = f"{KEYS.segments}{1:020d}-000099-abcdef01/vectors"
    report = run(report_of({**sound, loose: b"half a build", "README": b"?"}))
    assert report.problems == ()
    assert any("000099" in note for note in report.notes)
    assert any("README" in note for note in report.notes)
    assert any("older manifests" in note for note in report.notes)


def test_the_rest_of_a_dropped_collection_is_a_note(sound):
    async def drop_and_check() -> CheckReport:
        objects = dict(sound)
        log = CatalogLog(MemoryStore(objects), LoopClock(), SeededIds(2))
        await log.update(lambda _: Catalog())
        for key in sorted(key for key in objects if "/seg/" in key)[::2]:
            del objects[key]  # deleting it was interrupted
        return await report_of(objects)

    report = run(drop_and_check())
    assert report.problems == ()
    assert (report.collections, report.rows) == (0, 0)
    assert any("being deleted" in note for note in report.notes)


def test_a_collection_without_its_shard_is_a_problem(sound):
    assert problems_of({k: v for k, v in sound.items() if not k.startswith("c/")}) == {
        KEYS.manifests
    }


def test_a_bucket_of_a_newer_format_is_refused_as_such(sound, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(envelope, "FORMAT_VERSION", envelope.FORMAT_VERSION + 1)
        body = envelope.encode(EnvelopeKind.CLUSTER, {"put_id": bytes(16)})
    with pytest.raises(Conflict, match="newer Shoal"):
        problems_of({**sound, CLUSTER_KEY: body})


def test_a_deep_check_finds_an_index_that_was_built_wrong(tmp_path, monkeypatch):
    """F-1: sound checksums over a wrong attribute index."""
    import shoal_cluster.segment.build as build_module

    true_columns = build_module.build_columns

    def wrong_columns(rows, attributes):
        return true_columns([{**row, "color": "grey"} for row in rows], attributes)

    monkeypatch.setattr(build_module, "build_columns", wrong_columns)
    objects = run(bucket_with_everything(tmp_path))
    assert problems_of(objects, deep=False) == set()
    found = problems_of(objects)
    assert found and all(key.endswith("/attributes") for key in found)


def test_a_deep_check_finds_hashes_that_do_not_belong_to_their_rows(tmp_path, monkeypatch):
    """S-4: the sums agree with each other, not with the rows."""

    def swap_two_payloads(rows, schema, directory, seed):
        built = build_segment(rows, schema, directory, seed)
        if len(rows) < 3:
            return built
        again = directory / "again"
        again.mkdir()
        tails = [rows.tails[1], rows.tails[0], *rows.tails[2:]]
        other = build_segment(replace(rows, tails=tails), schema, again, seed)
        payload = next(file for file in other.files if file.name == "payload")
        files = [payload if file.name == "payload" else file for file in built.files]
        return replace(built, files=tuple(files))

    monkeypatch.setattr(building, "build_segment", swap_two_payloads)
    objects = run(bucket_with_everything(tmp_path))
    assert problems_of(objects, deep=False) == set()
    found = problems_of(objects)
    assert any(key.endswith("/ids") for key in found)
