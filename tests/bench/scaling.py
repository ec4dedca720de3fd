"""What a search costs as rows, shards and shard servers grow on one machine.

    python -m tests.bench.scaling [--corpus demo] [--rows 10000 100000 1000000]
                                  [--json build/bench-scaling.json] [--svg build/bench-scaling.svg]

Each layout gets a cluster of its own; the same rows, the same queries. Eight client processes ask
through the SDK. Processor time of all of the cluster's processes is the cost: latency on two cores
shared with the clients says little about more machines.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import uvloop

import shoal
from chaos import cluster as clusters
from tests.bench import machine, writes
from tests.bench.__main__ import schema_of
from tests.bench.corpora.files import NoCorpus
from tests.bench.corpus import CORPORA, DEMO, BenchCorpus, id_of, make_corpus
from tests.bench.machine import processor_seconds
from tests.bench.paths import QUERIES, Setup
from tests.bench.processes import CallerProcess, callers
from tests.bench.rounds import ask_all

LAYOUTS: Final = ((1, 1), (2, 1), (4, 1), (2, 2))
"""(shards, shard servers)"""
ROWS: Final = (10_000, 100_000, 1_000_000)
CLIENTS: Final = 8
SECONDS: Final = 3.0
ROUNDS: Final = 3
COLLECTION: Final = "scaling"


def run(corpora: Sequence[BenchCorpus], progress: Callable[[str], None]) -> dict[str, Any]:
    described = machine.describe_machine()
    points = []
    for corpus in corpora:
        for shards, servers in LAYOUTS:
            progress(f"{len(corpus.vectors):,} rows, {shards} shards, {servers} shard servers")
            points.append(_measure(corpus, shards, servers))
            progress(_line(points[-1]))
    return {"machine": described, "clients": CLIENTS, "points": points}


def _measure(corpus: BenchCorpus, shards: int, servers: int) -> dict[str, Any]:
    rows, dimension = corpus.vectors.shape
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        directory = Path(folder)
        np.save(directory / QUERIES, corpus.queries)
        with clusters.running(directory, servers=servers) as cluster:
            with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
                client.create_collection(COLLECTION, dimension=dimension, shards=shards)
                client.load(COLLECTION, corpus.vectors, ids=[id_of(row) for row in range(rows)])
                writes.settle(client, cluster, COLLECTION, rows=rows)
            schema = uvloop.run(schema_of(cluster.bucket, COLLECTION))
            setup = directory / "setup.json"
            Setup(
                directory=folder,
                bucket=cluster.bucket,
                grpc_address=cluster.grpc_address,
                link_address="",
                link_secret="",
                collection=COLLECTION,
                collection_id=schema.id,
                schema=schema.to_wire(),
                depth=0,
                probes=0,
                recall_target=schema.recall_target,
            ).save(setup)
            with callers(setup, 1) as one:
                alone = _ask(one, [], SECONDS / 2)
            with callers(setup, CLIENTS) as many:
                _ask(many, [], 0.5)
                processes = clusters.processes_of(cluster)
                rounds = [_ask(many, processes, SECONDS) for _ in range(ROUNDS)]
                found = many[0].ask({"found": "sdk"})["found"]
    asked = np.array([int(query) for query in found])
    return {
        "rows": rows,
        "shards": shards,
        "servers": servers,
        "p50_ms_1_client": round(alone["p50_ms"], 3),
        "queries_per_s": round(float(np.median([each["queries_per_s"] for each in rounds])), 1),
        "cluster_processor_ms": round(
            float(np.median([each["processor_ms"] for each in rounds])), 3
        ),
        "recall": round(corpus.recall(np.array(list(found.values())), asked), 4),
    }


def _ask(
    asking: Sequence[CallerProcess], processes: Sequence[psutil.Process], seconds: float
) -> dict[str, float]:
    before_s = processor_seconds(processes)
    answers = ask_all(asking, {"path": "sdk", "seconds": seconds})
    after_s = processor_seconds(processes)
    latencies_us = [each for answer in answers for each in answer["latencies_us"]]
    spent_s = sum(after_s[pid] - before_s[pid] for pid in before_s.keys() & after_s.keys())
    return {
        "p50_ms": float(np.percentile(latencies_us, 50)) / 1e3,
        "queries_per_s": sum(len(a["latencies_us"]) / a["seconds"] for a in answers),
        "processor_ms": spent_s / len(latencies_us) * 1e3,
    }


def _line(point: Mapping[str, Any]) -> str:
    return (
        f"{point['rows']:>9,} rows, {point['shards']} shards, {point['servers']} servers: "
        f"{point['cluster_processor_ms']:.3f} ms of processor a query, "
        f"{point['queries_per_s']:.0f} queries/s with {CLIENTS} clients, p50 "
        f"{point['p50_ms_1_client']} ms alone, recall {point['recall']}"
    )


def draw(points: Sequence[Mapping[str, Any]]) -> str:
    """Returns the curves of processor time a query over rows, a line a layout, as an SVG."""
    width, height, left, bottom, top, right = 640, 400, 60, 50, 20, 150
    rows = sorted({point["rows"] for point in points})
    most_ms = max(point["cluster_processor_ms"] for point in points) * 1.1
    low, high = np.log10(rows[0]), np.log10(max(rows[-1], rows[0] * 1.001))

    def place(point: Mapping[str, Any]) -> str:
        share = (np.log10(point["rows"]) - low) / (high - low)
        x = left + share * (width - left - right)
        y = height - bottom - point["cluster_processor_ms"] / most_ms * (height - bottom - top)
        return f"{x:.1f},{y:.1f}"

    colours = ("#1b6ca8", "#d1495b", "#2e933c", "#edae49")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left},{top} V{height - bottom} H{width - right}" stroke="black" fill="none"/>',
        f'<text x="{left}" y="{top - 6}">ms of processor time a query</text>',
        f'<text x="{(left + width - right) // 2}" y="{height - 10}">rows</text>',
    ]
    for number in rows:
        x = place({"rows": number, "cluster_processor_ms": 0}).split(",")[0]
        parts.append(
            f'<text x="{x}" y="{height - bottom + 16}" text-anchor="middle">{number:,}</text>'
        )
    for step in range(5):
        value = most_ms * step / 4
        y = height - bottom - step / 4 * (height - bottom - top)
        parts.append(f'<text x="{left - 6}" y="{y:.1f}" text-anchor="end">{value:.2f}</text>')
    for number, (shards, servers) in enumerate(LAYOUTS):
        line = [p for p in points if (p["shards"], p["servers"]) == (shards, servers)]
        if not line:
            continue
        colour = colours[number]
        path = " ".join(place(point) for point in sorted(line, key=lambda p: int(p["rows"])))
        parts.append(f'<polyline points="{path}" stroke="{colour}" fill="none" stroke-width="2"/>')
        y = top + 20 + 18 * number
        parts.append(
            f'<text x="{width - right + 10}" y="{y}" fill="{colour}">{shards} shards, '
            f"{servers} servers</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpus", choices=CORPORA, default=DEMO, help="see corpus.py")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--json", type=Path, default=Path("build/bench-scaling.json"))
    parser.add_argument("--svg", type=Path, default=Path("build/bench-scaling.svg"))
    options = parser.parse_args()
    try:
        corpora = [make_corpus(rows, options.corpus) for rows in options.rows]
    except NoCorpus as missing:
        parser.error(str(missing))
    figures = run(corpora, lambda step: print(step, flush=True))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    options.svg.write_text(draw(figures["points"]))
    print(f"figures are in {options.json}, curves in {options.svg}")


if __name__ == "__main__":
    main()
