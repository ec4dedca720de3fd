"""Recall on real embeddings, real queries and real filters: a declared recall is reached.

8,000 Debian package descriptions and 640 queries (the demo's data), as one large segment and as
small ones. Queries are sentences of users, not rows, so they are harder than what a segment
calibrates itself with.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pyroaring import BitMap

import shoal_cluster
from shoal_cluster.domain.ids import CollectionId
from shoal_cluster.domain.point import NO_PROVENANCE, encode_tail
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.filtering.expression import And, AnyOf, Comparison, Expression, Not, Operator
from shoal_cluster.index.families import Family
from shoal_cluster.segment.build import SegmentInput, build_segment
from shoal_cluster.segment.deletes import alive_bits
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.segment.search import SearchPlan, SegmentHits

DATA = Path(shoal_cluster.__file__).parent / "cli" / "data" / "debian_packages"
ATTRIBUTES = {
    "section": AttributeType.KEYWORD,
    "architecture": AttributeType.KEYWORD,
    "tags": AttributeType.KEYWORD_LIST,
    "installed_kb": AttributeType.INT,
}
FILTERS: dict[str, Expression] = {
    "section = net (3 %)": Comparison("section", Operator.EQ, "net"),
    "section = games (2 %)": Comparison("section", Operator.EQ, "games"),
    "installed_kb > 1000 (27 %)": Comparison("installed_kb", Operator.GT, 1000),
    "architecture = amd64 (51 %)": Comparison("architecture", Operator.EQ, "amd64"),
    "a program or a library": AnyOf("tags", ("role::program", "role::shared-lib")),
    "not perl, small": And(
        (
            Not(Comparison("section", Operator.EQ, "perl")),
            Comparison("installed_kb", Operator.LE, 200),
        )
    ),
}
TARGET = 0.98


@dataclass(frozen=True)
class Corpus:
    rows: SegmentInput
    queries: np.ndarray


def unit_vectors(name: str) -> np.ndarray:
    vectors = np.load(DATA / name).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    with gzip.open(DATA / "packages.jsonl.gz", "rt", encoding="utf-8") as lines:
        packages = [json.loads(line) for line in lines]
    tails = []
    for package in packages:
        held = {name: package[name] for name in ATTRIBUTES if package[name] is not None}
        tails.append(encode_tail(1.0, held, package["title"].encode(), NO_PROVENANCE))
    return Corpus(
        rows=SegmentInput(
            ids=[package["id"].encode() for package in packages],
            seqs=np.arange(1, len(packages) + 1, dtype=np.uint64),
            vectors=unit_vectors("vectors.f16.npy"),
            tails=tails,
        ),
        queries=unit_vectors("query_vectors.f16.npy"),
    )


def segment_of(
    corpus: Corpus, count: int, directory: Path, metric: Metric = Metric.COSINE
) -> SegmentReader:
    schema = CollectionSchema(
        id=CollectionId("0" * 32),
        name="debian",
        dimension=384,
        metric=metric,
        attributes=ATTRIBUTES,
    )
    rows = SegmentInput(
        ids=corpus.rows.ids[:count],
        seqs=corpus.rows.seqs[:count],
        vectors=corpus.rows.vectors[:count],
        tails=corpus.rows.tails[:count],
    )
    built = build_segment(rows, schema, directory, seed=7)
    return SegmentReader.open("one", {file.name: file.path for file in built.files}, schema)


@pytest.fixture(scope="module", params=[1_600, 2_000, 8_000])
def segment(
    corpus: Corpus, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> SegmentReader:
    return segment_of(corpus, request.param, tmp_path_factory.mktemp("segment"))


def recall_against_exact(
    segment: SegmentReader, queries: np.ndarray, k: int, **restriction: object
) -> tuple[float, SegmentHits]:
    """Returns the mean share of the true top k that was found, and the hits themselves."""
    target = restriction.pop("recall_target", TARGET)
    hits = segment.search(queries, k, recall_target=target, **restriction)  # type: ignore[arg-type]
    true = segment.search(queries, k, exact=True, **restriction)  # type: ignore[arg-type]
    shares = []
    for found, wanted in zip(hits.rows.tolist(), true.rows.tolist(), strict=True):
        present = {row for row in wanted if row >= 0}
        shares.append(len(present & set(found)) / len(present))
    return float(np.mean(shares)), hits


@pytest.mark.parametrize("k", [1, 10, 30, 100])
def test_plain_search_reaches_the_declared_recall(
    corpus: Corpus, segment: SegmentReader, k: int
) -> None:
    recall, hits = recall_against_exact(segment, corpus.queries, k)

    assert segment.family is Family.FAST_SCAN
    assert hits.report.plan is SearchPlan.SCAN
    assert recall >= TARGET


@pytest.mark.parametrize("target", [0.9, 0.95, 0.98, 0.99])
def test_every_declared_recall_is_reached(
    corpus: Corpus, segment: SegmentReader, target: float
) -> None:
    """Invariant S-7."""
    recall, hits = recall_against_exact(segment, corpus.queries, 10, recall_target=target)

    assert recall >= target
    # No deeper than it need be: the target decides the cost.
    assert hits.report.rows_rescored <= {0.9: 60, 0.95: 80, 0.98: 120, 0.99: 160}[target]


@pytest.mark.parametrize("name", FILTERS)
def test_filtered_search_reaches_the_declared_recall(
    corpus: Corpus, segment: SegmentReader, name: str
) -> None:
    matching = segment.evaluate(FILTERS[name])

    recall, hits = recall_against_exact(segment, corpus.queries, 10, matching=matching)

    assert recall >= TARGET
    assert all(row in matching for row in hits.rows[hits.rows >= 0].tolist())


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.05, 0.13, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_recall_holds_at_every_selectivity(
    corpus: Corpus, segment: SegmentReader, share: float
) -> None:
    count = max(1, round(share * segment.rows))
    chosen = np.random.default_rng(11).permutation(segment.rows)[:count]

    recall, _ = recall_against_exact(segment, corpus.queries, 10, matching=BitMap(chosen.tolist()))

    assert recall >= TARGET


def test_recall_holds_when_a_third_of_the_rows_is_dead(
    corpus: Corpus, segment: SegmentReader
) -> None:
    alive = alive_bits(segment.rows, BitMap(range(0, segment.rows, 3)))
    matching = segment.evaluate(FILTERS["architecture = amd64 (51 %)"])

    plain, _ = recall_against_exact(segment, corpus.queries, 10, alive=alive)
    filtered, _ = recall_against_exact(segment, corpus.queries, 10, alive=alive, matching=matching)

    assert plain >= TARGET
    assert filtered >= TARGET


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.L2])
def test_other_metrics_reach_the_declared_recall(
    corpus: Corpus, metric: Metric, tmp_path: Path
) -> None:
    segment = segment_of(corpus, 8_000, tmp_path, metric)

    for target in (0.9, 0.95, 0.98):
        recall, hits = recall_against_exact(segment, corpus.queries, 10, recall_target=target)
        assert hits.report.plan is SearchPlan.SCAN
        assert recall >= target
