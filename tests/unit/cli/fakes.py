"""A cluster that exists only in memory, reached through the SDK's surface the CLI uses."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import shoal
from shoal.session import SessionToken
from shoal_cluster.bootstrap import RunningCluster, UpOptions
from shoal_cluster.cli.demo.evaluation import FILTER_CASES
from shoal_cluster.cli.session import Entrances
from shoal_cluster.domain.errors import Conflict
from shoal_protos.v1 import admin_pb2


@dataclass
class FakeRow:
    vector: Any
    direction: Any
    attributes: Mapping[str, Any]
    seq: int


@dataclass
class FakeBucket:
    """What survives a restart."""

    schemas: dict[str, shoal.CollectionSchema] = field(default_factory=dict)
    rows: dict[str, dict[str, FakeRow]] = field(default_factory=dict)
    recall: dict[str, tuple[shoal.RecallEstimate, ...]] = field(default_factory=dict)
    matrices: dict[tuple[str, str], tuple[list[str], Any]] = field(default_factory=dict)
    """By collection and filter: ids and vectors, made once between writes."""


@dataclass
class FakeWorld:
    """Starts and stops fake clusters; `entrances` is what a command gets.

    servers: a process each, so that a command can kill one; `raise_in` makes a client's method
    raise. forget, blur: ids that a restart loses, or whose vector it changes.
    """

    buckets: dict[str, FakeBucket] = field(default_factory=dict)
    up_calls: list[UpOptions] = field(default_factory=list)
    down_calls: list[str] = field(default_factory=list)
    clusters: dict[str, RunningCluster] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    raise_in: dict[str, BaseException] = field(default_factory=dict)
    forget: Sequence[str] = ()
    blur: Sequence[str] = ()
    misplace: Callable[[list[str]], list[str]] = lambda ids: ids
    connected_to: list[str] = field(default_factory=list)
    seqs: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def entrances(self) -> Entrances:
        return Entrances(up=self.up, down=self.down, running=self.running, client=self.client)

    def up(self, options: UpOptions) -> RunningCluster:
        self.up_calls.append(options)
        if options.name in self.clusters:
            raise Conflict(f"a cluster named {options.name!r} is running already")
        options.on_step(f"opening bucket {options.bucket}")
        bucket = self.buckets.setdefault(options.bucket, FakeBucket())
        if len(self.up_calls) > 1:
            bucket.matrices.clear()
            for rows in bucket.rows.values():
                for point_id in self.forget:
                    rows.pop(point_id, None)
                for point_id in self.blur:
                    rows[point_id].vector = rows[point_id].vector * 1.001
        cluster = RunningCluster(
            name=options.name,
            cluster_uuid="00000000-0000-0000-0000-000000000001",
            incarnation="1",
            bucket=options.bucket,
            grpc_address=f"127.0.0.1:{options.grpc_port}",
            ray_address="127.0.0.2:1",
            ray_pid=1,
            namespace="shoal",
            run_directory="/nowhere",
            started_ms=0,
        )
        self.clusters[options.name] = cluster
        return cluster

    def down(self, name: str, state_directory: Path, on_step: Callable[[str], None]) -> bool:
        self.down_calls.append(name)
        on_step("stopping")
        self.end_processes()
        return self.clusters.pop(name, None) is not None

    def running(self, name: str, state_directory: Path) -> RunningCluster | None:
        return self.clusters.get(name)

    def client(self, address: str, **options: Any) -> Any:
        self.connected_to.append(address)
        for cluster in self.clusters.values():
            if cluster.grpc_address == address:
                return FakeClient(self, self.buckets[cluster.bucket])
        return FakeClient(self, self.buckets.setdefault(address, FakeBucket()))

    def server_pids(self) -> dict[str, int]:
        """Starts again what was killed, as Ray would."""
        for server in ("server-0", "server-1"):
            process = self.processes.get(server)
            if process is None or process.poll() is not None:
                if process is not None:
                    end(process)
                self.processes[server] = subprocess.Popen(
                    [sys.executable, "-c", "import sys; sys.stdin.read()  # ray::ShardServer"],
                    stdin=subprocess.PIPE,
                )
        return {server: process.pid for server, process in self.processes.items()}

    def end_processes(self) -> None:
        for process in self.processes.values():
            end(process)
        self.processes.clear()


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


class FakeClient:
    def __init__(self, world: FakeWorld, bucket: FakeBucket) -> None:
        self.world = world
        self.bucket = bucket

    def __enter__(self) -> "FakeClient":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def _enter(self, method: str) -> None:
        if method in self.world.raise_in:
            raise self.world.raise_in[method]

    def create_collection(self, name: str, **options: Any) -> "FakeCollection":
        self._enter("create_collection")
        if name in self.bucket.schemas:
            raise shoal.AlreadyExists(f"collection {name!r} exists already", field="name")
        self.bucket.schemas[name] = shoal.CollectionSchema(
            name=name, id="0" * 32, version=1, **options
        )
        self.bucket.rows[name] = {}
        return self.collection(name)

    def collection(self, name: str, **_: Any) -> "FakeCollection":
        return FakeCollection(self, name)

    def describe_collection(self, name: str) -> shoal.CollectionDescription:
        self._enter("describe_collection")
        if name not in self.bucket.schemas:
            raise shoal.NotFound(f"there is no collection {name!r}", field="name")
        return shoal.CollectionDescription(
            schema=self.bucket.schemas[name],
            rows_live=len(self.bucket.rows[name]),
            recall=self.bucket.recall.get(name, ()),
        )

    def list_collections(self) -> list[shoal.CollectionSchema]:
        self._enter("list_collections")
        return list(self.bucket.schemas.values())

    def alter_collection(
        self,
        name: str,
        *,
        add_attributes: Mapping[str, Any] | None = None,
        if_version: int | None = None,
        **changes: Any,
    ) -> shoal.CollectionSchema:
        schema = self.describe_collection(name).schema
        if if_version is not None and if_version != schema.version:
            raise shoal.Conflict(f"schema has version {schema.version}", field="if_version")
        given = {key: value for key, value in changes.items() if value is not None}
        altered = replace(
            schema,
            attributes={**schema.attributes, **(add_attributes or {})},
            version=schema.version + 1,
            **given,
        )
        self.bucket.schemas[name] = altered
        return altered

    def drop_collection(self, name: str) -> None:
        self.describe_collection(name)
        del self.bucket.schemas[name]

    def status(self, collection: str = "") -> admin_pb2.StatusResponse:
        self._enter("status")
        pids = self.world.server_pids()
        return status_report(
            {
                name: (schema.shards, len(self.bucket.rows[name]))
                for name, schema in self.bucket.schemas.items()
                if collection in ("", name)
            },
            pids=pids,
        )


@dataclass
class FakeFound:
    ids: list[str]
    scores: Any


@dataclass
class FakeUpserted:
    seqs: list[int]
    session: SessionToken = field(default_factory=SessionToken)


class FakePoints(list[shoal.Point]):
    def by_id(self) -> dict[str, shoal.Point]:
        return {point.id: point for point in self}


class FakeCollection:
    """Answers by exact search."""

    def __init__(self, client: FakeClient, name: str) -> None:
        self._client = client
        self._name = name
        self._rows = client.bucket.rows[name]

    def bulk_upsert(self, *, progress: Callable[[int, int | None], None], **arrays: Any) -> int:
        self._client._enter("bulk_upsert")
        count = len(arrays["ids"])
        self._put(arrays)
        for done in range(0, count + 1, max(1, count // 4)):
            progress(done, count)
        return count

    def upsert(self, *, timeout_s: float | None = None, **arrays: Any) -> FakeUpserted:
        self._client._enter("upsert")
        return FakeUpserted(seqs=self._put(arrays))

    def _put(self, arrays: Mapping[str, Any]) -> list[int]:
        vectors = arrays["vectors"]
        directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self._client.bucket.matrices.clear()
        seqs = []
        for row, point_id in enumerate(arrays["ids"]):
            seqs.append(next(self._client.world.seqs))
            self._rows[point_id] = FakeRow(
                vector=vectors[row],
                direction=directions[row],
                attributes=arrays["attributes"][row],
                seq=seqs[-1],
            )
        return seqs

    def search(self, vector: Any, *, k: int, with_payload: bool) -> FakeFound:
        return self.search_batch(vector[None], k=k)[0]

    def search_batch(
        self, vectors: Any, *, k: int, filter: shoal.Filter | None = None, **_: Any
    ) -> list[FakeFound]:
        self._client._enter("search")
        ids, stacked = self._matching(filter)
        similarity = vectors @ stacked.T
        best = np.argsort(-similarity, axis=1)[:, :k]
        return [
            FakeFound(
                ids=self._client.world.misplace([ids[column] for column in columns]),
                scores=similarity[query, columns],
            )
            for query, columns in enumerate(best)
        ]

    def _matching(self, filter: shoal.Filter | None) -> tuple[list[str], Any]:
        matrices, key = self._client.bucket.matrices, (self._name, repr(filter))
        found = matrices.get(key)
        if found is None:
            case = next((case for case in FILTER_CASES if repr(case.filter) == repr(filter)), None)
            ids = [
                point_id
                for point_id, row in list(self._rows.items())
                if case is None or case.holds({"installed_kb": None, **row.attributes})
            ]
            found = ids, np.stack([self._rows[point_id].direction for point_id in ids])
            matrices[key] = found
        return found

    def count(self, **_: Any) -> int:
        return len(self._rows)

    def scroll(self, **_: Any) -> Iterator[shoal.Point]:
        self._client._enter("scroll")
        for point_id, row in self._rows.items():
            yield shoal.Point(id=point_id, vector=row.vector, seq=row.seq)

    def get(self, point_id: str, **_: Any) -> FakePoints:
        row = self._rows.get(point_id)
        return FakePoints([] if row is None else [shoal.Point(id=point_id, seq=row.seq)])


def status_report(
    collections: Mapping[str, tuple[int, int]], *, pids: Mapping[str, int]
) -> admin_pb2.StatusResponse:
    """A healthy report. collections: (shards, rows) by name; every server holds every shard.

    Shards are led by the servers in turn, the partition attribute is the demo's.
    """
    servers = sorted(pids)
    report = admin_pb2.StatusResponse(
        version="0.1.0", cluster_uuid="u", uptime_ms=61_000, bucket="b", age_ms=7
    )
    report.nodes.add(id="n" * 56, address="127.0.0.2", state="alive", cpus=2)
    for server in servers:
        report.actors.add(
            id=server, kind="shard_server", pid=pids[server], node="n" * 56, state="ready",
            memory_bytes=150 * 2**20, uptime_ms=60_000, address=f"unix:{server}",
        )  # fmt: skip
    for name, (shards, rows) in collections.items():
        listed = report.collections.add(rows_live=rows)
        listed.schema.name = name
        listed.schema.shards = shards
        listed.schema.replicas = len(servers)
        listed.schema.recall_target = 0.98
        for number in range(shards):
            shard = listed.shards.add(shard=number, epoch=1, seq=rows, rows_live=rows // shards)
            for position, server in enumerate(servers):
                shard.replicas.add(
                    server=server,
                    state="ready",
                    role=admin_pb2.REPLICA_ROLE_PRIMARY
                    if number % len(servers) == position
                    else admin_pb2.REPLICA_ROLE_FOLLOWER,
                    set_checksum=2**63 + number,
                )
    return report
