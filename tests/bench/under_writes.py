"""How much slower reads get while rows are written and segments built and merged.

    python -m tests.bench.under_writes [--rows 100000] [--seconds 60] [--rate 1000]
                                       [--json build/bench-under-writes.json]

A client process searches at a steady pace, first with nothing else going on, then while another one
upserts `rate` rows a second in batches, half of them rows that exist, then at rest again once
everything is compacted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

import shoal
from chaos import cluster as clusters
from chaos.watching import BuildWatch
from tests.bench import machine, writes
from tests.bench.corpus import BenchCorpus, K, id_of, make_corpus
from tests.bench.figures import note_figures

COLLECTION: Final = "under-writes"
READS_PER_S: Final = 50.0
BATCH_ROWS: Final = 100
P99_RATIO_MAX: Final = 2.5


def run(
    corpus: BenchCorpus, *, seconds: float, rate: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """corpus: half of its rows are loaded beforehand, the other half is written."""
    described = machine.describe_machine()
    loaded = len(corpus.vectors) // 2
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder,
        clusters.running(Path(folder), servers=1) as cluster,
        shoal.Client(cluster.grpc_address, timeout_s=60.0) as client,
    ):
        progress(f"loading {loaded:,} rows")
        collection = client.create_collection(COLLECTION, dimension=corpus.vectors.shape[1])
        collection.bulk_upsert(
            ids=[id_of(row) for row in range(loaded)], vectors=corpus.vectors[:loaded]
        )
        writes.settle(client, cluster, COLLECTION, rows=loaded)
        np.save(Path(folder) / "queries.npy", corpus.queries)
        reader = _Reader(cluster.grpc_address, Path(folder) / "queries.npy")
        try:
            reader.read(5.0)  # connections, and the pace of searches
            progress("reading at rest")
            rest_before = reader.read(seconds / 2)
            progress(f"reading while {rate:g} rows a second are written")
            builds = BuildWatch(cluster)
            builds.start()
            reader.begin(seconds)
            written = _write(collection, corpus, loaded, seconds=seconds, rate=rate)
            under_writes = reader.end()
            builds.stop()
            progress("waiting until everything is compacted")
            rows = collection.count()
            writes.settle(client, cluster, COLLECTION, rows=rows)
            progress("reading at rest again")
            rest_after = reader.read(seconds / 2)
        finally:
            reader.close()
    rest = np.concatenate([rest_before, rest_after])
    p99_ms = {
        "rest": float(np.percentile(rest, 99)),
        "writes": float(np.percentile(under_writes, 99)),
    }
    return {
        "machine": described,
        "rows_loaded": loaded,
        "reads_per_s": READS_PER_S,
        "rows_written": written,
        "rows_written_per_s": round(written / seconds),
        "building_share": round(sum(b - a for a, b in builds.spans_s()) / seconds, 2),
        "reads": {"rest": len(rest), "writes": len(under_writes)},
        "p50_ms": {
            "rest": round(float(np.percentile(rest, 50)), 3),
            "writes": round(float(np.percentile(under_writes, 50)), 3),
        },
        "p99_ms": {name: round(each, 3) for name, each in p99_ms.items()},
        "p99_ratio_under_writes": round(p99_ms["writes"] / p99_ms["rest"], 2),
    }


def _write(
    collection: shoal.Collection, corpus: BenchCorpus, loaded: int, *, seconds: float, rate: float
) -> int:
    """Upserts at the rate, by turns a batch of new rows and one of rows that exist."""
    began_s = time.monotonic()
    written = 0
    batch = 0
    while (now_s := time.monotonic()) < began_s + seconds:
        due_s = began_s + written / rate
        if now_s < due_s:
            time.sleep(due_s - now_s)
        start = (batch // 2 * BATCH_ROWS) % (loaded - BATCH_ROWS)
        if batch % 2 == 0:
            start += loaded
        rows = range(start, start + BATCH_ROWS)
        collection.upsert(ids=[id_of(row) for row in rows], vectors=corpus.vectors[rows])
        written += BATCH_ROWS
        batch += 1
    return written


class _Reader:
    """A process of its own that searches at a steady pace."""

    def __init__(self, address: str, queries: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.under_writes", "--reader", address, str(queries)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """Returns the latencies in milliseconds."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reading process ended with status {self._process.wait()}")
        return np.array(json.loads(line))

    def read(self, seconds: float) -> Any:
        self.begin(seconds)
        return self.end()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10.0)


def _serve_reader(address: str, path: str) -> None:
    queries = np.load(path)
    with shoal.Client(address, timeout_s=60.0) as client:
        collection = client.collection(COLLECTION)
        number = 0
        for line in sys.stdin:
            latencies_ms: list[float] = []
            began_s = time.monotonic()
            due_s = began_s
            while due_s < began_s + float(line):
                time.sleep(max(0.0, due_s - time.monotonic()))
                before_s = time.monotonic()
                collection.search(queries[number % len(queries)], k=K, with_payload=False)
                after_s = time.monotonic()
                # From when it was due: a slow read must not hide those that waited behind it.
                latencies_ms.append(round((after_s - min(before_s, due_s)) * 1e3, 3))
                number += 1
                due_s += 1 / READS_PER_S
            print(json.dumps(latencies_ms), flush=True)


def render(figures: Mapping[str, Any]) -> str:
    p50, p99 = figures["p50_ms"], figures["p99_ms"]
    return (
        f"{figures['rows_loaded']:,} rows, {figures['reads_per_s']:g} reads/s: "
        f"p50 {p50['rest']} ms, p99 {p99['rest']} ms at rest; "
        f"p50 {p50['writes']} ms, p99 {p99['writes']} ms while "
        f"{figures['rows_written_per_s']} rows/s were written and "
        f"{figures['building_share']:.0%} of the time something was built: p99 ratio "
        f"{figures['p99_ratio_under_writes']} (at most {P99_RATIO_MAX})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--json", type=Path, default=Path("build/bench-under-writes.json"))
    parser.add_argument("--reader", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        _serve_reader(*options.reader)
        return
    figures = run(
        make_corpus(options.rows),
        seconds=options.seconds,
        rate=options.rate,
        progress=lambda step: print(step, flush=True),
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    note_figures(p99_ratio_under_writes=figures["p99_ratio_under_writes"])
    print(render(figures))


if __name__ == "__main__":
    main()
