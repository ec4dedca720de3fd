"""A shard on several simulated processes over one bucket, in virtual time, from a seed."""

import asyncio
import random
import selectors
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shoal_cluster.bucket.faults import NO_FAULTS, FaultPlan, FaultStore
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.domain.ids import CollectionId, Epoch, ShardNumber, Slot
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.domain.point import NO_PROVENANCE, encode_tail
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.filtering.expression import Comparison, Expression, Operator
from shoal_cluster.filtering.wire import to_wire
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.shard.building import LocalBuilds
from shoal_cluster.shard.calls import WriteCall, WriteKind, WriteReply
from shoal_cluster.shard.compute import InlineCompute
from shoal_cluster.shard.host import ShardHost
from shoal_cluster.shard.ports import ShardPorts
from shoal_cluster.shard.primary import Primary
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.segment_files import SegmentFiles
from shoal_cluster.shard.takeover import take_over

T = TypeVar("T")

CLUSTER_UUID = bytes(range(16))
DIMENSION = 4
SCHEMA = CollectionSchema(
    id=CollectionId("c" * 32),
    name="tests",
    dimension=DIMENSION,
    metric=Metric.L2,
    attributes={"color": AttributeType.KEYWORD, "size": AttributeType.INT},
    shards=1,
    recall_target=0.95,
)
SHARD = ShardNumber(0)
KEYS = ShardKeys(SCHEMA.id, SHARD)

VIRTUAL_S_MAX = 10_000.0
"""A test that waits longer waits for something that never happens."""


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: tells how long it should have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("every task waits for another: a deadlock")
            self.now_s += max(timeout, 0.0)
            if self.now_s > VIRTUAL_S_MAX:
                raise AssertionError(f"not done after {VIRTUAL_S_MAX} virtual seconds")
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer. Threads must not be used under it."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a test's coroutine in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class LoopClock:
    """The time of the running loop."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_ms(self) -> int:
        return round(1000 * self.monotonic_s())

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


class SeededIds:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def put_id(self) -> bytes:
        return self._rng.randbytes(16)

    def hex(self, size_bytes: int) -> str:
        return self._rng.randbytes(size_bytes).hex()


class Network:
    """Carries pushes from a primary to all other nodes; `connected` says whether it does."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.connected = True

    def record(self, slot: Slot, body: bytes) -> None:
        if self.connected:
            for node in self.nodes:
                node.replica.offer(slot, body)

    def manifest(self) -> None:
        if self.connected:
            for node in self.nodes:
                node.replica.wake()


async def write(to: Primary | ShardHost, call: WriteCall) -> WriteReply:
    """Writes one call that goes alone. Raises: the error that became of it."""
    (fate,) = await to.write([call])
    if isinstance(fate, ShoalError):
        raise fate
    return fate


class Node:
    """One process with one replica, which may lead."""

    def __init__(self, store: Store, seed: int, scratch: Path, network: Network) -> None:
        self.store = store
        scratch.mkdir(parents=True, exist_ok=True)
        clock = LoopClock()
        compute = InlineCompute()
        self.ports = ShardPorts(
            store=store,
            clock=clock,
            ids=SeededIds(seed),
            compute=compute,
            search_workers=2,
            background=compute,
            files=SegmentFiles(store, scratch / "cache", compute),
            builds=LocalBuilds(store, scratch, clock, compute),
            cluster_uuid=CLUSTER_UUID,
        )
        self.network = network
        self.replica = Replica(SCHEMA, SHARD, self.ports)
        self.primary: Primary | None = None

    async def load(self) -> "Node":
        await self.replica.load()
        self.network.nodes.append(self)
        return self

    async def promote(self) -> Epoch:
        """Takes over; the same steps as ShardHost.promote."""
        async with self.replica.advancing:
            epoch = await take_over(self.replica)
            self.primary = Primary(self.replica, epoch, self.network)
            self.primary.start()
        return epoch

    async def crash(self) -> None:
        """Ends every task of the process; nothing is said to anybody."""
        if self in self.network.nodes:
            self.network.nodes.remove(self)
        if self.primary is not None:
            await self.primary.close()
        await self.replica.close()

    async def write(self, call: WriteCall) -> WriteReply:
        assert self.primary is not None
        return await write(self.primary, call)

    async def seal(self) -> None:
        """Seals what is in memory now and waits until it, and what follows from it, is done."""
        assert self.primary is not None
        sealer = self.primary._sealer
        if not sealer.busy:
            sealer.start()
        await self.settle()

    async def settle(self) -> None:
        """Waits for seals and compactions under way."""
        assert self.primary is not None
        sealer = self.primary._sealer
        while sealer.busy or sealer.compacting:
            tasks = [task for task in (sealer._seal, sealer._compaction) if task is not None]
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)


class Shard:
    """A bucket with one empty shard, and nodes made on demand."""

    def __init__(self, scratch: Path, seed: int = 0) -> None:
        self.objects: dict[str, bytes] = {}
        self.network = Network()
        self._scratch = scratch
        self._seed = seed
        self._made = 0

    @property
    def bucket(self) -> MemoryStore:
        """A handle that never fails."""
        return MemoryStore(self.objects)

    async def create(self) -> "Shard":
        await self.manifests.create_first()
        return self

    @property
    def manifests(self) -> Manifests:
        return Manifests(self.bucket, KEYS, LoopClock())

    def node(self, plan: FaultPlan = NO_FAULTS, store: Store | None = None) -> Node:
        """Makes a process with a store of its own; call load() on it."""
        self._made += 1
        seed = 1000 * self._seed + self._made
        if store is None:
            rng = random.Random(seed)
            store = FaultStore(self.bucket, plan=plan, rng=rng, clock=LoopClock())
        return Node(store, seed, self._scratch / f"node-{self._made}", self.network)

    async def lead(self) -> Node:
        """Returns a new, loaded and leading node."""
        node = await self.node().load()
        await node.promote()
        return node

    async def follow(self) -> Node:
        return await self.node().load()


def tail(color: str = "red", size: int = 0, payload: bytes = b"") -> bytes:
    return encode_tail(1.0, {"color": color, "size": size}, payload, NO_PROVENANCE)


def vector(value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full(DIMENSION, value, dtype=np.float32)


def upsert(
    request_no: int,
    points: Mapping[str, float],
    *,
    client: str = "client",
    color: str = "red",
    **conditions: Any,
) -> WriteCall:
    """Returns a call that writes points; a point's number is its vector and its size."""
    body = np.array([vector(value) for value in points.values()], dtype=np.float32).tobytes()
    return WriteCall(
        collection=SCHEMA.id,
        shard=SHARD,
        client_id=client,
        request_no=request_no,
        kind=WriteKind.UPSERT,
        ids=[point.encode() for point in points],
        tails=[tail(color, int(value)) for value in points.values()],
        body=body,
        **conditions,
    )


def delete(request_no: int, *points: str, client: str = "client", **conditions: Any) -> WriteCall:
    return WriteCall(
        collection=SCHEMA.id,
        shard=SHARD,
        client_id=client,
        request_no=request_no,
        kind=WriteKind.DELETE,
        ids=[point.encode() for point in points],
        **conditions,
    )


def patch(
    request_no: int, patches: Mapping[str, Mapping[str, Any]], *, client: str = "client"
) -> WriteCall:
    return WriteCall(
        collection=SCHEMA.id,
        shard=SHARD,
        client_id=client,
        request_no=request_no,
        kind=WriteKind.PATCH,
        ids=[point.encode() for point in patches],
        patches=list(patches.values()),
    )


def delete_where(request_no: int, expression: Expression, *, client: str = "client") -> WriteCall:
    return WriteCall(
        collection=SCHEMA.id,
        shard=SHARD,
        client_id=client,
        request_no=request_no,
        kind=WriteKind.DELETE_WHERE,
        filter=to_wire(expression),
    )


def colored(color: str) -> Expression:
    return Comparison("color", Operator.EQ, color)


def points_of(replica: Replica, expression: Expression | None = None) -> dict[str, float]:
    """Returns what a replica shows: point to number, through scroll."""
    from shoal_cluster.shard import rows

    snapshot = replica.state.snapshot()
    ids, places = rows.scroll(snapshot, b"", 1000, expression)
    vectors = rows.vectors_of(snapshot, places, DIMENSION)
    return {point.decode(): float(found[0]) for point, found in zip(ids, vectors, strict=True)}


def ids(points: Sequence[str]) -> list[bytes]:
    return [point.encode() for point in points]
