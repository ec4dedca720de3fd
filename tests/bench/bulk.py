"""Loads rows past the log and says how many a second are committed and indexed, and at what memory.

    python -m tests.bench.bulk [--rows 100000] [--json build/bulk.json]

Two loads into collections of one shard: the first starts the builders' processes, the second finds
them. Time is from the call until the rows are durable, visible and in segments with codes; the
collection is then asked, so that nothing is counted that cannot be found.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil

import shoal
from chaos import cluster as clusters
from chaos.cluster import processes_of
from shoal_cluster.bootstrap import RunningCluster
from tests.bench.corpus import RECALL_TARGET, BenchCorpus, make_corpus
from tests.bench.machine import title_of

_RUNS: Final = ("cold", "warm")
_MIB: Final = 1024 * 1024
_ROLES: Final = {
    "client": "client",
    "Coordinator": "coordinator",
    "ShardServer": "shard server",
    "Builder": "builders",
}


def measure(
    cluster: RunningCluster, corpus: BenchCorpus, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Returns rows a second of both loads and each process's peak memory after them."""
    rows, dimension = corpus.vectors.shape
    figures: dict[str, Any] = {"rows": rows, "dimension": dimension}
    with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
        for run in _RUNS:
            name = f"bench-bulk-{run}"
            collection = client.create_collection(
                name, dimension=dimension, recall_target=RECALL_TARGET
            )
            progress(f"loading {rows:,} rows past the log, {run}")
            staged_s = 0.0
            spent_s = _processor_seconds(cluster)
            started_s = time.perf_counter()

            def told(at: shoal.LoadProgress, started_s: float = started_s) -> None:
                nonlocal staged_s
                if at.rows_staged == rows and not staged_s:
                    staged_s = time.perf_counter() - started_s

            result = client.load(name, corpus.vectors, progress=told)
            elapsed_s = time.perf_counter() - started_s
            assert result.rows == collection.count(consistency="strong") == rows
            hit = collection.search(corpus.vectors[rows // 2], k=1, exact=True).ids[0]
            assert int(hit) < rows, "the rows are searched"
            spent_after_s = _processor_seconds(cluster)
            figures[run] = {
                "seconds": round(elapsed_s, 2),
                "staged_seconds": round(staged_s, 2),
                "rows_per_s": round(rows / elapsed_s),
                "processor_seconds": {
                    role: round(spent_after_s[role] - spent_s[role], 1) for role in spent_s
                },
            }
            figures["peak_mib"] = _peaks(cluster)
            # At once, so that merging its segments does not take the cores from the next.
            client.drop_collection(name)
    return figures


def _processor_seconds(cluster: RunningCluster) -> dict[str, float]:
    """Returns processor time so far by role, of threads that have ended too."""
    spent_s = dict.fromkeys(("client", "coordinator", "shard server", "builders"), 0.0)
    for process in (psutil.Process(), *processes_of(cluster)):
        title = "client" if process.pid == psutil.Process().pid else title_of(process)
        for word, role in _ROLES.items():
            if word in title:
                times = process.cpu_times()
                spent_s[role] += times.user + times.system
    return spent_s


def _peaks(cluster: RunningCluster) -> dict[str, int]:
    """Returns the peak resident memory of each process of ours, mapped files included."""
    peaks: dict[str, int] = {}
    for process in (psutil.Process(), *processes_of(cluster)):
        title = "client" if process.pid == psutil.Process().pid else title_of(process)
        if title != "client" and "ray::" not in title:
            continue
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peaks[title] = max(peaks.get(title, 0), int(line.split()[1]) * 1024 // _MIB)
    return peaks


def render(figures: dict[str, Any]) -> list[str]:
    lines = []
    for run in _RUNS:
        at = figures[run]
        lines.append(
            f"bulk load past the log, {run}: {figures['rows']:,} x {figures['dimension']} "
            f"staged in {at['staged_seconds']} s, committed and indexed after {at['seconds']} s: "
            f"{at['rows_per_s']:,} rows/s; processor time, s: "
            + ", ".join(f"{role} {spent}" for role, spent in at["processor_seconds"].items())
        )
    peaks = ", ".join(f"{title} {mib}" for title, mib in sorted(figures["peak_mib"].items()))
    return [*lines, f"  peak resident memory, MiB: {peaks}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path, default=Path("build/bulk.json"))
    options = parser.parse_args()
    corpus = make_corpus(options.rows)
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder,
        clusters.running(Path(folder), servers=1) as cluster,
    ):
        figures = measure(cluster, corpus, print)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print("\n".join(render(figures)))


if __name__ == "__main__":
    main()
