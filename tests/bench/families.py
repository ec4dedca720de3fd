"""Index families on one thread, same rows and queries, each at its cheapest setting per recall.

`python -m tests.bench.families [ROWS]` prints the tables of docs/design/index-families.md. Times
are processor time of the thread, so that a busy machine blurs them less; still only ratios of one
run mean something. Needs ROWS × 6 KB of memory at 384-d.
"""

import argparse
import mmap
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.schema import MemoryTier, Metric, VectorStorage
from shoal_cluster.index.cost_model import lists_for
from shoal_cluster.index.distances import use_one_thread
from shoal_cluster.index.families import CodeShape
from shoal_cluster.index.fast_scan import train_codes
from shoal_cluster.index.rescoring import rescored_top_k
from shoal_cluster.segment.build import _write_vectors
from shoal_cluster.segment.residence import open_vectors
from tests.bench.corpus import BenchCorpus, K, make_corpus

TARGETS = (0.90, 0.95, 0.98, 0.99, 0.999)
DEPTHS = (10, 20, 40, 80, 160, 320, 640, 1280)
QUERIES = 200
TRAINING_ROWS = 4_096


@dataclass(frozen=True)
class Candidate:
    """A family, built. memory: bytes a vector in RAM beside the stored vectors, by its parts.

    settings: label and FAISS parameters, cheapest first.
    """

    name: str
    build_s: float
    memory_bytes: float
    index: Any
    settings: list[tuple[str, Any]]


def _probes(lists: int) -> list[tuple[str, Any]]:
    shares = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
    return [
        (f"{max(lists // s, 1)} lists", faiss.SearchParametersIVF(nprobe=max(lists // s, 1)))
        for s in shares
    ]


def candidates(corpus: BenchCorpus) -> Iterator[Candidate]:
    """Builds one family after the other; the one before may be dropped."""
    vectors = corpus.vectors
    rows, dimension = vectors.shape
    whole = [("all", faiss.SearchParametersIVF(nprobe=1))]
    lists = lists_for(rows)

    def timed(name: str, memory: float, build: Callable[[], Any], settings: Any) -> Candidate:
        started_s = time.thread_time()
        index = build()
        return Candidate(name, time.thread_time() - started_s, memory, index, settings)

    for values in (4, 2, 8):
        shape = CodeShape(values_a_code=values)
        yield timed(
            f"fast-scan, {4 / values:g} bits a value" + (" (present)" if values == 4 else ""),
            dimension / values / 2 + 8,
            lambda shape=shape: train_codes(vectors, Metric.COSINE, shape, 1),
            whole,
        )
    for values in (4, 2):
        shape = CodeShape(values_a_code=values, lists=lists)
        yield timed(
            f"the same in {lists} lists, {4 / values:g} bits",
            dimension / values / 2 + 8 + lists * dimension * 4 / rows,
            lambda shape=shape: train_codes(vectors, Metric.COSINE, shape, 1),
            _probes(lists),
        )
    for spec, name, memory, settings in (
        ("RaBitQfs", "RaBitQ fast-scan, refuses filters", dimension / 8 + 8, [("all", None)]),
        ("IVF1,RaBitQfs", "RaBitQ fast-scan in 1 list", dimension / 8 + 16, whole),
        (f"IVF{lists},RaBitQfs", f"RaBitQ in {lists} lists", dimension / 8 + 16, _probes(lists)),
    ):
        yield timed(name, memory, lambda spec=spec: _of_factory(vectors, spec), settings)
    graph = [
        (f"ef {ef}", faiss.SearchParametersHNSW(efSearch=ef)) for ef in (16, 32, 64, 128, 256, 512)
    ]
    memory = 2 * dimension + 2 * 32 * 4 + 8
    yield timed(
        "HNSW M 32 over float16",
        memory,
        lambda: _of_factory(vectors, "HNSW32,SQfp16"),
        graph,
    )


def _of_factory(vectors: npt.NDArray[np.float32], spec: str) -> Any:
    index = faiss.index_factory(vectors.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
    lists = getattr(index, "nlist", 1)
    sample = np.random.default_rng(1).permutation(len(vectors))[: max(TRAINING_ROWS, 40 * lists)]
    index.train(vectors[np.sort(sample)])
    for start in range(0, len(vectors), 16_384):
        index.add(vectors[start : start + 16_384])
    return index


def measure(
    corpus: BenchCorpus, candidate: Candidate, parameters: Any, depth: int
) -> tuple[float, float]:
    """Returns recall@K and the median processor time of one query, in ms."""
    numbers = np.arange(QUERIES)
    found = np.empty((QUERIES, K), dtype=np.int64)
    times = []
    for number in numbers:
        query = corpus.queries[number : number + 1]
        started_s = time.thread_time()
        rows = candidate.index.search(query, depth, params=parameters)[1]
        found[number] = rescored_top_k(corpus.vectors, query, rows, K, Metric.COSINE)[1][0]
        times.append(time.thread_time() - started_s)
    return corpus.recall(found, numbers), 1000 * float(np.median(times))


def cheapest(corpus: BenchCorpus, candidate: Candidate) -> dict[float, tuple[float, str, float]]:
    """Returns, for each target, (ms, setting, recall) of the cheapest setting that reaches it."""
    best: dict[float, tuple[float, str, float]] = {}
    for label, parameters in candidate.settings:
        for depth in DEPTHS:
            if label.startswith("ef ") and depth > int(label[3:]):
                break
            recall, cost_ms = measure(corpus, candidate, parameters, depth)
            for target in TARGETS:
                if recall >= target and cost_ms < best.get(target, (np.inf,))[0]:
                    best[target] = (cost_ms, f"{label}, {depth}", recall)
            if recall >= TARGETS[-1]:
                break
    return best


def families_table(corpus: BenchCorpus) -> Iterator[str]:
    titles = " | ".join(f"@{target:g}: ms (setting)" for target in TARGETS)
    yield f"| family | build s | B a vector | {titles} |"
    yield "|---" * (3 + len(TARGETS)) + "|"
    for candidate in candidates(corpus):
        best = cheapest(corpus, candidate)
        cells = [
            f"{best[target][0]:.3f} ({best[target][1]})" if target in best else "-"
            for target in TARGETS
        ]
        yield (
            f"| {candidate.name} | {candidate.build_s:.1f} | {candidate.memory_bytes:.0f} | "
            f"{' | '.join(cells)} |"
        )


def tiers_table(corpus: BenchCorpus, directory: Path) -> Iterator[str]:
    """Compares rows of a file that is not in the page cache, scattered, tier by tier."""
    file = _write_vectors(corpus.vectors, VectorStorage.FLOAT32, directory)
    descriptor = os.open(file.path, os.O_RDONLY)
    os.fsync(descriptor)
    random = np.random.default_rng(2)
    yield "| tier | rows compared | nothing cached: ms | KiB read | everything cached: ms |"
    yield "|---|---|---|---|---|"
    for tier in (MemoryTier.COMPACT, MemoryTier.DISK):
        for count in (40, 240):
            cold, read, warm = [], [], []
            for attempt in range(20):
                residence = open_vectors("vectors", file.path, tier)
                rows = random.integers(0, len(corpus.vectors), (1, count))
                if attempt % 2 == 0:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
                started_s = time.perf_counter()
                residence.ask_for(rows)
                rescored_top_k(residence.scattered, corpus.queries[:1], rows, K, Metric.COSINE)
                took_ms = 1000 * (time.perf_counter() - started_s)
                if attempt % 2 == 0:
                    cold.append(took_ms)
                    read.append((resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before) / 2)
                    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as whole:
                        sum(whole[:: mmap.PAGESIZE])
                else:
                    warm.append(took_ms)
            yield (
                f"| {tier.value} | {count} | {np.median(cold):.2f} | {np.median(read):,.0f} | "
                f"{np.median(warm):.3f} |"
            )
    os.close(descriptor)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="?", type=int, default=100_000)
    arguments = parser.parse_args()
    use_one_thread()
    corpus = make_corpus(arguments.rows)
    sys.stdout.write(f"{arguments.rows:,} rows x {corpus.vectors.shape[1]}, k = {K}\n\n")
    with tempfile.TemporaryDirectory(prefix="shoal-families-") as folder:
        for lines in (families_table(corpus), tiers_table(corpus, Path(folder))):
            for line in lines:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
