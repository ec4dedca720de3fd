"""A shard over S3 through a network that loses, delays and refuses: no promise is broken.

The same clients, takeovers and checks as tests/integration/shard (simulation.py), but with the real
object store client, real HTTP and real time, against a moto server behind a misbehaving proxy.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from shoal_cluster.bucket.object_store import ObjectStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.domain.ids import Slot
from shoal_cluster.domain.keys import epoch_of_segment, number_of
from shoal_cluster.domain.observation import ReplicaState
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.manifest.manifest import Manifest
from shoal_cluster.shard import paced_reading
from shoal_cluster.shard.host import ShardHost
from shoal_cluster.wal import log as wal_log
from tests.integration.durability.faulty_proxy import (
    FORTUNE,
    FaultyProxy,
    Misfortune,
    Misfortunes,
    faulty_proxy,
)
from tests.integration.shard import simulation as simulations
from tests.integration.shard.simulation import History, Simulation, find_violation
from tests.unit.shard.in_place import flip
from tests.unit.shard.nodes import (
    KEYS,
    SCHEMA,
    SHARD,
    LoopClock,
    Node,
    Shard,
    points_of,
    upsert,
    write,
)

NAME = (SCHEMA.id, SHARD)
CREATE_TIMEOUT_S = 2.0
RUN_S_MAX = 90.0
"""A run takes about ten seconds on an idle machine."""

EVERYTHING = Misfortunes(
    conflict_not_stored=0.05,
    lands_late=0.06,
    reply_lost=0.06,
    request_lost=0.03,
    unavailable=0.03,
)


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    """Address of an S3 server that has the bucket `shoal-test`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="shoal-test")
        client.close()
        yield host, port
        server.stop()


@pytest.fixture(autouse=True)
def clients_think_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "THINK_S_MAX", 0.15)


class S3Simulation(Simulation):
    """The simulation over a bucket that is really elsewhere."""

    def __init__(self, scratch: Path, seed: int, proxy: FaultyProxy, plan: Misfortunes) -> None:
        super().__init__(scratch, seed)
        self.proxy = proxy
        self.misfortunes = plan
        self.url = proxy.url(f"run-{seed}-{scratch.name}")
        self.direct = ObjectStore.from_url(self.url)
        """Used only while nothing goes wrong, or for what a person would do by hand."""

    async def run(self) -> History:
        await Manifests(self.direct, KEYS, LoopClock()).create_first()
        self.proxy.plan = self.misfortunes
        return await super().run()

    async def _start_node(self, *, lead: bool) -> Node | None:
        store = ObjectStore.from_url(self.url, create_timeout_s=CREATE_TIMEOUT_S)
        node = self.shard.node(store=store)
        try:
            await node.load()
            if lead:
                await node.promote()
                self.history.takeovers += 1
        except ShoalError:
            await node.crash()
            return None
        self.nodes.append(node)
        return node

    async def _crash(self, node: Node) -> None:
        self.nodes.remove(node)
        await node.crash()

    async def _collect(self) -> None:
        """As garbage collection does it, by a bystander; what the log loses is kept for judging."""
        try:
            entries = await self.direct.list(KEYS.prefix)
            newest = await Manifests(self.direct, KEYS, LoopClock()).newest()
            for entry in entries:
                if newest is not None:
                    await self._collect_object(entry.key, newest)
        except ShoalError:
            return  # asks again later

    async def _collect_object(self, key: str, newest: Manifest) -> None:
        if key.startswith(KEYS.wal) and Slot(number_of(key)) <= newest.floor_slot:
            body = await self.direct.get(key)
            if body is not None and b"\xa4kind\xa4data" in body:
                self.history.buried[key] = body
                await self.direct.delete(key)
        elif key.startswith(KEYS.segments):
            segment = key.removeprefix(KEYS.segments).split("/", maxsplit=1)[0]
            listed = {entry.id for entry in newest.segments}
            if segment not in listed and epoch_of_segment(segment) < newest.epoch:
                await self.direct.delete(key)

    async def _finish(self) -> None:
        for node in list(self.nodes):
            await self._crash(node)
        self.proxy.plan = FORTUNE
        await asyncio.to_thread(self.proxy.settle)
        node = await self.shard.node(store=ObjectStore.from_url(self.url)).load()
        await node.promote()
        self.history.final = points_of(node.replica)
        self.history.final_sum = node.replica.state.sum
        await node.crash()
        for entry in await self.direct.list(KEYS.wal):
            body = await self.direct.get(entry.key)
            assert body is not None
            self.shard.objects[entry.key] = body


def judge(
    scratch: Path, moto: tuple[str, int], seed: int, plan: Misfortunes
) -> tuple[str, History, FaultyProxy]:
    """Runs one seed; returns the violation or '', what happened, and the proxy's counts."""

    async def whole() -> str:
        async with asyncio.timeout(RUN_S_MAX):
            await simulation.run()
            return await find_violation(simulation)

    with faulty_proxy(*moto, seed) as proxy:
        simulation = S3Simulation(scratch, seed, proxy, plan)
        try:
            return asyncio.run(whole()), simulation.history, proxy
        except (ShoalError, AssertionError) as error:
            return f"{type(error).__name__}: {error}", simulation.history, proxy


@pytest.mark.parametrize("seed", range(20))
def test_every_misfortune_befalls_even_a_short_run(seed):
    """Chance alone leaves one kind or another out of 40 puts with ten of these seeds."""
    proxy = FaultyProxy("127.0.0.1", 0, seed)
    assert {proxy.draw("PUT") for _ in range(40)} == {Misfortune.NONE}
    proxy.plan = EVERYTHING
    assert {proxy.draw("PUT") for _ in range(40)} == set(Misfortune)


@pytest.mark.slow
def test_no_promise_is_broken_over_a_misbehaving_object_store(tmp_path, moto):
    violation, history, proxy = judge(tmp_path, moto, 1, EVERYTHING)
    assert not violation, f"{violation} after {dict(proxy.counts)}"
    # The check is worth something only if things were done, and went wrong.
    assert sum(bool(operation.replies) for operation in history.operations) > 20
    assert history.takeovers >= 3 and history.reads
    for misfortune in Misfortune:
        assert proxy.counts[misfortune.value], misfortune


@pytest.mark.slow
@pytest.mark.parametrize("only", ["conflict_not_stored", "lands_late", "reply_lost"])
def test_no_promise_is_broken_by_one_misfortune_alone(tmp_path, moto, only, monkeypatch):
    monkeypatch.setattr(simulations, "OPERATIONS", 5)
    plan = replace(FORTUNE, **{only: 0.25})
    violation, history, proxy = judge(tmp_path, moto, 2, plan)
    assert not violation, f"{violation} after {dict(proxy.counts)}"
    assert history.takeovers and proxy.counts[only]


@pytest.mark.slow
def test_taking_exists_for_success_would_be_caught_here(tmp_path, moto, monkeypatch):
    async def careless(store, key, body, **_):
        await store.create(key, body)

    monkeypatch.setattr(wal_log, "create", careless)
    monkeypatch.setattr(simulations, "OPERATIONS", 5)
    plan = Misfortunes(conflict_not_stored=0.2, lands_late=0.2)
    violation, _, _ = judge(tmp_path, moto, 3, plan)
    assert violation and "Unavailable" not in violation


@pytest.mark.slow
def test_objects_in_s3_are_compared_and_put_again_from_cached_copies(tmp_path, moto, monkeypatch):
    monkeypatch.setattr(paced_reading, "FETCH_PIECE_BYTES", 3000)  # several ranges each

    async def until(condition) -> None:
        async with asyncio.timeout(RUN_S_MAX):
            while not condition():
                await asyncio.sleep(0.05)

    async def scenario(store: ObjectStore) -> None:
        shard = Shard(tmp_path)
        await Manifests(store, KEYS, LoopClock()).create_first()
        host = ShardHost(shard.node(store=store).ports, lambda _: shard.network)
        host.open(SCHEMA, SHARD)
        await until(lambda: host.reports()[0].state is ReplicaState.READY)
        await host.promote(NAME)
        points = {f"p{number:03d}": float(number) for number in range(200)}
        await write(host, upsert(1, points))
        primary, replica = host._hosted[NAME].primary, host._hosted[NAME].replica
        primary._sealer.start()
        await primary._sealer._seal
        (entry,) = replica.manifest.segments

        async def find() -> set[str]:
            replica.doubted.add(entry.id)
            await host.scrubber.objects.visit_due()
            return {damage.key for damage in host.scrubber.objects.damages_of(replica)}

        assert await find() == set()
        assert host.scrubber.objects.read_bytes == sum(file.size_bytes for file in entry.files)
        damaged = {}
        for number, file in enumerate(entry.files):
            body = await store.get(file.key)
            bad = (flip(body, len(body) - 1), body + b"more", body[:-1], None)[number % 4]
            await store.delete(file.key)
            if bad is not None:
                assert await store.create(file.key, bad) is PutOutcome.CREATED
            damaged[file.key] = file.name
        assert await find() == damaged.keys()
        await host.scrubber.visit_due()
        await until(lambda: replica.manifest.segments[0] != entry)
        await primary._sealer._repair
        assert await find() == set()
        await host.close_all()
        node = await shard.node(store=store).load()
        assert points_of(node.replica) == points
        await node.crash()

    with faulty_proxy(*moto, seed=5) as proxy:
        asyncio.run(scenario(ObjectStore.from_url(proxy.url("scrubbed"))))


def test_the_proxy_does_to_puts_what_it_says(moto):
    async def scenario() -> None:
        with faulty_proxy(*moto, seed=4) as proxy:
            store = ObjectStore.from_url(proxy.url("proxy"), create_timeout_s=CREATE_TIMEOUT_S)
            for number, misfortune in enumerate(Misfortune):
                if misfortune is Misfortune.NONE:
                    continue
                key = misfortune.value
                proxy.plan = replace(FORTUNE, burst=1, **{misfortune.value: 1.0})
                outcome = await store.create(key, b"%d" % number)
                proxy.plan = FORTUNE
                await asyncio.to_thread(proxy.settle)
                stored = await store.get(key)
                assert outcome.value == "unresolved"
                lands = misfortune in (Misfortune.LANDS_LATE, Misfortune.REPLY_LOST)
                assert (stored is not None) == lands, misfortune
            assert (await store.create("plain", b"x")).value == "created"
            assert (await store.create("plain", b"y")).value == "unresolved"
            assert await store.get("plain") == b"x"

    asyncio.run(scenario())
