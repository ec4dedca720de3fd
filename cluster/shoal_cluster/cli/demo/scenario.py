"""The demo, step by step: up, load, search, kill, restart. Every wait has an end.

The caller owns bucket directory and processes of this cluster; `run_demo` leaves none running.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

import shoal
from shoal_cluster.bootstrap import RunningCluster, UpOptions
from shoal_cluster.cli.demo.corpus import (
    ATTRIBUTES,
    COLLECTION,
    MODEL,
    PARTITION_BY,
    Corpus,
    Floats,
    load_corpus,
)
from shoal_cluster.cli.demo.evaluation import (
    FILTER_CASES,
    ExactSearch,
    mean_reciprocal_rank,
)
from shoal_cluster.cli.demo.figures import (
    RECALL_TARGET,
    Figures,
    Loading,
    OutageFigures,
    Quality,
    Restart,
)
from shoal_cluster.cli.demo.observation import (
    Victim,
    choose_victim,
    is_whole,
    rows_not_indexed,
    sealing_is_due,
)
from shoal_cluster.cli.demo.signals import interrupts_ignored, unwound_by_termination
from shoal_cluster.cli.demo.traffic import Attempt, Traffic, latency_of
from shoal_cluster.cli.session import Entrances
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Internal, Unavailable
from shoal_cluster.domain.partition import shard_of_value
from shoal_protos.v1 import admin_pb2

SHARDS = 4
REPLICAS = 2
K = 10
MRR_DEPTH = 100
"""How deep a known item is looked for. Exact search over the whole corpus gives 0.4964, cut off
here 0.4957, at 10 hits 0.4903: the tail beyond 100 adds less than the tolerance by far."""

QUERY_BATCH = 32
BATCH_MAX_S = 120.0
"""Quality is measured here, not latency: a machine busy with other work may take its time."""
SCROLL_PAGE = 1000

INDEXING_MAX_S = 40.0
INDEXING_QUIET_S = 8.0
"""A build and the start of its process take up to 5 s when both cores are busy."""
WHOLE_MAX_S = 60.0
POLL_S = 0.1
BEFORE_S = 4.0
AFTER_S = 4.0
WRITE_MAX_S = 60.0

VECTOR_TOLERANCE = 1e-6
"""Vectors come back as they were given; under cosine they are stored as a direction and a length,
and multiplying the two again may be off by an ulp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """bucket: a directory or URL that has no collection of the demo's name.

    before_s, after_s: how long clients query before the kill and after everything is back.
    """

    name: str
    bucket: str
    servers: int
    grpc_port: int
    state_directory: Path
    before_s: float = BEFORE_S
    after_s: float = AFTER_S


@dataclass(slots=True, kw_only=True)
class Stage:
    """Where the demo runs and what it tells. step: what it is doing now, for error messages."""

    entrances: Entrances
    clock: Clock
    on_step: Callable[[str], None]
    progress: Callable[[str], AbstractContextManager[Callable[[int, int | None], None]]]
    step: str = field(default="starting")

    def enter(self, step: str) -> None:
        self.step = step
        self.on_step(step)


def run_demo(options: DemoOptions, stage: Stage) -> Figures:
    """Runs everything and returns what was measured.

    Raises: ShoalError of the cluster or the SDK when a step cannot be done at all.
    """
    started_s = stage.clock.monotonic_s()
    stage.enter("reading 8,000 Debian packages and 640 queries")
    corpus = load_corpus()
    truth = ExactSearch(corpus)
    with (
        _cluster(options, stage, "starting a cluster") as cluster,
        stage.entrances.client(cluster.grpc_address) as client,
    ):
        loading = _load(client, corpus, stage)
        quality = _measure_quality(client, corpus, truth, stage)
        outage, write = _kill_a_server(cluster.grpc_address, client, corpus, truth, options, stage)
    stopped_s = stage.clock.monotonic_s()
    with (
        _cluster(options, stage, "starting a new cluster on the same bucket") as cluster,
        stage.entrances.client(cluster.grpc_address) as client,
    ):
        restart_seconds = stage.clock.monotonic_s() - stopped_s
        restart = _verify(client, corpus, truth, write, restart_seconds, stage)
    return Figures(
        rows_given=len(corpus.packages),
        loading=loading,
        quality=quality,
        outage=outage,
        restart=restart,
        total_seconds=stage.clock.monotonic_s() - started_s,
    )


@contextmanager
def _cluster(options: DemoOptions, stage: Stage, step: str) -> Iterator[RunningCluster]:
    """Brings a cluster up and, on every way out, down again."""
    stage.enter(step)
    cluster = stage.entrances.up(
        UpOptions(
            name=options.name,
            bucket=options.bucket,
            servers=options.servers,
            grpc_port=options.grpc_port,
            state_directory=options.state_directory,
            on_step=stage.on_step,
        )
    )
    try:
        with unwound_by_termination():
            yield cluster
        stage.step = "stopping the cluster"
    finally:
        with interrupts_ignored():
            stage.entrances.down(options.name, options.state_directory, stage.on_step)


def _load(client: shoal.Client, corpus: Corpus, stage: Stage) -> Loading:
    stage.enter(f"creating collection {COLLECTION}: {SHARDS} shards, {REPLICAS} replicas")
    collection = client.create_collection(
        COLLECTION,
        dimension=corpus.vectors.shape[1],
        metric="cosine",
        attributes=ATTRIBUTES,
        partition_by=PARTITION_BY,
        shards=SHARDS,
        replicas=REPLICAS,
        recall_target=RECALL_TARGET,
        model=MODEL,
    )
    rows = range(len(corpus.packages))
    stage.enter("loading")
    started_s = stage.clock.monotonic_s()
    with stage.progress("rows durable and visible") as progress:
        acknowledged = collection.bulk_upsert(
            ids=corpus.ids,
            vectors=corpus.vectors,
            attributes=[corpus.attributes(row) for row in rows],
            payloads=[corpus.payload(row) for row in rows],
            progress=progress,
        )
    load_seconds = stage.clock.monotonic_s() - started_s
    stage.enter("waiting for the indexes")
    not_indexed = _wait_until_indexed(client, stage.clock)
    return Loading(
        rows_acknowledged=acknowledged, load_seconds=load_seconds, not_indexed=not_indexed
    )


def _wait_until_indexed(client: shoal.Client, clock: Clock) -> int:
    """Returns the rows not indexed when no more sealing is due, or when nothing moves any more."""
    begun_s = changed_s = clock.monotonic_s()
    least = rows_not_indexed(client.status(COLLECTION))
    while clock.monotonic_s() - begun_s < INDEXING_MAX_S:
        report = client.status(COLLECTION)
        left = rows_not_indexed(report)
        if left < least:
            least, changed_s = left, clock.monotonic_s()
        # A report from before the last rows says little; give it a moment to catch up.
        fresh = clock.monotonic_s() - begun_s > 1.0
        if fresh and not sealing_is_due(report):
            return left
        if clock.monotonic_s() - changed_s > INDEXING_QUIET_S:
            return left
        _pause(POLL_S)
    return least


def _measure_quality(
    client: shoal.Client, corpus: Corpus, truth: ExactSearch, stage: Stage
) -> Quality:
    collection = client.collection(COLLECTION, model=MODEL)
    count = len(corpus.query_vectors)
    stage.enter(
        f"{count} queries, plain and with {len(FILTER_CASES)} filters, against exact search"
    )
    plain = _search(collection, corpus.query_vectors, k=K)
    deep = _search(collection, corpus.query_vectors, k=MRR_DEPTH)
    recall_filtered = {}
    for case in FILTER_CASES:
        found = _search(collection, corpus.query_vectors, k=K, condition=case.filter)
        recall_filtered[case.name] = truth.recall([each.ids for each in found], k=K, case=case)
    ids = corpus.ids
    return Quality(
        recall_plain=truth.recall([each.ids for each in plain], k=K),
        recall_filtered=recall_filtered,
        filter_rows={case.name: int(truth.matching(case).sum()) for case in FILTER_CASES},
        mrr_known_item=mean_reciprocal_rank(
            [each.ids for each in deep],
            [each.scores for each in deep],
            [ids[row] if row >= 0 else None for row in corpus.relevant],
        ),
        mrr_depth=MRR_DEPTH,
    )


def _search(
    collection: shoal.Collection,
    vectors: Floats,
    *,
    k: int,
    condition: shoal.Filter | None = None,
) -> list[shoal.SearchResult]:
    found: list[shoal.SearchResult] = []
    for start in range(0, len(vectors), QUERY_BATCH):
        batch = vectors[start : start + QUERY_BATCH]
        found += collection.search_batch(
            batch, k=k, filter=condition, with_payload=False, timeout_s=BATCH_MAX_S
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class OutageWrite:
    """The write made while a server was dead: which row, and the sequence number it got."""

    row: int
    seq: int
    acknowledged_s: float


def _kill_a_server(
    address: str,
    client: shoal.Client,
    corpus: Corpus,
    truth: ExactSearch,
    options: DemoOptions,
    stage: Stage,
) -> tuple[OutageFigures, OutageWrite]:
    """Kills the server that leads most shards while clients ask; writes to a shard it led."""
    clock = stage.clock
    stage.enter("waiting until all replicas are ready")
    report = _wait_until_whole(client, clock, without_pid=None)
    victim = choose_victim(report)
    row = _row_led_by(victim, corpus)
    stage.enter("querying from several clients")
    with Traffic(
        lambda: stage.entrances.client(address), corpus.query_vectors, clock, k=K
    ) as traffic:
        _pause(options.before_s)
        stage.enter(
            f"SIGKILL of {victim.server} (pid {victim.pid}, leads {len(victim.leads)} shards)"
        )
        killed_s = clock.monotonic_s()
        _kill(victim.pid)
        with ThreadPoolExecutor(max_workers=1) as writer:
            writing = writer.submit(_write_row, client, corpus, row, clock)
            _wait_until_whole(client, clock, without_pid=victim.pid)
            back_s = clock.monotonic_s()
            write = writing.result()
        stage.enter(f"all replicas are back after {back_s - killed_s:.1f} s; querying on")
        _pause(options.after_s)
    attempts = traffic.attempts
    during = _between(attempts, killed_s, back_s)
    answered = [each for each in during if not each.error]
    failed = [each for each in attempts if each.error]
    figures = OutageFigures(
        killed_server=victim.server,
        killed_leads=len(victim.leads),
        failed_queries=len(failed),
        first_failure=failed[0].error if failed else "",
        recall=truth.recall(
            [each.ids for each in answered], k=K, queries=[each.query for each in answered]
        ),
        takeover_seconds=write.acknowledged_s - killed_s,
        replica_back_seconds=back_s - killed_s,
        before=latency_of(_between(attempts, float("-inf"), killed_s)),
        during=latency_of(during),
        after=latency_of(_between(attempts, back_s, float("inf"))),
    )
    return figures, write


def _row_led_by(victim: Victim, corpus: Corpus) -> int:
    """Returns a row of a shard the victim leads."""
    for section in sorted({package[PARTITION_BY] for package in corpus.packages}):
        if shard_of_value(section, SHARDS) in victim.leads:
            return corpus.row_of_section(section)
    raise Internal(f"no section of the demo lies in shards {victim.leads}")


def _kill(pid: int) -> None:
    """Sends SIGKILL, after making sure that the process is a Ray actor on this machine.

    Raises: Unavailable when it is not.
    """
    try:
        told = " ".join([psutil.Process(pid).name(), *psutil.Process(pid).cmdline()])
    except psutil.Error as error:
        raise Unavailable(f"status names process {pid}, which is not there: {error}") from error
    if "ray" not in told:
        raise Unavailable(f"status names process {pid}, which is no Ray actor: {told[:80]}")
    os.kill(pid, signal.SIGKILL)


def _write_row(client: shoal.Client, corpus: Corpus, row: int, clock: Clock) -> OutageWrite:
    """Writes a row again as it is, so that the number of rows stays what it was."""
    collection = client.collection(COLLECTION, model=MODEL)
    written = collection.upsert(
        ids=[corpus.ids[row]],
        vectors=corpus.vectors[row : row + 1],
        attributes=[corpus.attributes(row)],
        payloads=[corpus.payload(row)],
        timeout_s=WRITE_MAX_S,
    )
    return OutageWrite(row=row, seq=written.seqs[0], acknowledged_s=clock.monotonic_s())


def _wait_until_whole(
    client: shoal.Client, clock: Clock, *, without_pid: int | None
) -> admin_pb2.StatusResponse:
    """Raises: Unavailable when replicas are still missing after WHOLE_MAX_S."""
    begun_s = clock.monotonic_s()
    while clock.monotonic_s() - begun_s < WHOLE_MAX_S:
        try:
            report = client.status(COLLECTION)
        except shoal.Unavailable:
            # The controller may have lived beside what was killed; it comes back by itself.
            _pause(POLL_S)
            continue
        if is_whole(report, shards=SHARDS, replicas=REPLICAS, without_pid=without_pid):
            return report
        _pause(POLL_S)
    raise Unavailable(
        f"not all of {SHARDS} shards x {REPLICAS} replicas were ready within {WHOLE_MAX_S:g} s"
    )


def _verify(
    client: shoal.Client,
    corpus: Corpus,
    truth: ExactSearch,
    write: OutageWrite,
    restart_seconds: float,
    stage: Stage,
) -> Restart:
    stage.enter("comparing every row with what was loaded")
    collection = client.collection(COLLECTION, model=MODEL)
    counted = collection.count(consistency="strong")
    row_of = {point_id: row for row, point_id in enumerate(corpus.ids)}
    stored = np.zeros_like(corpus.vectors)
    seen = np.zeros(len(row_of), dtype=np.bool_)
    for point in collection.scroll(
        page_size=SCROLL_PAGE, with_payload=False, with_vector=True, consistency="strong"
    ):
        row = row_of.get(point.id)
        if row is not None and point.vector is not None:
            stored[row] = np.asarray(point.vector)
            seen[row] = True
    differing = np.abs(stored - corpus.vectors).max(axis=1) > VECTOR_TOLERANCE
    read = collection.get(corpus.ids[write.row], consistency="strong").by_id()
    kept = read.get(corpus.ids[write.row])
    plain = _search(collection, corpus.query_vectors, k=K)
    return Restart(
        restart_seconds=restart_seconds,
        rows_counted=counted,
        ids_missing=int((~seen).sum()),
        vectors_differing=int((differing & seen).sum()),
        write_kept=kept is not None and kept.seq >= write.seq,
        recall_plain=truth.recall([each.ids for each in plain], k=K),
    )


def _between(attempts: Sequence[Attempt], start_s: float, end_s: float) -> list[Attempt]:
    """Returns the attempts that were due from start_s to before end_s."""
    return [each for each in attempts if start_s <= each.due_s < end_s]


def _pause(duration_s: float) -> None:
    """Waits in this thread; the CLI has no event loop of its own."""
    threading.Event().wait(duration_s)
