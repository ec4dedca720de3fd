"""Loads the collection and measures writes: bulk rows a second, and how long a single row's
acknowledgement (durable and visible) takes with one and with many writers.

    python -m tests.bench.writes [--rows 100000] [--seconds 8] [--json build/writes.json]

Alone it measures nothing but writes, on a cluster of its own: for work on the path of a write.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

import shoal
from chaos import cluster as clusters
from chaos.cluster import processes_of, wait_until
from shoal_cluster.bootstrap import RunningCluster
from shoal_cluster.bucket.open import open_store
from shoal_cluster.cli.demo.corpus import load_corpus
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.ids import CollectionId, ShardNumber
from shoal_cluster.domain.keys import ShardKeys, number_of
from shoal_cluster.domain.limits import SETTLE_OPERATIONS
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.manifest.manifest import Manifest
from shoal_cluster.shard.compaction import plan_compaction, plan_settling
from tests.bench.corpus import RECALL_TARGET, BenchCorpus, Floats, id_of, make_corpus
from tests.bench.machine import processor_seconds, title_of
from tests.bench.paths import SHARD

SETTLE_S: Final = 600.0
"""100,000 rows are indexed within a minute on two idle cores. As much again for every million."""

WRITER_COUNTS: Final = (1, 64)
TRANSPORTS: Final = ("auto", "grpc")
"""A fast lane if there is one, as the SDK is used; and gRPC alone."""

_TRANSPORT_NAMES: Final = {"auto": "lane", "grpc": "gRPC"}
_WRITES_COLLECTION: Final = "bench-writes"


def load(
    client: shoal.Client,
    name: str,
    corpus: BenchCorpus,
    progress: Callable[[str], None],
    recall_target: float = RECALL_TARGET,
) -> dict[str, Any]:
    """Creates the collection of one shard and one replica and loads it in bulk."""
    packages = load_corpus()
    payloads = [packages.payload(row) for row in range(len(packages.packages))]
    rows, dimension = corpus.vectors.shape
    collection = client.create_collection(name, dimension=dimension, recall_target=recall_target)
    started_s = time.perf_counter()
    collection.bulk_upsert(
        ids=[id_of(row) for row in range(rows)],
        vectors=corpus.vectors,
        payloads=[payloads[row % len(payloads)] for row in range(rows)],
        progress=_every_tenth(rows, progress),
    )
    elapsed_s = time.perf_counter() - started_s
    return {
        "rows": rows,
        "acknowledged_seconds": round(elapsed_s, 2),
        "rows_per_s": round(rows / elapsed_s),
    }


def render(loaded: dict[str, Any], written: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a report."""
    rows, acknowledged_s = loaded["rows"], loaded["acknowledged_seconds"]
    indexed_s = acknowledged_s + loaded["indexed_seconds"]
    lines = [
        f"bulk load: {rows:,} rows acknowledged in {acknowledged_s} s, {loaded['rows_per_s']:,} "
        f"rows/s; all in segments {loaded['indexed_seconds']} s later, "
        f"{round(rows / indexed_s):,} rows/s; compacted {loaded['settled_seconds']} s later, "
        f"{round(rows / (acknowledged_s + loaded['settled_seconds'])):,} rows/s"
    ]
    if "processor_seconds" in loaded:
        spent_s = loaded["processor_seconds"]
        lines.append(
            "  processor time, s: " + ", ".join(f"{role} {s:.1f}" for role, s in spent_s.items())
        )
    for each in written:
        spent_ms = each["processor_ms_per_row"]
        lines += [
            f"acknowledged upserts of one row, {_TRANSPORT_NAMES[each['transport']]}, "
            f"{each['writers']:>2} writers: p50 "
            f"{each['p50_ms']} ms, p99 {each['p99_ms']} ms, {each['rows_per_s']} rows/s, "
            f"{each['rows_per_put']} rows a PUT",
            "  processor time a row, ms: "
            + ", ".join(f"{role} {ms:.2f}" for role, ms in spent_ms.items()),
        ]
    return lines


def _every_tenth(rows: int, progress: Callable[[str], None]) -> Callable[[int, int | None], None]:
    reported = 0

    def report(done: int, total: int | None) -> None:
        nonlocal reported
        if done * 10 // rows > reported:
            reported = done * 10 // rows
            progress(f"loaded {done:,} of {rows:,} rows")

    return report


def settle(
    client: shoal.Client, cluster: RunningCluster, name: str, *, rows: int
) -> dict[str, Any]:
    """Waits until every shard is sealed and compacted as far as it goes; returns how they stand.

    rows: those that were loaded; a status that does not know all of them yet is too old.

    Asks the shards' own planners about the manifests in the bucket: waiting for nothing to change
    would end too early whenever a build is slow to start. indexed_seconds: until every row but a
    few was in some segment.
    """
    started_s = time.perf_counter()
    indexed_s = 0.0
    schema = client.describe_collection(name).schema
    keys = [ShardKeys(CollectionId(schema.id), ShardNumber(n)) for n in range(schema.shards)]

    def settled() -> dict[str, Any] | None:
        nonlocal indexed_s
        shards = sorted(client.status(name).collections[0].shards, key=lambda shard: shard.shard)
        found = [asyncio.run(_newest_manifest(cluster.bucket, each)) for each in keys]
        manifests = [manifest for manifest in found if manifest is not None]
        pairs = list(zip(shards, manifests, strict=False))
        # Up to here, rows wait for more to be sealed with.
        if len(manifests) < len(keys) or any(
            shard.seq - manifest.floor_seq >= SETTLE_OPERATIONS for shard, manifest in pairs
        ):
            return None
        if sum(shard.rows_live for shard in shards) != rows:
            return None
        indexed_s = indexed_s or time.perf_counter() - started_s
        if any(
            plan(manifest.segments, schema.dimension)
            for manifest in manifests
            for plan in (plan_compaction, plan_settling)
        ):
            return None
        if any(
            (shard.manifest_version, shard.segments) != (manifest.version, len(manifest.segments))
            for shard, manifest in pairs
        ):
            return None
        return {
            "indexed_seconds": round(indexed_s, 2),
            "settled_seconds": round(time.perf_counter() - started_s, 2),
            "segments": sum(shard.segments for shard in shards),
            "memtable_rows": sum(shard.memtable_rows for shard in shards),
            "rows_live": sum(shard.rows_live for shard in shards),
        }

    timeout_s = SETTLE_S * (1 + rows / 1_000_000)
    return wait_until(settled, timeout_s=timeout_s, what="the shards are sealed and compacted")


async def _newest_manifest(bucket: str, keys: ShardKeys) -> Manifest | None:
    store = open_store(bucket)
    try:
        return await Manifests(store, keys, SystemClock()).newest()
    finally:
        await store.close()


def acknowledgements(
    cluster: RunningCluster, vectors: Floats, *, seconds: float
) -> list[dict[str, Any]]:
    """Returns latency, rate and rows per WAL object of single-row upserts, by number of writers.

    Once it returns nothing is left of what was written. processor_ms_per_row: by process; builders
    are those of the rows' segments.
    """
    return [
        figures
        for transport in TRANSPORTS
        for figures in asyncio.run(_acknowledgements(cluster, vectors, seconds, transport))
    ]


async def _acknowledgements(
    cluster: RunningCluster, vectors: Floats, seconds: float, transport: Any
) -> list[dict[str, Any]]:
    async with shoal.AsyncClient(
        cluster.grpc_address, timeout_s=60.0, transport=transport
    ) as client:
        collection = await client.create_collection(
            _WRITES_COLLECTION, dimension=vectors.shape[1], recall_target=RECALL_TARGET
        )
        description = await collection.describe()
        keys = ShardKeys(CollectionId(description.schema.id), SHARD)
        # The first write opens connections and the shard's log.
        await collection.upsert(ids=["first"], vectors=vectors[:1])
        measured = []
        for writers in WRITER_COUNTS:
            slots_before = await _newest_slot(cluster.bucket, keys)
            latencies_s: list[float] = []
            spent_before_s = _processor_seconds(cluster)
            started_s = time.perf_counter()
            await asyncio.gather(
                *(
                    _write(
                        collection,
                        f"{writers}-{number}",
                        vectors[number::writers],
                        started_s + seconds,
                        latencies_s,
                    )
                    for number in range(writers)
                )
            )
            elapsed_s = time.perf_counter() - started_s
            spent_s = _processor_seconds(cluster)
            slots = await _newest_slot(cluster.bucket, keys) - slots_before
            p50_s, p99_s = np.percentile(latencies_s, [50, 99])
            measured.append(
                {
                    "transport": transport,
                    "writers": writers,
                    "p50_ms": round(p50_s * 1e3, 2),
                    "p99_ms": round(p99_s * 1e3, 2),
                    "rows_per_s": round(len(latencies_s) / elapsed_s),
                    "rows": len(latencies_s),
                    "rows_per_put": round(len(latencies_s) / max(slots, 1), 2),
                    "processor_ms_per_row": {
                        role: round(
                            (spent_s[role] - spent_before_s[role]) / len(latencies_s) * 1e3, 3
                        )
                        for role in spent_s
                    },
                }
            )
        await client.drop_collection(_WRITES_COLLECTION)
        await _until_deleted(cluster.bucket, keys)
        return measured


async def _until_deleted(bucket: str, keys: ShardKeys) -> None:
    """Waits until the controller has deleted a dropped shard: what comes next is measured alone."""
    store = open_store(bucket)
    try:
        async with asyncio.timeout(SETTLE_S):
            while await store.list(keys.prefix):
                await asyncio.sleep(0.1)
    finally:
        await store.close()


def _processor_seconds(cluster: RunningCluster) -> dict[str, float]:
    """Returns processor time so far by role; of processes that ended too: Ray starts and ends
    workers for builds.
    """
    spent_s = dict.fromkeys(("client", "coordinator", "shard server", "builders", "the rest"), 0.0)
    for process in processes_of(cluster):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = title_of(process)
            spent_s[_role(title)] += processor_seconds([process]).get(process.pid, 0.0)
            if title == "raylet":
                ended = process.cpu_times()
                spent_s["builders"] += ended.children_user + ended.children_system
    mine = psutil.Process()
    spent_s["client"] = processor_seconds([mine])[mine.pid]
    return spent_s


def _role(title: str) -> str:
    for word, role in (("Coordinator", "coordinator"), ("ShardServer", "shard server")):
        if word in title:
            return role
    return "builders" if "uild" in title else "the rest"


async def _write(
    collection: shoal.AsyncCollection,
    prefix: str,
    vectors: Floats,
    end_s: float,
    latencies_s: list[float],
) -> None:
    number = 0
    while (before_s := time.perf_counter()) < end_s:
        row = number % len(vectors)
        await collection.upsert(ids=[f"{prefix}-{number}"], vectors=vectors[row : row + 1])
        latencies_s.append(time.perf_counter() - before_s)
        number += 1


async def _newest_slot(bucket: str, keys: ShardKeys) -> int:
    """Returns the number of the last WAL object: one PUT made each, though it may be deleted."""
    store = open_store(bucket)
    try:
        slots = [number_of(entry.key) for entry in await store.list(keys.wal)]
        manifest = await Manifests(store, keys, SystemClock()).newest()
        return max(slots, default=0) if manifest is None else max(*slots, manifest.floor_slot, 0)
    finally:
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="of the bulk load")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each number of writers")
    parser.add_argument("--json", type=Path, default=Path("build/writes.json"))
    options = parser.parse_args()
    corpus = make_corpus(options.rows)
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder,
        clusters.running(Path(folder), servers=1) as cluster,
    ):
        written = acknowledgements(cluster, corpus.vectors, seconds=options.seconds)
        with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
            before_s = _processor_seconds(cluster)
            loaded = load(client, "bench", corpus, lambda step: None)
            acknowledged_s = _processor_seconds(cluster)
            loaded |= settle(client, cluster, "bench", rows=options.rows)
            loaded["processor_seconds"] = {
                role: round(spent_s - before_s[role], 1)
                for role, spent_s in {
                    **acknowledged_s,
                    "builders": _processor_seconds(cluster)["builders"],
                }.items()
            }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"load": loaded, "writes": written}, indent=1) + "\n")
    print("\n".join(render(loaded, written)))


if __name__ == "__main__":
    main()
