"""Declared recall and queries a second under filters of every selectivity, through the SDK.

    python -m tests.bench.filters [--corpus demo] [--rows 100000] [--targets 0.95 0.99]
                                  [--json build/bench-filters.json]

Three orders of the rows make filters of any selectivity: by chance; nearest first to the mean
query; farthest first from it, so that every match is far from most queries. One client asks; plain
and filtered searches take turns, so that all meet the same disturbance.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import shoal
from chaos import cluster as clusters
from shoal import F
from tests.bench import machine, writes
from tests.bench.corpora.files import NoCorpus
from tests.bench.corpus import CORPORA, DEMO, BenchCorpus, K, id_of, make_corpus, row_of
from tests.bench.figures import note_figures

SHARES: Final = (0.5, 0.1, 0.05, 0.01, 0.001, 0.0001)
TARGETS: Final = (0.95, 0.99)
KINDS: Final = ("random", "near", "far")
ROUNDS: Final = 5
QUERIES_PER_ROUND: Final = 60
COLLECTION: Final = "filters"


def run(
    corpus: BenchCorpus,
    targets: tuple[float, ...],
    progress: Callable[[str], None],
    *,
    rounds: int = ROUNDS,
    queries: int = QUERIES_PER_ROUND,
) -> dict[str, Any]:
    """Returns the machine, one entry a search kind, and the two summary figures."""
    described = machine.describe_machine()
    ranks = _ranks(corpus)
    rows = len(corpus.vectors)
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder,
        clusters.running(Path(folder), servers=1) as cluster,
        shoal.Client(cluster.grpc_address, timeout_s=60.0) as client,
    ):
        progress(f"loading {rows:,} rows")
        collection = client.create_collection(
            COLLECTION,
            dimension=corpus.vectors.shape[1],
            attributes=dict.fromkeys(KINDS, "int"),
        )
        columns = {kind: rank.tolist() for kind, rank in ranks.items()}
        collection.bulk_upsert(
            ids=[id_of(row) for row in range(rows)],
            vectors=corpus.vectors,
            attributes=[{kind: columns[kind][row] for kind in KINDS} for row in range(rows)],
        )
        writes.settle(client, cluster, COLLECTION, rows=rows)
        searches = [
            figures
            for target in targets
            for figures in _measure(collection, corpus, ranks, target, rounds, queries, progress)
        ]
    return {
        "machine": described,
        "rows": rows,
        "dimension": corpus.vectors.shape[1],
        "queries": rounds * queries,
        "searches": searches,
        "declared_recall_shortfall_max": round(
            max(each["recall_target"] - each["recall"] for each in searches), 4
        ),
        "filtered_over_plain_qps_min": min(each["over_plain"] for each in searches),
    }


def _ranks(corpus: BenchCorpus) -> Mapping[str, npt.NDArray[np.int64]]:
    """Returns each row's place in each order, from 0."""
    rows = len(corpus.vectors)
    nearness = corpus.vectors @ corpus.queries.mean(axis=0)
    near = np.empty(rows, np.int64)
    near[np.argsort(-nearness, kind="stable")] = np.arange(rows)
    random = np.random.default_rng(7).permutation(rows)
    return {"random": random, "near": near, "far": rows - 1 - near}


def _measure(
    collection: shoal.Collection,
    corpus: BenchCorpus,
    ranks: Mapping[str, npt.NDArray[np.int64]],
    target: float,
    rounds: int,
    queries: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    rows = len(corpus.vectors)
    asked: list[tuple[str, float]] = [("plain", 1.0)]
    asked += [(kind, share) for kind in KINDS for share in SHARES if share * rows >= K]
    spent_s: dict[tuple[str, float], list[float]] = {each: [] for each in asked}
    found: dict[tuple[str, float], list[list[int]]] = {each: [] for each in asked}
    for number in range(rounds):
        progress(f"recall target {target}: round {number + 1} of {rounds}")
        for kind, share in asked:
            filter = None if kind == "plain" else F(kind) < round(share * rows)
            latencies = []
            for query in range(number * queries, (number + 1) * queries):
                vector = corpus.queries[query % len(corpus.queries)]
                before_s = time.perf_counter()
                result = collection.search(
                    vector, k=K, filter=filter, recall_target=target, with_payload=False
                )
                ids = result.ids
                latencies.append(time.perf_counter() - before_s)
                hits = [row_of(point_id) for point_id in ids]
                found[kind, share].append((hits + [-1] * K)[:K])
            spent_s[kind, share].append(float(np.mean(latencies)))
    numbers = np.arange(rounds * queries) % len(corpus.queries)
    plain_s = float(np.median(spent_s["plain", 1.0]))
    figures = []
    for kind, share in asked:
        truth = None
        if kind != "plain":
            truth = corpus.truth_among(ranks[kind] < round(share * rows))
        explained = collection.search(
            corpus.queries[0],
            k=K,
            filter=None if kind == "plain" else F(kind) < round(share * rows),
            recall_target=target,
            with_payload=False,
            explain=True,
        ).explain
        assert explained is not None, "asked for"
        plans = {
            segment.plan for shard in explained.shards for segment in shard.segments if segment.plan
        }
        mean_s = float(np.median(spent_s[kind, share]))
        figures.append(
            {
                "filter": kind,
                "share": share,
                "recall_target": target,
                "recall": round(corpus.recall(np.array(found[kind, share]), numbers, truth), 4),
                "queries_per_s": round(1 / mean_s, 1),
                "over_plain": round(plain_s / mean_s, 3),
                "plans": sorted(plans),
            }
        )
    return figures


def render(figures: Mapping[str, Any]) -> str:
    lines = [
        f"{figures['rows']:,} rows x {figures['dimension']}, k {K}, {figures['queries']} queries "
        f"each, one client; load average before {figures['machine']['load_average_1min']}",
        f"{'filter':8}{'share':>9}{'target':>8}{'recall':>8}{'queries/s':>11}{'over plain':>12}"
        "  plan of the first query",
    ]
    lines += [
        f"{each['filter']:8}{each['share']:>9.2%}{each['recall_target']:>8}{each['recall']:>8}"
        f"{each['queries_per_s']:>11}{each['over_plain']:>12}  {', '.join(each['plans'])}"
        for each in figures["searches"]
    ]
    lines.append(
        f"declared recall missed by at most {figures['declared_recall_shortfall_max']}; filtered "
        f"over plain at least {figures['filtered_over_plain_qps_min']}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpus", choices=CORPORA, default=DEMO, help="see corpus.py")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS))
    parser.add_argument("--json", type=Path, default=Path("build/bench-filters.json"))
    options = parser.parse_args()
    try:
        corpus = make_corpus(options.rows, options.corpus)
    except NoCorpus as missing:
        parser.error(str(missing))
    figures = run(corpus, tuple(options.targets), lambda step: print(step, flush=True))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    note_figures(
        declared_recall_shortfall_max=figures["declared_recall_shortfall_max"],
        filtered_over_plain_qps_min=figures["filtered_over_plain_qps_min"],
    )
    print(render(figures))


if __name__ == "__main__":
    main()
