"""One shard that is led and scrubbed by a host, in virtual time: what tests of scrubbing act on."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from shoal_cluster.bucket.faults import FaultStore
from shoal_cluster.domain.observation import ReplicaState
from shoal_cluster.index.cost_model import FamilyChoice
from shoal_cluster.index.families import CodeShape, Family
from shoal_cluster.manifest.manifest import FileEntry
from shoal_cluster.shard import host as hosting
from shoal_cluster.shard.host import ShardHost
from shoal_cluster.shard.scrubbing import RECHECK_S
from tests.unit.shard.in_place import InPlaceStore, flip
from tests.unit.shard.nodes import (
    SCHEMA,
    SHARD,
    LoopClock,
    Shard,
    delete,
    points_of,
    run,
    upsert,
    write,
)

NAME = (SCHEMA.id, SHARD)
POINTS = {f"p{number:03d}": float(number) for number in range(96)}
LEFT = {point: value for point, value in POINTS.items() if point != "p000"} | {"new": 7.0}


class Served:
    """A host with the shard's primary: a segment with codes and tombstones, and a log's tail."""

    def __init__(self, scratch: Path, *, in_place: bool) -> None:
        self.shard = Shard(scratch)
        root = scratch / "bucket"
        if in_place:
            self.store = InPlaceStore(root)
            self.shard.objects = self.store.objects
        else:
            rng, clock = random.Random(7), LoopClock()
            self.store = FaultStore(self.shard.bucket, rng=rng, clock=clock)
        self.host = ShardHost(self.shard.node(store=self.store).ports, lambda _: self.shard.network)

    async def start(self) -> "Served":
        await self.shard.create()
        await self.open()
        await self.host.promote(NAME)
        await self.write(upsert(1, POINTS))
        await self.seal()
        await self.write(delete(2, "p000"))
        await self.seal()
        await self.write(upsert(3, {"new": 7.0}))
        assert self.points() == LEFT
        return self

    @property
    def hosted(self) -> hosting._Hosted:
        return self.host._hosted[NAME]

    @property
    def replica(self):
        return self.hosted.replica

    async def write(self, call) -> None:
        await write(self.host, call)

    def points(self) -> dict[str, float]:
        return points_of(self.replica)

    async def seal(self) -> None:
        sealer = self.hosted.primary._sealer
        sealer.start()
        await sealer._seal
        await settled(self)

    async def open(self) -> None:
        """Has it opened as often as a controller would, until it is ready."""
        self.host.open(SCHEMA, SHARD)
        while self.host.reports()[0].state is not ReplicaState.READY:
            await asyncio.sleep(0.3)
            self.host.open(SCHEMA, SHARD)

    def file(self, name: str) -> FileEntry:
        (entry,) = self.replica.manifest.segments
        if name == "tombstones":
            return entry.tombstones
        return {file.name: file for file in entry.files}[name]

    def damage(self, key: str, at: int | None = None) -> str:
        """Flips a bit in the middle of an object."""
        body = self.shard.objects[key]
        self.shard.objects[key] = flip(body, len(body) // 2 if at is None else at)
        return key

    async def scrub(self) -> list[str]:
        """Lets a pass begin and end; returns the keys it complained of."""
        self.replica.suspected = True
        replica, passes = self.replica, self.host.scrubber.passes
        async with asyncio.timeout(10 * RECHECK_S):
            await self.host.scrubber.visit_due()
        assert self.host.scrubber.passes == passes + 1 and not replica.suspected
        await asyncio.sleep(0)
        return [key for key in self.shard.objects if key in self.said()]

    def said(self) -> str:
        return self.host.reports()[0].reason

    async def close(self) -> None:
        await self.host.close_all()


async def settled(served: Served) -> None:
    """Waits until the primary has no background work left."""
    sealer = served.hosted.primary._sealer
    while True:
        await asyncio.sleep(1)
        tasks = [task for task in sealer._tasks() if not task.done()]
        if not tasks:
            return
        await asyncio.gather(*tasks, return_exceptions=True)


def scenario(
    tmp_path: Path, test: Callable[[Served], Awaitable[None]], *, in_place: bool = True
) -> None:
    async def whole() -> None:
        served = await Served(tmp_path, in_place=in_place).start()
        await test(served)
        await served.close()

    run(whole())


async def assert_loads_elsewhere(served: Served, expected: dict[str, float]) -> None:
    """A server that starts from the bucket alone finds every row."""
    other = await served.shard.node(store=served.store).load()
    assert points_of(other.replica) == expected
    for segment in other.replica.state.segments:
        assert other.ports.files.salvage_of(segment) is None
    await other.crash()


def always_codes(rows, model, recall_target):
    """In place of cost_model.choose_family: small segments have codes too."""
    if rows < 32:
        return FamilyChoice(family=Family.FLAT, shape=None, reason="for the test")
    shape = CodeShape(values_a_code=2)
    return FamilyChoice(family=Family.FAST_SCAN, shape=shape, reason="for the test")
