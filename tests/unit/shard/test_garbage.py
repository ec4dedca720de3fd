"""Garbage collection: what no manifest needs goes, what anybody may still need stays."""

import asyncio
from pathlib import Path

import pytest

from shoal_cluster.domain.ids import Slot
from shoal_cluster.manifest.version_log import VersionLog
from shoal_cluster.shard import garbage
from shoal_cluster.wal.record import RecordKind
from tests.unit.shard.nodes import KEYS, Node, Shard, delete, points_of, run, upsert


async def _after_grace(node: Node) -> None:
    """Lets time pass for two rounds of collection: one condemns, one deletes."""
    assert node.primary is not None
    sealer = node.primary._sealer
    for _ in range(3):
        await asyncio.sleep(garbage.GRACE_S)
        sealer.tidy()
        if sealer._collection is not None:
            await sealer._collection


def _keys(shard: Shard, prefix: str) -> list[str]:
    return sorted(key for key in shard.objects if key.startswith(prefix))


async def _busy_shard(tmp_path: Path) -> tuple[Shard, Node, dict[str, float]]:
    """A shard with several takeovers, seals, merges and deletes behind it."""
    shard = await Shard(tmp_path).create()
    expected: dict[str, float] = {}
    request = 0
    node = await shard.lead()
    for turn in range(6):
        for step in range(4):
            request += 1
            name, number = f"p{(turn * 3 + step) % 9}", float(request)
            await node.write(upsert(request, {name: number}))
            expected[name] = number
        request += 1
        await node.write(delete(request, f"p{turn}"))
        expected.pop(f"p{turn}", None)
        await node.seal()
        if turn in (1, 3):
            await node.crash()
            node = await shard.lead()
    return shard, node, expected


def test_garbage_goes_and_every_row_and_fence_stays(tmp_path: Path) -> None:
    """G-1, G-2."""

    async def scenario() -> None:
        shard, node, expected = await _busy_shard(tmp_path)
        before = len(shard.objects)
        await _after_grace(node)
        assert len(shard.objects) < before / 2
        wal = [await node.replica.wal.read(Slot(int(key[-20:]))) for key in _keys(shard, KEYS.wal)]
        fences = [record for record in wal if record and record.kind is RecordKind.FENCE]
        assert [fence.epoch for fence in fences] == [1, 2, 3]
        manifest = await shard.manifests.newest()
        assert manifest is not None
        listed = {file.key for entry in manifest.segments for file in entry.files}
        listed |= {entry.tombstones.key for entry in manifest.segments if entry.tombstones}
        assert set(_keys(shard, KEYS.segments)) == listed
        assert len(_keys(shard, KEYS.manifests)) == garbage.MANIFESTS_KEPT
        assert points_of(node.replica) == expected
        await node.crash()
        assert points_of((await shard.lead()).replica) == expected

    run(scenario())


def test_versions_that_somebody_else_collects_meanwhile_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by seed 1002: a primary that does not know yet that its epoch is over."""
    collect = VersionLog.collect

    async def late(self: VersionLog, keep_from: int, put_id: bytes) -> list[str]:
        await collect(self, keep_from, bytes(16))  # by somebody else
        return await collect(self, keep_from, put_id)

    monkeypatch.setattr(VersionLog, "collect", late)

    async def scenario() -> None:
        _, node, _ = await _busy_shard(tmp_path)
        assert node.primary is not None
        collector = node.primary._sealer._garbage
        # Nothing is ripe yet but the versions.
        assert await collector.collect(lambda segment: False) == ()
        assert collector.deleted == 0

    run(scenario())


def test_nothing_goes_before_the_grace_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        shard, node, _ = await _busy_shard(tmp_path)
        segments, wal = _keys(shard, KEYS.segments), _keys(shard, KEYS.wal)
        await asyncio.sleep(garbage.GRACE_S / 2)
        assert node.primary is not None
        await node.primary._sealer._garbage.collect(lambda segment: False)
        assert set(segments) <= set(_keys(shard, KEYS.segments))
        assert set(wal) <= set(_keys(shard, KEYS.wal))

    run(scenario())


def test_a_segment_under_construction_is_spared(tmp_path: Path) -> None:
    """Objects of our own epoch may be about to be committed: only the primary knows."""

    async def scenario() -> None:
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        assert node.primary is not None
        sealer = node.primary._sealer
        build, built, release = node.ports.builds.build, asyncio.Event(), asyncio.Event()

        async def held(order):  # type: ignore[no-untyped-def]
            entry = await build(order)
            built.set()
            await release.wait()
            return entry

        object.__setattr__(node.ports, "builds", type("Held", (), {"build": staticmethod(held)})())
        await node.write(upsert(1, {"a": 1.0}))
        sealer.start()
        await built.wait()
        assert _keys(shard, KEYS.segments)
        found = _keys(shard, KEYS.segments)
        await _after_grace(node)
        assert _keys(shard, KEYS.segments) == found
        release.set()
        await node.settle()
        assert points_of(node.replica) == {"a": 1.0}
        assert node.primary.serving

    run(scenario())


def test_a_primary_whose_epoch_is_over_deletes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        shard, node, _ = await _busy_shard(tmp_path)
        assert node.primary is not None
        collector = node.primary._sealer._garbage
        await (await shard.lead()).crash()
        before = dict(shard.objects)
        for _ in range(3):
            await asyncio.sleep(garbage.GRACE_S)
            assert list(await collector.collect(lambda segment: False)) == []
        assert set(before) <= set(shard.objects)

    run(scenario())


def test_a_collector_that_takes_fences_for_data_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: shows that the test of fences above can fail."""

    async def learn_wrongly(self: garbage.GarbageCollector, key: str) -> None:
        self._fences[key] = False

    monkeypatch.setattr(garbage.GarbageCollector, "_learn", learn_wrongly)

    async def scenario() -> None:
        shard, node, _ = await _busy_shard(tmp_path)
        await _after_grace(node)
        assert len(_keys(shard, KEYS.wal)) == 0

    run(scenario())
