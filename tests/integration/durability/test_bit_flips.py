"""One flipped bit anywhere in a bucket or a cache: noticed, named, never served, no crash loop.

Here every so manyth byte; `python -m tests.integration.durability.flips` tries them all.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
import xxhash

from shoal_cluster.bucket import envelope
from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.control.catalog import CatalogLog, Owner
from shoal_cluster.control.controller import PROMOTION_PAUSE_S_MAX, ControlLoop
from shoal_cluster.control.reconcile import CloseReplica, Command, OpenReplica, Promote
from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.observation import ReplicaState, ServerReport
from shoal_cluster.index import cost_model
from shoal_cluster.shard import segment_files
from shoal_cluster.shard.host import ShardHost
from tests.integration.durability.flips import (
    Findings,
    SmallBucket,
    class_of,
    codes_for_few_rows,
    enumerate_cache_flips,
    enumerate_flips,
    shown,
)
from tests.unit.shard.in_place import flip
from tests.unit.shard.nodes import KEYS, SCHEMA, SHARD, LoopClock, SeededIds, run

STRIDE = 61
CLASSES = {
    *("cluster", "catalog", "catalog floor", "manifest", "manifest floor", "log data", "fence"),
    *("vectors", "codes", "payload", "ids", "attributes", "meta", "tombstones"),
}
SERVER = ServerId("server-1")
WHILE_S = 90.0
"""In virtual time: without a pause a controller would open a damaged replica 300 times in it."""
ROUNDS_MAX = 1000
"""Three rounds a second, and some that a change begins at once."""


@pytest.fixture(autouse=True)
def small_segments_have_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "choose_family", codes_for_few_rows)


def findings_of(folder: Path, stride: int = STRIDE) -> Findings:
    async def scenario() -> Findings:
        bucket = await SmallBucket(folder).build()
        findings = await enumerate_flips(bucket, stride=stride)
        bucket.close()
        return findings

    return run(scenario())


@pytest.mark.slow
def test_a_flipped_bit_in_any_object_is_noticed_and_never_served(tmp_path):
    findings = findings_of(tmp_path)
    assert not findings.wrong, findings.table()
    assert set(findings.positions) == CLASSES
    # The offline check names everything; the scrubber whatever a running replica depends on.
    for name in CLASSES:
        assert findings.noticed[name, "check"] == findings.positions[name], findings.table()
    for name in ("vectors", "codes", "payload", "ids", "attributes", "meta", "tombstones"):
        assert findings.noticed[name, "scrub"] == findings.positions[name], findings.table()
    for name in ("codes", "attributes", "meta"):
        assert not findings.refused[name], "these are built again, and the shard opens"


@pytest.mark.slow
def test_a_flipped_bit_in_a_cached_copy_is_noticed_and_the_copy_replaced(tmp_path):
    async def scenario() -> Findings:
        bucket = await SmallBucket(tmp_path, in_place=False).build()
        findings = await enumerate_cache_flips(bucket, stride=STRIDE)
        bucket.close()
        return findings

    findings = run(scenario())
    assert not findings.wrong, findings.table()
    assert len(findings.positions) == 6


def test_files_that_nobody_compares_would_be_caught_here(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_files, "verify_files", lambda *_: None)
    assert findings_of(tmp_path, stride=97).wrong


def test_envelopes_that_nobody_compares_would_be_caught_here(tmp_path, monkeypatch):
    class Agreeable(bytes):
        __hash__ = None  # type: ignore[assignment]

        def __ne__(self, other: object) -> bool:
            return False

    digest = xxhash.xxh3_128_digest
    monkeypatch.setattr(envelope.xxhash, "xxh3_128_digest", lambda body: Agreeable(digest(body)))
    assert findings_of(tmp_path, stride=97).wrong


class OneServer:
    """The Servers port of a controller over a single host in this process."""

    def __init__(self, host: ShardHost) -> None:
        self.host = host
        self.commands: list[Command] = []
        self.rounds = 0

    def placed(self) -> Mapping[ServerId, str]:
        return {SERVER: "node-1"}

    async def report(self, server: ServerId) -> ServerReport:
        self.rounds += 1
        assert self.rounds < ROUNDS_MAX, "the controller goes round without a pause"
        return ServerReport(
            server=server,
            incarnation="only",
            address="nowhere",
            node="node-1",
            pid=1,
            memory_bytes=0,
            started_ms=0,
            replicas=tuple(self.host.reports()),
            followers={},
        )

    async def carry_out(self, command: Command) -> None:
        self.commands.append(command)
        if isinstance(command, OpenReplica):
            self.host.open(command.schema, command.shard)
        elif isinstance(command, Promote):
            await self.host.promote((command.collection, command.shard))
        elif isinstance(command, CloseReplica):
            await self.host.close((command.collection, command.shard))

    def publish(self, _: object) -> None:
        return None

    def given(self, kind: type[Command]) -> int:
        """Returns how many commands of a kind were given."""
        return sum(isinstance(command, kind) for command in self.commands)


def control_of(bucket: SmallBucket, servers: OneServer) -> ControlLoop:
    return ControlLoop(
        store=bucket.store,
        clock=LoopClock(),
        ids=SeededIds(3),
        servers=servers,
        audience=servers,
        cluster_uuid=bytes(16),
        owner=Owner(incarnation="me", address="here", since_ms=0, host="h"),
    )


def one_key_of_each_class(objects: Mapping[str, bytes]) -> dict[str, str]:
    """Returns class and key; of manifests and log the newest, which a start cannot do without."""
    return {class_of(key, objects[key]): key for key in sorted(objects)}


@pytest.mark.slow
def test_damage_of_no_class_sends_a_server_round_in_circles(tmp_path):
    """Under a real controller: loads, promotions and objects stay few, and no row is wrong."""
    loads: list[str] = []

    async def scenario() -> None:
        bucket = await SmallBucket(tmp_path).build()
        whole = dict(bucket.store.objects)
        for name, key in one_key_of_each_class(whole).items():
            bucket.store.objects[key] = flip(whole[key], len(whole[key]) // 2)
            await a_while(bucket, name)
            for added in set(bucket.store.objects) - set(whole):
                del bucket.store.objects[added]
            for key, body in whole.items():
                bucket.store.objects[key] = body
        bucket.close()

    async def a_while(bucket: SmallBucket, name: str) -> None:
        objects_before = len(bucket.store.objects)
        host = ShardHost(bucket.node().ports, lambda _: bucket.shard.network)
        host.start_scrubbing()
        servers = OneServer(host)
        control = control_of(bucket, servers)
        try:
            await control.claim()
        except ShoalError:
            assert name == "catalog", "a cluster starts unless its catalog is damaged"
            await host.close_all()
            return
        running = asyncio.ensure_future(control.run())
        await asyncio.sleep(WHILE_S)
        assert not running.done(), running.exception()
        opened, promoted = servers.given(OpenReplica), servers.given(Promote)
        (report,) = host.reports()
        if report.state is ReplicaState.READY:
            assert (
                report.leads
                and shown(host._hosted[report.collection, 0].replica)[:6] == (bucket.expected[:6])
            )
            assert promoted <= 3 and opened <= 3, f"{name}: {promoted} promotions, {opened} opens"
        else:
            loads.append(name)
            assert not promoted
            assert host._hosted[report.collection, 0].failures < 10, name
        assert len(bucket.store.objects) < objects_before + 20, name
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await host.close_all()

    run(scenario())
    # Only what holds rows, and the newest record of what was acknowledged, keeps a shard down.
    assert {"vectors", "ids", "payload", "manifest", "log data"} <= set(loads)
    assert not {"codes", "attributes", "meta"} & set(loads)


@pytest.mark.parametrize("what", ["manifest", "log"])
def test_a_takeover_that_meets_damage_is_tried_seldom_and_leaves_nothing_behind(tmp_path, what):
    """Each attempt would cost a manifest or, worse, a fence, and those are for ever."""

    async def scenario() -> None:
        bucket = await SmallBucket(tmp_path).build()
        objects = bucket.store.objects
        if what == "manifest":
            key = max(key for key in objects if key.startswith(KEYS.manifests))
        else:
            # A record that this replica has not applied yet.
            key = max(key for key in objects if key.startswith(KEYS.wal))
            last = objects.pop(key)
        host = ShardHost(bucket.node().ports, lambda _: bucket.shard.network)
        host.open(SCHEMA, SHARD)
        while host.reports()[0].state is ReplicaState.LOADING:
            await asyncio.sleep(0.01)
        if what == "log":
            objects[key] = last
        sound = objects[key]
        objects[key] = flip(sound, len(sound) // 2)
        before = set(objects)
        servers = OneServer(host)
        control = control_of(bucket, servers)
        await control.claim()
        running = asyncio.ensure_future(control.run())
        await asyncio.sleep(WHILE_S)
        assert not running.done(), running.exception()
        assert 5 < servers.given(Promote) < 2 * WHILE_S / PROMOTION_PAUSE_S_MAX
        assert not host.reports()[0].leads
        added = [key for key in set(objects) - before if key.startswith(KEYS.prefix)]
        assert len(added) <= 1, "the first attempt claims an epoch, the others look first"
        objects[key] = sound
        await asyncio.sleep(2 * PROMOTION_PAUSE_S_MAX)
        assert host.reports()[0].leads
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await host.close_all()
        bucket.close()

    run(scenario())


def test_a_directory_is_no_exception(tmp_path):
    """The same for the real directory store, one byte a class."""

    async def scenario() -> list[str]:
        bucket = await SmallBucket(tmp_path).build()
        chosen = one_key_of_each_class(bucket.store.objects)
        bucket.store = LocalStore(tmp_path / "bucket")
        missed = []
        catalog = CatalogLog(bucket.store, LoopClock(), SeededIds(1))
        for name, key in chosen.items():
            path = tmp_path / "bucket" / key
            sound = path.read_bytes()
            path.write_bytes(flip(sound, len(sound) // 3))
            node = bucket.node()
            try:
                await catalog.read()
                await node.load()
                assert shown(node.replica) == bucket.expected
                salvaged = [node.ports.files.salvage_of(one) for one in node.replica.state.segments]
                if not any(salvage and key in salvage.reason for salvage in salvaged):
                    missed.append(name)
            except ShoalError as error:
                assert key in error.message
            finally:
                await node.crash()
                path.write_bytes(sound)
        await bucket.store.close()
        bucket.close()
        return missed

    missed = asyncio.run(scenario())
    # Nothing of these is read to start the shard.
    assert set(missed) <= {"cluster", "catalog floor", "manifest floor"}
