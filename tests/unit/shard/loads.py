"""Bulk loads against shards of `nodes.py`: a coordinator's part, and a process that stops dead."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal_cluster.bucket import envelope
from shoal_cluster.bucket.envelope import EnvelopeKind
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import PutOutcome, Store
from shoal_cluster.control.catalog import CatalogLog, CollectionRecord
from shoal_cluster.domain.errors import Outcome, Unavailable
from shoal_cluster.domain.ids import Epoch, ServerId, ShardNumber
from shoal_cluster.domain.keys import CLUSTER_KEY, LoadKeys
from shoal_cluster.domain.shard_caller import Body
from shoal_cluster.domain.topology import CollectionPlace, ShardPlace, Topology
from shoal_cluster.ingest.loads import ChunkRequest, Loader, LoadProgress
from shoal_cluster.shard import garbage
from shoal_cluster.shard.checking import check_bucket
from shoal_cluster.shard.load_objects import Decision, decide
from shoal_cluster.shard.loading_calls import LoadCall
from tests.unit.shard.nodes import (
    CLUSTER_UUID,
    SCHEMA,
    SHARD,
    LoopClock,
    Node,
    SeededIds,
    Shard,
    delete,
    upsert,
)

Points = Mapping[str, float]

COLLECTION = SCHEMA.name
PATIENCE_S = 60.0

CHUNKS = {"0-0": {"a": 1.0, "n": 2.0}, "0-1": {"b": 3.0, "m": 4.0, "c": 5.0}}
ALL = {point: value for points in CHUNKS.values() for point, value in points.items()}
LOAD_KEYS = LoadKeys(SCHEMA.id, SHARD, "l1")

BEFORE = {"a": 10, "b": 20, "c": 21, "d": 12, "e": 22}
AFTER = {**BEFORE, **ALL}


class Stoppable(MemoryStore):
    """A store whose process stops dead before its n-th put: nothing is answered any more."""

    def __init__(self, objects: dict[str, bytes], puts: int | None = None) -> None:
        super().__init__(objects)
        self.puts_left = puts
        self.puts = 0
        self.stopped = asyncio.Event()

    async def _stop_if_due(self) -> None:
        if self.puts_left is not None and self.puts >= self.puts_left:
            self.stopped.set()
        if self.stopped.is_set():
            await asyncio.get_running_loop().create_future()

    async def create(self, key: str, body: bytes) -> PutOutcome:
        await self._stop_if_due()
        self.puts += 1
        return await super().create(key, body)

    async def create_file(self, key: str, path: Any) -> PutOutcome:
        await self._stop_if_due()
        self.puts += 1
        return await super().create_file(key, path)

    async def get(self, key: str) -> bytes | None:
        if self.stopped.is_set():
            await asyncio.get_running_loop().create_future()
        return await super().get(key)


class OneShard:
    """ShardCaller and TopologySource of a collection with one shard, led by `leader`."""

    def __init__(self, leader: Node) -> None:
        self.leader: Node | None = leader

    def current(self) -> Topology:
        place = ShardPlace(
            shard=SHARD, primary=ServerId("s"), epoch=Epoch(1), replicas=(ServerId("s"),)
        )
        collection = CollectionPlace(schema=SCHEMA, shards=(place,))
        return Topology(version=1, cluster_uuid=CLUSTER_UUID, collections={SCHEMA.name: collection})

    async def newer_than(self, version: int, timeout_s: float) -> Topology:
        await asyncio.sleep(timeout_s)
        return self.current()

    async def call(
        self,
        server: ServerId,
        method: str,
        header: object,
        body: Body = b"",
        *,
        timeout_s: float,
        on_lost: Outcome,
    ) -> tuple[Any, memoryview]:
        assert method == LoadCall.METHOD
        if self.leader is None or self.leader.primary is None:
            raise Unavailable("nobody leads")
        fields: Any = header
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self.leader.primary.load(LoadCall.from_wire(fields))
        except TimeoutError:
            raise Unavailable("no answer") from None
        return reply.to_wire(), memoryview(b"")


def loader_of(leader: Node, store: Store | None = None, seed: int = 99) -> Loader:
    """A coordinator that finds the shard at `leader`. store: its own handle on the bucket."""
    calls = OneShard(leader)
    return Loader(
        store=lambda: leader.store if store is None else store,
        caller=calls,
        topology=calls,
        clock=LoopClock(),
        ids=SeededIds(seed),
    )


def chunk_of(load: str, chunk: str, points: Points, *, color: str = "red") -> ChunkRequest:
    """A point's number is its vector and its size, as in `nodes.upsert`."""
    return ChunkRequest(
        collection=COLLECTION,
        load=load,
        chunk=chunk,
        digest=7,
        ids=list(points),
        vectors=np.array(
            [[value] * SCHEMA.dimension for value in points.values()], dtype=np.float32
        ),
        attributes=[{"color": color, "size": int(value)} for value in points.values()],
    )


async def stage(loader: Loader, load: str, chunks: Mapping[str, Points]) -> None:
    for name, points in chunks.items():
        await loader.stage(chunk_of(load, name, points))


async def commit(loader: Loader, load: str, chunks: Sequence[str]) -> LoadProgress:
    """Asks until it is committed, as a client does."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            progress = await loader.commit(COLLECTION, load, chunks, timeout_s=5)
            if progress.committed:
                return progress


async def run_load(loader: Loader, load: str, chunks: Mapping[str, Points]) -> LoadProgress:
    """Everything a client does, from the start or from wherever it was."""
    status = await loader.status(COLLECTION, load)
    if status.decided is None:
        missing = {name: rows for name, rows in chunks.items() if name not in status.chunks}
        await stage(loader, load, missing)
    return await commit(loader, load, list(chunks))


async def catalogued(shard: Shard) -> Shard:
    """Adds what makes the objects a whole bucket, so that it can be checked."""
    header = {"put_id": bytes(16), "cluster_uuid": CLUSTER_UUID, "conformance": {}}
    shard.objects[CLUSTER_KEY] = envelope.encode(EnvelopeKind.CLUSTER, header)
    log = CatalogLog(shard.bucket, LoopClock(), SeededIds(1))
    record = CollectionRecord(schema=SCHEMA, assignment=(("server-1",),))
    await log.update(lambda catalog: catalog.with_record(record))
    return shard


async def problems_of(shard: Shard) -> list[str]:
    report = await check_bucket(shard.bucket, deep=True, progress=lambda done, total: None)
    return [f"{problem.key}: {problem.message}" for problem in report.problems]


async def shard_with_rows(scratch: Path) -> tuple[Shard, Node]:
    """a: in a segment; b: in a segment, replaced in memory; c: in memory; d, e: not in the load."""
    shard = await catalogued(await Shard(scratch).create())
    node = await shard.lead()
    await node.write(upsert(1, {"a": 10, "b": 11, "d": 12, "gone": 13}))
    await node.seal()
    await node.write(upsert(2, {"b": 20, "c": 21, "e": 22}))
    await node.write(delete(3, "gone"))
    return shard, node


async def after_grace(node: Node, seconds: float = garbage.GRACE_S) -> None:
    """Lets time pass for two rounds of collection: one condemns, one deletes."""
    for _ in range(3):
        await asyncio.sleep(seconds)
        sealer = node.primary._sealer
        sealer.tidy()
        if sealer._collection is not None:
            await sealer._collection


async def prepared_and_decided(shard: Shard, node: Node) -> Mapping[ShardNumber, Epoch]:
    """Takes load l1 to its decision, in one process; returns who prepared it."""
    epochs = await prepared_only(node)
    decision = Decision(commit=True, rows=len(ALL), epochs=epochs)
    await decide(shard.bucket, node.ports.clock, LOAD_KEYS, decision, bytes(16))
    return epochs


async def prepared_only(node: Node) -> Mapping[ShardNumber, Epoch]:
    """Has load l1 staged and prepared, and nothing decided."""
    loader = loader_of(node)
    await stage(loader, "l1", CHUNKS)
    receipts = await loader._rows_of(LOAD_KEYS, list(CHUNKS))
    epochs = await loader._prepare(SCHEMA, "l1", list(CHUNKS), receipts, 1000.0)
    assert epochs == {SHARD: node.primary.epoch}
    return epochs
