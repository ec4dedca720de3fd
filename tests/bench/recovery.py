"""Measures how long a process takes to serve a shard again: from segments, and from the log.

Both load a bucket in a local directory that was filled by the shard's own code a moment ago, so
files are in the page cache: what counts is reading, checking and opening, not the disk.
"""

import asyncio
import time
from pathlib import Path
from typing import Any, Final

from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.domain import limits
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Overloaded
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.manifest.commit import Manifests
from tests.bench.one_shard import (
    MeteredStore,
    ShardProcess,
    StalledBuilds,
    create_shard,
    make_schema,
    make_vectors,
    shard_process,
)

SEGMENT_DIMENSION: Final = 384
LOG_DIMENSION: Final = 1536
"""Large rows: the log reaches its bound in bytes before its bound in rows."""

BATCH_ROWS: Final = 500
IN_FLIGHT: Final = 4
SETTLE_S: Final = 600.0
"""100,000 rows are sealed and merged within a minute or two on two idle cores."""

_QUIET_S: Final = 5.0
"""Longer than a quiet primary waits between two looks at what there is to merge."""
_POLL_S: Final = 0.1


async def recover_segments(directory: Path, rows: int) -> dict[str, Any]:
    """Returns how long it takes to load and take over a shard whose rows are all in segments."""
    store = LocalStore(directory / "bucket")
    schema = make_schema(SEGMENT_DIMENSION)
    keys = await create_shard(store, schema)
    try:
        async with shard_process(store, schema, directory / "writer") as process:
            await process.load()
            await process.lead()
            await _fill(process, rows)
            await _settle(process)
        # Not a listing: that would count what was merged and waits to be deleted.
        manifest = await Manifests(store, keys, SystemClock()).newest()
        assert manifest is not None, "it was created"
        files = [file for entry in manifest.segments for file in entry.files]
        figures = await _recover(store, schema, directory / "reader")
    finally:
        await store.close()
    recovered_s = figures["load_s"] + figures["takeover_s"]
    return figures | {
        "bytes": sum(file.size_bytes for file in files),
        "s_per_million_rows": round(recovered_s * 1e6 / figures["rows"], 2),
    }


async def recover_log(directory: Path, tail_bytes: int) -> dict[str, Any]:
    """Returns how long it takes to replay a tail that builders never turned into segments.

    tail_bytes: less when writers are told to wait before the log is that long.
    """
    store = MeteredStore(LocalStore(directory / "bucket"))
    schema = make_schema(LOG_DIMENSION)
    keys = await create_shard(store, schema)
    vectors = make_vectors(BATCH_ROWS, LOG_DIMENSION)
    try:
        builds = StalledBuilds()
        async with shard_process(store, schema, directory / "writer", builds) as process:
            await process.load()
            await process.lead()
            batch = 0
            while store.log_bytes < tail_bytes:
                ids = [f"{batch}-{row}" for row in range(BATCH_ROWS)]
                try:
                    async with asyncio.timeout(2 * _QUIET_S):
                        await process.upsert("writer", ids, vectors)
                except TimeoutError:
                    break  # the shard asks to wait: the tail is as long as it may be
                batch += 1
        entries = await store.list(keys.wal)
        # Nothing may be sealed here either, or the tail would shrink while it is measured.
        figures = await _recover(store, schema, directory / "reader", stalled=True)
    finally:
        await store.close()
    size_bytes = sum(entry.size_bytes for entry in entries)
    recovered_s = figures["load_s"] + figures["takeover_s"]
    return figures | {
        "bytes": size_bytes,
        "slots": len(entries),
        "s_per_100_mb": round(recovered_s * 1e8 / size_bytes, 2),
    }


async def _recover(
    store: LocalStore | MeteredStore,
    schema: CollectionSchema,
    scratch: Path,
    *,
    stalled: bool = False,
) -> dict[str, Any]:
    """Loads the shard in a fresh process's state, takes it over and writes one row."""
    builds = StalledBuilds() if stalled else None
    async with shard_process(store, schema, scratch, builds) as process:
        started_s = time.perf_counter()
        await process.load()
        loaded_s = time.perf_counter()
        await process.lead()
        leads_s = time.perf_counter()
        report = process.report
        try:
            async with asyncio.timeout(_QUIET_S):
                await process.upsert("next", ["next"], make_vectors(1, schema.dimension))
            acknowledged = True
        except (TimeoutError, Overloaded):
            acknowledged = False  # with a full tail and no builders, waiting is the answer
        return {
            "rows": report.live_rows,
            "segments": report.segments,
            "load_s": round(loaded_s - started_s, 3),
            "takeover_s": round(leads_s - loaded_s, 3),
            "next_write_acknowledged": acknowledged,
        }


async def _fill(process: ShardProcess, rows: int) -> None:
    vectors = make_vectors(rows, SEGMENT_DIMENSION)

    async def write(writer: int) -> None:
        for start in range(writer * BATCH_ROWS, rows, IN_FLIGHT * BATCH_ROWS):
            part = vectors[start : start + BATCH_ROWS]
            ids = [f"row-{start + row:012d}" for row in range(len(part))]
            await process.upsert(f"writer-{writer}", ids, part)

    await asyncio.gather(*(write(writer) for writer in range(IN_FLIGHT)))


async def _settle(process: ShardProcess) -> None:
    """Waits until the shard, left alone, seals and merges nothing more."""
    last, since_s = (-1, -1, -1), time.perf_counter()
    deadline_s = since_s + SETTLE_S
    while True:
        report = process.report
        now = (report.unsealed_rows, report.segments, report.manifest_version)
        busy = report.sealing or report.unsealed_rows >= limits.SETTLE_OPERATIONS
        if now != last or busy:
            last, since_s = now, time.perf_counter()
        elif time.perf_counter() - since_s >= _QUIET_S:
            return
        assert time.perf_counter() < deadline_s, f"not settled within {SETTLE_S:g} s: {now}"
        await asyncio.sleep(_POLL_S)
