"""Compares one search in process, through a link, a fast lane and gRPC, in one run.

    python -m tests.bench [--smoke] [--corpus demo] [--rows 100000] [--recall 0.95 0.99]
                          [--json build/bench.json]

Starts a real cluster in a temporary directory, loads it, waits until it is indexed, measures, and
leaves nothing behind. docs/benchmarks.md says how to read what it prints.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

import shoal
from chaos import cluster as clusters
from shoal_cluster.bootstrap import RunningCluster
from shoal_cluster.bucket.open import open_store
from shoal_cluster.control.catalog import CatalogLog
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.ids import SystemIdGenerator
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.index.calibration import measure_recall
from shoal_cluster.index.cost_model import CostModel, choose_family
from shoal_cluster.index.families import Effort
from shoal_cluster.index.fast_scan import FastScanIndex, encode_codes, train_codes
from shoal_cluster.index.settings import rank_measured, setting_for
from tests.bench import bulk, links, machine, writes
from tests.bench.corpora.files import NoCorpus
from tests.bench.corpus import (
    CORPORA,
    DEMO,
    QUERIES,
    RECALL_TARGET,
    BenchCorpus,
    K,
    make_corpus,
    seed_of,
)
from tests.bench.paths import CODES, VECTORS, Setup
from tests.bench.paths import QUERIES as QUERIES_FILE
from tests.bench.processes import callers, shard_process
from tests.bench.report import render
from tests.bench.rounds import (
    as_dicts,
    measure_paths,
    measure_processor_time,
    measure_stages,
)
from tests.bench.stages import STAGES

COLLECTION: Final = "bench"
TARGET_MS: Final = 1.5
"""First slice: what gRPC may add to a raw search at p50, one client, idle machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything. seconds: of one round of one path."""

    rows: int
    rounds: int
    seconds: float
    clients: int
    write_seconds: float
    idle_seconds: float
    link_seconds: float


FULL: Final = Size(
    rows=100_000,
    rounds=5,
    seconds=1.5,
    clients=8,
    write_seconds=4.0,
    idle_seconds=20.0,
    link_seconds=0.5,
)
SMOKE: Final = Size(
    rows=5_000,
    rounds=2,
    seconds=0.4,
    clients=2,
    write_seconds=0.5,
    idle_seconds=1.0,
    link_seconds=0.1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="everything small, within a minute")
    parser.add_argument("--corpus", choices=CORPORA, default=DEMO, help="see corpus.py")
    parser.add_argument("--rows", type=int, help=f"{FULL.rows:,}, or {SMOKE.rows:,} with --smoke")
    parser.add_argument(
        "--recall",
        type=float,
        nargs="+",
        default=[RECALL_TARGET],
        help="what searches ask for, one after the other; the collection declares the largest",
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    if options.rows is not None:
        size = replace(size, rows=options.rows)
    try:
        bench = run(size, _teller(time.perf_counter()), options.corpus, options.recall)
    except NoCorpus as missing:
        parser.error(str(missing))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    # Figures of the other benches (figures.py) stay.
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    options.json.write_text(json.dumps({**known, **bench}, indent=1) + "\n")
    print(render(bench))
    print(f"\nfigures are in {options.json}")


def run(
    size: Size,
    progress: Callable[[str], None],
    corpus_name: str = DEMO,
    recall_targets: Sequence[float] = (RECALL_TARGET,),
) -> dict[str, Any]:
    """Runs the whole bench and returns every figure; see report.py for what they mean."""
    described = machine.describe_machine()
    progress(f"making {size.rows:,} rows and exact answers to {QUERIES} queries")
    corpus = make_corpus(size.rows, corpus_name)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        directory = Path(folder)
        progress("building one FAISS index over all rows")
        efforts = _prepare_raw(corpus, directory, recall_targets)
        progress("starting a cluster")
        with clusters.running(directory, servers=1) as cluster:
            with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
                load = writes.load(client, COLLECTION, corpus, progress, max(recall_targets))
                progress("waiting until everything is indexed and compacted")
                load |= writes.settle(client, cluster, COLLECTION, rows=size.rows)
            schema = uvloop.run(schema_of(cluster.bucket, COLLECTION))
            secret = bytes.fromhex(SystemIdGenerator().hex(32))
            with shard_process(
                bucket=cluster.bucket,
                collection_id=schema.id,
                socket=directory / "shard.sock",
                secret=secret,
            ) as (link_address, segments):
                assert segments == load["segments"], "both shards search the same segments"
                setup = directory / "setup.json"
                by_target = []
                for target, effort in efforts.items():
                    progress(f"recall target {target}")
                    Setup(
                        directory=str(directory),
                        bucket=cluster.bucket,
                        grpc_address=cluster.grpc_address,
                        link_address=link_address,
                        link_secret=secret.hex(),
                        collection=COLLECTION,
                        collection_id=schema.id,
                        schema=schema.to_wire(),
                        depth=effort.depth,
                        probes=effort.probes,
                        recall_target=target,
                    ).save(setup)
                    searches = _measure_searches(setup, corpus, cluster, size, progress)
                    by_target.append(
                        {"recall_target": target, "raw_depth": effort.depth, **searches}
                    )
            progress("measuring acknowledgements")
            written = writes.acknowledgements(cluster, corpus.vectors, seconds=size.write_seconds)
            loaded_past_log = bulk.measure(cluster, corpus, progress)
            processes = machine.describe_processes(cluster, seconds=size.idle_seconds)
        progress("measuring links alone")
        link_figures = _measure_links(directory, size.link_seconds)
    return {
        "machine": described,
        "versions": machine.describe_versions(),
        "seeds": {"corpus": seed_of(corpus_name), "codes": 0, "calibration": 0},
        "size": asdict(size),
        "collection": {
            "corpus": corpus_name,
            "rows": size.rows,
            "dimension": corpus.vectors.shape[1],
            "k": K,
            "recall_target": max(recall_targets),
            "shards": 1,
            "replicas": 1,
            "segments": load["segments"],
            "memtable_rows": load["memtable_rows"],
        },
        **_worst(by_target, size.rows),
        "searches": by_target,
        "target_ms": TARGET_MS,
        "load": load,
        "rows_per_s_sdk_indexed": round(
            size.rows / (load["acknowledged_seconds"] + load["indexed_seconds"])
        ),
        "bulk": loaded_past_log,
        "rows_per_s_bulk": loaded_past_log["cold"]["rows_per_s"],
        "rows_per_s_bulk_warm": loaded_past_log["warm"]["rows_per_s"],
        "writes": written,
        "links": link_figures,
        "processes": processes,
    }


def _worst(by_target: Sequence[Mapping[str, Any]], rows: int) -> dict[str, float]:
    """Returns the figures that versions are compared by: each the worst over the targets."""
    figures = {
        name: max(searches[name] for searches in by_target)
        for name in by_target[0]
        if name.startswith("p50_minus_raw")
    }
    figures |= {
        name: min(searches[name] for searches in by_target)
        for name in by_target[0]
        if "_over_raw" in name
    }
    return {**figures, f"e2e_over_raw_8_clients_{_short(rows)}": figures["e2e_over_raw"]}


def _prepare_raw(
    corpus: BenchCorpus, directory: Path, recall_targets: Sequence[float]
) -> dict[float, Effort]:
    """Writes vectors, queries and codes for the callers; returns how hard raw looks, by target.

    The codes, and the effort that reaches a target, are found as a segment's build does, whose
    collection declares the largest of them.
    """
    np.save(directory / VECTORS, corpus.vectors)
    np.save(directory / QUERIES_FILE, corpus.queries)
    rows, dimension = corpus.vectors.shape
    costs = CostModel(dimension=dimension)
    shape = choose_family(rows, costs, max(recall_targets)).shape
    assert shape is not None, "so many rows get codes"
    codes = train_codes(corpus.vectors, Metric.COSINE, shape, 0)
    index = FastScanIndex(codes, dimension)
    curve = measure_recall(index, corpus.vectors, Metric.COSINE, 0)
    efforts = {}
    for target in recall_targets:
        setting = setting_for(
            curve,
            target,
            K,
            rows=rows,
            lists=shape.lists,
            rank=rank_measured(curve, K, 1.0),
            cost_ns=lambda effort: costs.scan_ns(rows, shape, effort),
        )
        assert setting.effort is not None, setting.reason
        efforts[target] = setting.effort
    with (directory / CODES).open("wb") as file:
        for part in encode_codes(codes, dimension):
            file.write(part.data)
    return efforts


async def schema_of(bucket: str, collection: str) -> CollectionSchema:
    """Returns the collection's schema with the id that the bucket knows it by."""
    store = open_store(bucket)
    try:
        record = (await CatalogLog(store, SystemClock(), SystemIdGenerator()).read()).by_name(
            collection
        )
        assert record is not None, "it was created"
        return record.schema
    finally:
        await store.close()


def _measure_searches(
    setup: Path,
    corpus: BenchCorpus,
    cluster: RunningCluster,
    size: Size,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    with callers(setup, 1) as one:
        alone = measure_paths(
            one, corpus, rounds=size.rounds, seconds=size.seconds, progress=progress
        )
        progress("taking queries apart")
        stages, queries = measure_stages(one[0], "stages", rounds=size.rounds, seconds=size.seconds)
        grpc_stages, _ = measure_stages(
            one[0], "grpc_stages", rounds=size.rounds, seconds=size.seconds
        )
        processor_ms = measure_processor_time(one[0], cluster, "sdk", seconds=2 * size.seconds)
        grpc_processor_ms = measure_processor_time(
            one[0], cluster, "grpc", seconds=2 * size.seconds
        )
    with callers(setup, size.clients) as many:
        together = measure_paths(
            many, corpus, rounds=size.rounds, seconds=size.seconds, progress=progress
        )
    p50_ms = {figures.path: figures.p50_ms for figures in alone}
    rate = {figures.path: figures.queries_per_s for figures in alone}
    rate_of_many = {figures.path: figures.queries_per_s for figures in together}
    return {
        "paths": as_dicts([*alone, *together]),
        "p50_minus_raw_ms_1_client": round(p50_ms["sdk"] - p50_ms["raw_paced"], 3),
        "p50_minus_raw_ms_1_client_tight": round(p50_ms["sdk"] - p50_ms["raw"], 3),
        "p50_minus_raw_ms_1_client_grpc": round(p50_ms["grpc"] - p50_ms["raw"], 3),
        "e2e_over_raw": round(rate_of_many["sdk"] / rate["raw_cores"], 3),
        "grpc_over_raw_8_clients": round(rate_of_many["grpc"] / rate["raw_cores"], 3),
        "grpc_stream_over_raw_8_clients": round(rate_of_many["grpc_stream"] / rate["raw_cores"], 3),
        "e2e_over_raw_batch64": round(rate["sdk_batch"] / rate["raw_batch"], 3),
        "processor_ms_per_query": processor_ms,
        "grpc_processor_ms_per_query": grpc_processor_ms,
        "stages_ms": stages,
        "stages_queries": queries,
        "stages_sum_ms": round(sum(stages[stage] for stage, _ in STAGES), 4),
        "grpc_stages_ms": grpc_stages,
        "grpc_stages_sum_ms": round(sum(grpc_stages[stage] for stage, _ in STAGES), 4),
    }


def _short(rows: int) -> str:
    """Returns the number of rows as the names of figures have it: 100k, 1m."""
    return f"{rows // 1_000_000}m" if rows % 1_000_000 == 0 else f"{rows // 1000}k"


def _measure_links(directory: Path, seconds: float) -> list[dict[str, Any]]:
    addresses = [f"unix:{directory}/echo-{number}.sock" for number in range(links.FAN_OUT)]
    with links.serving(addresses) as pairs:
        return [asdict(figure) for figure in uvloop.run(links.measure("unix", pairs, seconds))]


def _teller(started_s: float) -> Callable[[str], None]:
    """Returns what prints a step and how long the bench has run."""

    def tell(step: str) -> None:
        print(f"[{time.perf_counter() - started_s:6.1f} s] {step}", flush=True)

    return tell


if __name__ == "__main__":
    main()
