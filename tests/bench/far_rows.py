"""What filters whose rows are all far from the query cost one segment, and what recall they keep.

    python -m tests.bench.far_rows [ROWS]

In process, one thread, processor time; 50 real queries each, k = 10; two minutes. Filters of three
kinds: *mean* keeps the rows farthest from the mean query; *cut* leaves out a query's own nearest
rows, the worst filter for codes; *leak* is a cut that one of its rows in 500 passes. Each is
searched as Shoal does and with the sure way alone.
docs/design/index-families.md has the table.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pyroaring import BitMap

from shoal_cluster.domain.ids import CollectionId
from shoal_cluster.domain.point import NO_PROVENANCE, encode_tail
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.filtering import bitmaps
from shoal_cluster.index.distances import Rows
from shoal_cluster.segment import far_rows
from shoal_cluster.segment.build import SegmentInput, build_segment
from shoal_cluster.segment.reader import SegmentReader
from tests.bench.corpus import SEED, TIE, BenchCorpus, Floats, K, id_of, make_corpus

TARGETS = (0.95, 0.99)
QUERIES = 50
LEAK = 0.002

RowsOf = Callable[[int, Floats], Rows]
"""The rows that pass for a query of this number, given its similarity with every row."""


@dataclass(frozen=True)
class Measured:
    recall: float
    far: float
    """Share of the queries that were asked again."""
    settled: float
    mean_ms: float


def filters(corpus: BenchCorpus) -> dict[str, RowsOf | None]:
    rows = len(corpus.vectors)
    outwards = np.argsort(-(corpus.vectors @ corpus.queries.mean(axis=0)))

    def farthest(share: float) -> RowsOf:
        passing = np.sort(outwards[-round(share * rows) :])
        return lambda number, similarity: passing

    def cut(share: float, leak: float = 0.0) -> RowsOf:
        left_out = round(share * rows)

        def passing(number: int, similarity: Floats) -> Rows:
            order = np.argpartition(-similarity, left_out)
            stays = np.random.default_rng(number).random(left_out) < leak
            return np.sort(np.concatenate([order[:left_out][stays], order[left_out:]]))

        return passing

    return {
        "none": None,
        **{f"mean, {share:.0%} pass": farthest(share) for share in (0.5, 0.1, 0.05)},
        **{f"cut, nearest {share:.1%} left out": cut(share) for share in (0.002, 0.01, 0.5, 0.9)},
        **{f"leak, nearest {share:.0%} left out": cut(share, LEAK) for share in (0.05, 0.2)},
    }


@contextlib.contextmanager
def sure_way_alone() -> Iterator[None]:
    """No scan settles and none is tried."""
    kept = far_rows.rows_judged, far_rows.TRIED_COST_MAX
    far_rows.rows_judged = lambda k, recall_target: 1 << 40
    far_rows.TRIED_COST_MAX = 0.0  # type: ignore[misc]
    try:
        yield
    finally:
        far_rows.rows_judged, far_rows.TRIED_COST_MAX = kept  # type: ignore[misc]


def measure(
    reader: SegmentReader, corpus: BenchCorpus, target: float, rows_of: RowsOf | None
) -> Measured:
    recalls, reasons, times = [], [], []
    for number in range(QUERIES):
        similarity = corpus.vectors @ corpus.queries[number]
        passing = np.arange(len(similarity)) if rows_of is None else rows_of(number, similarity)
        matching = None if rows_of is None else bitmaps.from_rows(passing.astype(np.uint32))
        recall, reason, spent_s = _ask(reader, corpus, target, number, passing, matching)
        recalls.append(recall)
        reasons.append(reason)
        times.append(spent_s)
    return Measured(
        recall=float(np.mean(recalls)),
        far=float(np.mean(["asked deeper" in reason for reason in reasons])),
        settled=float(np.mean(["1 of them by a scan" in reason for reason in reasons])),
        mean_ms=1000 * float(np.mean(times)),
    )


def _ask(
    reader: SegmentReader,
    corpus: BenchCorpus,
    target: float,
    number: int,
    passing: Rows,
    matching: BitMap | None,
) -> tuple[float, str, float]:
    query = corpus.queries[number : number + 1]
    # The first search brings rows and codes back to the caches that finding the truth swept.
    reader.search(query, K, matching=matching, recall_target=target)
    started_s = time.thread_time()
    hits = reader.search(query, K, matching=matching, recall_target=target)
    spent_s = time.thread_time() - started_s
    similarity = corpus.vectors[passing] @ query[0]
    kth = np.partition(similarity, -K)[-K]
    found = corpus.vectors[hits.rows[0]] @ query[0]
    return float(np.mean(found >= kth - TIE)), hits.report.reason, spent_s


def segment_of(corpus: BenchCorpus, directory: Path) -> SegmentReader:
    schema = CollectionSchema(
        id=CollectionId("0" * 32),
        name="far",
        dimension=corpus.vectors.shape[1],
        metric=Metric.COSINE,
        attributes={},
    )
    rows = len(corpus.vectors)
    built = build_segment(
        SegmentInput(
            ids=[id_of(row).encode() for row in range(rows)],
            seqs=np.arange(1, rows + 1, dtype=np.uint64),
            vectors=corpus.vectors,
            tails=[encode_tail(1.0, {}, b"", NO_PROVENANCE)] * rows,
        ),
        schema,
        directory,
        seed=SEED,
    )
    return SegmentReader.open("far", {file.name: file.path for file in built.files}, schema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=int, nargs="?", default=100_000)
    corpus = make_corpus(parser.parse_args().rows)
    print("| filter | target | recall | ms | asked again | settled | sure way: recall | ms |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        reader = segment_of(corpus, Path(folder))
        for name, rows_of in filters(corpus).items():
            for target in TARGETS:
                now = measure(reader, corpus, target, rows_of)
                with sure_way_alone():
                    sure = measure(reader, corpus, target, rows_of)
                print(
                    f"| {name} | {target} | {now.recall:.3f} | {now.mean_ms:.2f} | {now.far:.0%} "
                    f"| {now.settled:.0%} | {sure.recall:.3f} | {sure.mean_ms:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
