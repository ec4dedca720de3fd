"""Resident memory of a vector in each tier, and the recall it comes with.

    python -m tests.bench.memory [--rows 100000] [--json build/bench-memory.json]

Memory that no file backs, of the one shard server, just started on a bucket that holds the rows,
after a round of searches; less that of one started on the same bucket before it held any. Mapped
files are no part of it: the kernel takes those pages back when somebody needs them.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

import shoal
from chaos import cluster as clusters
from chaos.watching import anonymous_bytes
from shoal.schema import TierName
from shoal_cluster.bootstrap import RunningCluster
from tests.bench import machine, writes
from tests.bench.corpus import BenchCorpus, K, id_of, make_corpus, row_of
from tests.bench.figures import note_figures

RECALL_TARGET: Final = 0.99
QUERIES: Final = 300
TIERS: Final = ("compact", "full", "disk")


def run(corpus: BenchCorpus, progress: Callable[[str], None]) -> dict[str, Any]:
    described = machine.describe_machine()
    return {
        "machine": described,
        "rows": len(corpus.vectors),
        "dimension": corpus.vectors.shape[1],
        "recall_target": RECALL_TARGET,
        "tiers": {tier: _measure(corpus, tier, progress) for tier in TIERS},
    }


def _measure(corpus: BenchCorpus, tier: str, progress: Callable[[str], None]) -> dict[str, Any]:
    rows = len(corpus.vectors)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        directory = Path(folder)
        with (
            clusters.running(directory, servers=1) as cluster,
            shoal.Client(cluster.grpc_address, timeout_s=60.0) as client,
        ):
            collection = client.create_collection(
                tier,
                dimension=corpus.vectors.shape[1],
                recall_target=RECALL_TARGET,
                tier=cast(TierName, tier),
            )
        progress(f"{tier}: an empty collection")
        with (
            clusters.running(directory, servers=1) as cluster,
            shoal.Client(cluster.grpc_address, timeout_s=60.0) as client,
        ):
            _search(client.collection(tier), corpus)
            base_bytes = _server_bytes(cluster)
            progress(f"{tier}: loading {rows:,} rows")
            collection = client.collection(tier)
            collection.bulk_upsert(ids=[id_of(row) for row in range(rows)], vectors=corpus.vectors)
            writes.settle(client, cluster, tier, rows=rows)
        progress(f"{tier}: started anew")
        with (
            clusters.running(directory, servers=1) as cluster,
            shoal.Client(cluster.grpc_address, timeout_s=60.0) as client,
        ):
            found = _search(client.collection(tier), corpus)
            full_bytes = _server_bytes(cluster)
    return {
        "base_mib": round(base_bytes / 2**20, 1),
        "full_mib": round(full_bytes / 2**20, 1),
        "bytes_per_vector": round((full_bytes - base_bytes) / rows, 1),
        "recall": round(corpus.recall(found, np.arange(QUERIES)), 4),
    }


def _search(collection: shoal.Collection, corpus: BenchCorpus) -> Any:
    found = []
    for query in range(QUERIES):
        ids = collection.search(corpus.queries[query], k=K, with_payload=False).ids
        found.append(([row_of(point_id) for point_id in ids] + [-1] * K)[:K])
    return np.array(found)


def _server_bytes(cluster: RunningCluster) -> int:
    (server,) = (
        process
        for process in clusters.processes_of(cluster)
        if "ShardServer" in machine.title_of(process)
    )
    return anonymous_bytes(server.pid)


def render(figures: Mapping[str, Any]) -> str:
    return "\n".join(
        f"{tier:8} {each['bytes_per_vector']:7.1f} bytes a vector beyond {each['base_mib']} MiB, "
        f"recall {each['recall']} (target {figures['recall_target']}), {figures['rows']:,} rows x "
        f"{figures['dimension']}"
        for tier, each in figures["tiers"].items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path, default=Path("build/bench-memory.json"))
    options = parser.parse_args()
    figures = run(make_corpus(options.rows), lambda step: print(step, flush=True))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    compact = figures["tiers"]["compact"]
    note_figures(bytes_per_vector_compact=compact["bytes_per_vector"])
    print(render(figures))


if __name__ == "__main__":
    main()
