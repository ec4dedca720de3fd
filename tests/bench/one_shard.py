"""One shard without Ray, sockets or SDK: the shard's code over a bucket, in this process."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import boto3
import botocore.exceptions
import numpy as np

from chaos.cluster import free_port, wait_until
from shoal_cluster.bucket.store import ObjectEntry, PutOutcome, Store
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Overloaded
from shoal_cluster.domain.ids import (
    CollectionId,
    Epoch,
    ShardNumber,
    Slot,
    SystemIdGenerator,
)
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.domain.observation import ReplicaReport, ReplicaState
from shoal_cluster.domain.point import NO_PROVENANCE, Vectors, encode_tail
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.segment.build import SegmentInput
from shoal_cluster.shard.building import BuildOrder, Builds, LocalBuilds
from shoal_cluster.shard.calls import WriteCall, WriteKind, WriteReply
from shoal_cluster.shard.compute import ThreadCompute
from shoal_cluster.shard.host import ShardHost, ShardName
from shoal_cluster.shard.ports import Publisher, ShardPorts
from shoal_cluster.shard.segment_files import SegmentFiles

SHARD: Final = ShardNumber(0)
CLUSTER_UUID: Final = bytes(16)
SEED: Final = 7
PAYLOAD: Final = b'{"text": "%s"}' % (b"x" * 200)
"""Of about the size of a title, a path and a few numbers."""

_THREADS: Final = 2
_POLL_S: Final = 0.005
_OVERLOAD_PAUSE_S: Final = 0.05
_MOTO_START_S: Final = 30.0


class MeteredStore:
    """A store that counts what is put, and takes longer over it.

    put_delay_s: added before each put is sent, as a bucket far away would take.
    """

    def __init__(self, store: Store, put_delay_s: float = 0.0) -> None:
        self._store = store
        self._put_delay_s = put_delay_s
        self.log_puts = 0
        self.other_puts = 0
        self.log_bytes = 0

    async def create(self, key: str, body: bytes) -> PutOutcome:
        await self._before_put(key, len(body))
        return await self._store.create(key, body)

    async def create_file(self, key: str, path: Path) -> PutOutcome:
        await self._before_put(key, 0)
        return await self._store.create_file(key, path)

    async def get(self, key: str) -> bytes | None:
        return await self._store.get(key)

    async def get_range(self, key: str, start: int, length: int) -> bytes | None:
        return await self._store.get_range(key, start, length)

    async def list(self, prefix: str) -> list[ObjectEntry]:
        return await self._store.list(prefix)

    async def delete(self, key: str) -> None:
        await self._store.delete(key)

    async def make_durable(self, prefix: str) -> None:
        await self._store.make_durable(prefix)

    def local_path(self, key: str) -> Path | None:
        return self._store.local_path(key)

    async def close(self) -> None:
        await self._store.close()

    async def _before_put(self, key: str, size_bytes: int) -> None:
        if "/wal/" in key:
            self.log_puts += 1
            self.log_bytes += size_bytes
        else:
            self.other_puts += 1
        if self._put_delay_s:
            await asyncio.sleep(self._put_delay_s)


class StalledBuilds:
    """Builders that never finish: the log grows until writers are told to wait."""

    async def build(
        self, order: BuildOrder, rows: SegmentInput | None = None
    ) -> SegmentEntry | None:
        await asyncio.Event().wait()
        raise AssertionError(f"nobody ends the wait for segment {order.segment}")

    def expect_load(self) -> None:
        return None


class _NoFollowers:
    """The Publisher of a shard with one replica."""

    def record(self, slot: Slot, body: bytes) -> None:
        return None

    def manifest(self) -> None:
        return None


@dataclass(slots=True)
class ShardProcess:
    """A host with one replica, as a shard server's process has it."""

    schema: CollectionSchema
    host: ShardHost
    _request_numbers: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> ShardName:
        return (self.schema.id, SHARD)

    @property
    def report(self) -> ReplicaReport:
        return self.host.reports()[0]

    async def load(self) -> None:
        """Opens the replica: the newest manifest's segments and the log's tail."""
        self.host.open(self.schema, SHARD)
        while self.report.state is ReplicaState.LOADING:
            await asyncio.sleep(_POLL_S)
        assert self.report.state is ReplicaState.READY, self.report.reason

    async def lead(self) -> Epoch:
        return await self.host.promote(self.name)

    async def upsert(self, client: str, ids: list[str], vectors: Vectors) -> None:
        """Writes points and returns when acknowledged; waits while the shard asks to."""
        number = self._request_numbers[client] = self._request_numbers.get(client, 0) + 1
        call = WriteCall(
            collection=self.schema.id,
            shard=SHARD,
            client_id=client,
            request_no=number,
            kind=WriteKind.UPSERT,
            ids=[point.encode() for point in ids],
            tails=[encode_tail(1.0, {}, PAYLOAD, NO_PROVENANCE)] * len(ids),
            body=vectors.tobytes(),
        )
        while True:
            try:
                (fate,) = await self.host.write([call])
                assert isinstance(fate, WriteReply), fate
            except Overloaded:
                await asyncio.sleep(_OVERLOAD_PAUSE_S)
            else:
                return


def make_schema(dimension: int) -> CollectionSchema:
    return CollectionSchema(
        id=CollectionId("b" * 32),
        name="bench",
        dimension=dimension,
        metric=Metric.COSINE,
        attributes={},
        shards=1,
        recall_target=0.95,
    )


def make_vectors(rows: int, dimension: int) -> Vectors:
    """Returns unit vectors, the same for the same shape."""
    vectors = np.random.default_rng(SEED).standard_normal((rows, dimension), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


async def create_shard(store: Store, schema: CollectionSchema) -> ShardKeys:
    """Creates the empty shard in the bucket, as the controller does for a new collection."""
    keys = ShardKeys(schema.id, SHARD)
    await Manifests(store, keys, SystemClock()).create_first()
    return keys


@contextlib.asynccontextmanager
async def shard_process(
    store: Store, schema: CollectionSchema, scratch: Path, builds: Builds | None = None
) -> AsyncIterator[ShardProcess]:
    """Assembles a process's ports over `store`; nothing is loaded yet. builds None: in threads."""
    clock = SystemClock()
    compute = ThreadCompute(_THREADS)
    scratch.mkdir(parents=True, exist_ok=True)
    ports = ShardPorts(
        store=store,
        clock=clock,
        ids=SystemIdGenerator(),
        compute=compute,
        search_workers=_THREADS,
        background=compute,
        files=SegmentFiles(store, scratch / "cache", compute),
        builds=builds or LocalBuilds(store, scratch, clock, compute),
        cluster_uuid=CLUSTER_UUID,
    )
    process = ShardProcess(schema, ShardHost(ports, _no_followers))
    try:
        yield process
    finally:
        await process.host.close_all()
        compute.close()


@contextlib.contextmanager
def moto_bucket(log: Path) -> Iterator[str]:
    """Runs an S3 server of moto's in a process of its own; yields the URL of an empty bucket."""
    port = free_port()
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    before = {name: os.environ.get(name) for name in credentials}
    os.environ.update(credentials)
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=output,
        )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")

        def created() -> bool:
            try:
                client.create_bucket(Bucket="bench")
            except botocore.exceptions.EndpointConnectionError:
                assert server.poll() is None, log.read_text()
                return False
            return True

        wait_until(created, timeout_s=_MOTO_START_S, what="moto answers")
        client.close()
        yield f"s3://bench/run?endpoint={endpoint}&allow_http=true&region=us-east-1"
    finally:
        server.terminate()
        server.wait(10)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _no_followers(name: ShardName) -> Publisher:
    return _NoFollowers()
