"""Publishes what durability costs: acknowledgements, puts, takeovers and recovery.

    python -m tests.bench.durability [--smoke] [--json build/durability.json]

Acknowledgements and recovery run the shard's code in this process, without Ray, links or gRPC: what
is measured is the protocol. Takeovers run on a real cluster whose primary is killed or stopped.
Ends with status 1 when a target is missed.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

from shoal_cluster.bucket.open import open_store
from shoal_cluster.bucket.store import Store
from tests.bench import machine, takeovers
from tests.bench.one_shard import (
    MeteredStore,
    ShardProcess,
    create_shard,
    make_schema,
    make_vectors,
    moto_bucket,
    shard_process,
)
from tests.bench.recovery import recover_log, recover_segments

WRITER_COUNTS: Final = (1, 64)
PUT_DELAY_S: Final = 0.1
"""A put to S3 from the same region takes about so long."""

ROWS_PER_PUT_MIN: Final = 20.0
"""At 64 writers: below it, group commit does not work."""

TAKEOVER_P99_S_MAX: Final = 5.0
DIMENSION: Final = 384
_VECTORS: Final = 4096
_WARM_UP_WRITES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything. local_seconds, s3_seconds: of one number of writers.

    tail_bytes: of log that no segment covers. kills, stops: of a primary's process.
    """

    local_seconds: float
    s3_seconds: float
    segment_rows: int
    tail_bytes: int
    kills: int
    stops: int


FULL: Final = Size(
    local_seconds=5.0,
    s3_seconds=20.0,
    segment_rows=100_000,
    tail_bytes=60_000_000,
    kills=10,
    stops=10,
)
SMOKE: Final = Size(
    local_seconds=0.5,
    s3_seconds=1.5,
    segment_rows=4_000,
    tail_bytes=8_000_000,
    kills=1,
    stops=1,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="everything small, within 40 s")
    parser.add_argument("--json", type=Path, default=Path("build/durability.json"))
    options = parser.parse_args()
    figures = run(SMOKE if options.smoke else FULL, _teller(time.perf_counter()))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(render(figures))
    print(f"\nfigures are in {options.json}")
    for miss in figures["missed"]:
        print(f"missed: {miss}", file=sys.stderr)
    return 1 if figures["missed"] else 0


def run(size: Size, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything and returns the figures; `missed` names the targets not reached."""
    described = machine.describe_machine()
    with tempfile.TemporaryDirectory(prefix="shoal-durability-") as folder:
        directory = Path(folder)
        progress("acknowledgements, local directory")
        local = uvloop.run(_acknowledge_all(str(directory / "bucket"), 0.0, size.local_seconds))
        progress(f"acknowledgements, S3 (moto) with {PUT_DELAY_S * 1000:g} ms added to each put")
        with moto_bucket(directory / "moto.log") as url:
            remote = uvloop.run(_acknowledge_all(url, PUT_DELAY_S, size.s3_seconds))
        progress(f"recovery from {size.segment_rows:,} rows in segments")
        segments = uvloop.run(recover_segments(directory / "segments", size.segment_rows))
        progress(f"recovery from {size.tail_bytes:,} bytes of log")
        tail = uvloop.run(recover_log(directory / "tail", size.tail_bytes))
        taken = takeovers.measure(
            directory / "cluster", kills=size.kills, stops=size.stops, progress=progress
        )
    figures: dict[str, Any] = {
        "machine": described,
        "versions": machine.describe_versions(),
        "size": asdict(size),
        "put_delay_ms": PUT_DELAY_S * 1000,
        "acknowledgements": {"local": local, "s3": remote},
        "recovery": {"segments": segments, "log": tail},
        "takeovers": taken,
    }
    figures["missed"] = missed_targets(figures)
    return figures


def missed_targets(figures: Mapping[str, Any]) -> list[str]:
    """Returns in words which targets the figures miss."""
    missed = []
    for bucket, measured in figures["acknowledgements"].items():
        many = measured[-1]
        if many["rows_per_put"] < ROWS_PER_PUT_MIN:
            missed.append(
                f"{bucket}: {many['rows_per_put']} rows a put at {many['writers']} writers, "
                f"target {ROWS_PER_PUT_MIN:g}"
            )
    for strike, measured in figures["takeovers"]["strikes"].items():
        if measured["p99_s"] > TAKEOVER_P99_S_MAX:
            missed.append(
                f"takeover after {strike}: p99 {measured['p99_s']} s, target {TAKEOVER_P99_S_MAX:g}"
            )
    if figures["takeovers"]["rows_lost"]:
        missed.append(f"{figures['takeovers']['rows_lost']} acknowledged rows were lost")
    return missed


async def _acknowledge_all(url: str, put_delay_s: float, seconds: float) -> list[dict[str, Any]]:
    store = open_store(url)
    schema = make_schema(DIMENSION)
    vectors = make_vectors(_VECTORS, DIMENSION)
    try:
        await create_shard(store, schema)
        measured = []
        with tempfile.TemporaryDirectory(prefix="shoal-durability-") as scratch:
            metered = MeteredStore(store, put_delay_s)
            async with shard_process(metered, schema, Path(scratch)) as process:
                await process.load()
                await process.lead()
                for number in range(_WARM_UP_WRITES):
                    await process.upsert("warm-up", [f"warm-up-{number}"], vectors[:1])
                for writers in WRITER_COUNTS:
                    measured.append(await _acknowledge(process, metered, vectors, writers, seconds))
        return measured
    finally:
        await _close(store)


async def _acknowledge(
    process: ShardProcess, metered: MeteredStore, vectors: Any, writers: int, seconds: float
) -> dict[str, Any]:
    """Has writers put one row after another, each waiting for its acknowledgement."""
    puts, other_puts = metered.log_puts, metered.other_puts
    latencies_s: list[float] = []
    started_s = time.perf_counter()

    async def write(writer: int) -> None:
        number = 0
        while (before_s := time.perf_counter()) - started_s < seconds:
            row = (writer * 61 + number) % len(vectors)
            await process.upsert(
                f"{writers}-{writer}", [f"{writers}-{writer}-{number}"], vectors[row : row + 1]
            )
            latencies_s.append(time.perf_counter() - before_s)
            number += 1

    await asyncio.gather(*(write(writer) for writer in range(writers)))
    elapsed_s = time.perf_counter() - started_s
    puts = metered.log_puts - puts
    rows = len(latencies_s)
    p50_s, p99_s = np.percentile(latencies_s, [50, 99])
    return {
        "writers": writers,
        "rows": rows,
        "p50_ms": round(p50_s * 1e3, 2),
        "p99_ms": round(p99_s * 1e3, 2),
        "rows_per_s": round(rows / elapsed_s, 1),
        "log_puts_per_1000_rows": round(1000 * puts / rows, 1),
        "all_puts_per_1000_rows": round(1000 * (puts + metered.other_puts - other_puts) / rows, 1),
        "rows_per_put": round(rows / puts, 2),
    }


async def _close(store: Store) -> None:
    await store.close()


def render(figures: Mapping[str, Any]) -> str:
    """Returns the report; `figures` is what build/durability.json holds."""
    described = figures["machine"]
    lines = [
        f"{described['processor']}, {described['cores']} cores, {described['memory_gib']} GiB, "
        f"load average {described['load_average_1min']} before",
        "",
        f"one row of {DIMENSION} dimensions, acknowledged when durable and visible; the s3 bucket "
        f"is moto with {figures['put_delay_ms']:g} ms added to each put",
        f"{'bucket':8}{'writers':>8}{'p50 ms':>9}{'p99 ms':>9}{'rows/s':>9}{'rows/put':>10}"
        f"{'log puts/1,000':>16}{'all puts/1,000':>16}",
    ]
    for bucket, measured in figures["acknowledgements"].items():
        lines += [
            f"{bucket:8}{each['writers']:8}{each['p50_ms']:9.2f}{each['p99_ms']:9.2f}"
            f"{each['rows_per_s']:9.0f}{each['rows_per_put']:10.1f}"
            f"{each['log_puts_per_1000_rows']:16.1f}{each['all_puts_per_1000_rows']:16.1f}"
            for each in measured
        ]
    segments, log = figures["recovery"]["segments"], figures["recovery"]["log"]
    lines += [
        "",
        f"recovery of {segments['rows']:,} rows ({segments['bytes']:,} bytes) in "
        f"{segments['segments']} segments: load {segments['load_s']} s, take over "
        f"{segments['takeover_s']} s; {segments['s_per_million_rows']} s per million rows",
        f"recovery of {log['rows']:,} rows ({log['bytes']:,} bytes) of log in {log['slots']} "
        f"slots: load {log['load_s']} s, take over {log['takeover_s']} s; "
        f"{log['s_per_100_mb']} s per 100 MB",
        "(local directory, files in the page cache)",
        "",
        "from the signal to the primary's process until the next acknowledged write, through SDK "
        "and gRPC on real Ray, local directory",
    ]
    for strike, taken in figures["takeovers"]["strikes"].items():
        lines.append(
            f"  {strike:8} {taken['count']:3} times: p50 {taken['p50_s']} s, p99 {taken['p99_s']} "
            f"s, max {taken['max_s']} s (target p99 {TAKEOVER_P99_S_MAX:g} s)"
        )
    lines.append(
        f"  rows acknowledged meanwhile {figures['takeovers']['rows_acknowledged']:,}, lost "
        f"{figures['takeovers']['rows_lost']}"
    )
    return "\n".join(lines)


def _teller(started_s: float) -> Callable[[str], None]:
    """Returns what prints a step and how long the bench has run."""

    def tell(step: str) -> None:
        print(f"[{time.perf_counter() - started_s:6.1f} s] {step}", flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main())
