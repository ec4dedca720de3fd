"""A segment that claims a recall it has not is noticed by its searches, and measured again."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from shoal_cluster.domain.observation import ReplicaReport, ReplicaState
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.recall import FilterClass
from shoal_cluster.index import calibration
from shoal_cluster.index.calibration import RecallCurve, measure_recall
from shoal_cluster.shard.calls import SearchCall, WriteCall, WriteKind
from shoal_cluster.shard.host import ShardHost
from shoal_cluster.shard.recall_sampling import JUDGED_MIN
from tests.unit.shard.nodes import SCHEMA, SHARD, Shard, run, tail, write

DIMENSION, ROWS, K, TARGET = 256, 2_400, 10, 0.95
NAME = (SCHEMA.id, SHARD)
CODED = replace(SCHEMA, dimension=DIMENSION, recall_target=TARGET, recall_sample_share=1.0)
"""Rows x dimension are just enough for a segment with codes."""


def flattering(*arguments: Any, **options: Any) -> RecallCurve:
    """Measures a curve and claims recall 1 at every depth."""
    curve = measure_recall(*arguments, **options)
    points = tuple(replace(point, recall=1.0, lower=1.0) for point in curve.points)
    return replace(curve, points=points)


def rows_of(count: int, seed: int) -> Vectors:
    """Without structure: codes rank such rows badly."""
    return np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)


async def sealed(tmp_path: Path) -> ShardHost:
    """Returns a host that leads a shard of one segment with codes."""
    shard = await Shard(tmp_path).create()
    host = ShardHost(shard.node().ports, lambda _: shard.network)
    host.open(CODED, SHARD)
    while host.reports()[0].state is ReplicaState.LOADING:
        await asyncio.sleep(0.01)
    await host.promote(NAME)
    vectors = rows_of(ROWS, seed=1)
    for part in range(4):
        numbers = range(part * ROWS // 4, (part + 1) * ROWS // 4)
        call = WriteCall(
            collection=SCHEMA.id,
            shard=SHARD,
            client_id="client",
            request_no=part + 1,
            kind=WriteKind.UPSERT,
            ids=[f"p{number}".encode() for number in numbers],
            tails=[tail()] * len(numbers),
            body=vectors[numbers.start : numbers.stop].tobytes(),
        )
        await write(host, call)
    primary = host._hosted[NAME].primary
    assert primary is not None
    primary._sealer.start()
    while host.reports()[0].segments < 1 or primary.sealing:
        await asyncio.sleep(0.01)
    return host


async def ask(host: ShardHost, queries: Vectors, *, exact: bool = False) -> list[Vectors]:
    """Returns the keys that each query, asked alone, found; what it set going is done."""
    found = []
    for query in queries:
        call = SearchCall(collection=SCHEMA.id, shard=SHARD, k=K, exact=exact)
        reply, _ = await host.search(call, query.tobytes())
        found.append(np.frombuffer(reply.keys, np.float32))
        for _ in range(4):
            await asyncio.sleep(0)
    return found


async def recall_by(host: ShardHost, queries: Vectors) -> float:
    truth = await ask(host, queries, exact=True)
    found = await ask(host, queries)
    pairs = zip(found, truth, strict=True)
    return float(np.mean([np.mean(got <= true[-1]) for got, true in pairs]))


def events(logs: list[Any]) -> list[str]:
    return [log["event"] for log in logs if log["event"].startswith("recall_")]


async def settled(host: ShardHost) -> None:
    measuring = host._hosted[NAME].sampler._measuring
    if measuring is not None:
        await measuring


def test_a_spoiled_segment_is_noticed_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure_recall", flattering)

    async def scenario() -> None:
        host = await sealed(tmp_path)
        asked, others = rows_of(JUDGED_MIN, seed=2), rows_of(JUDGED_MIN, seed=3)
        with capture_logs() as logs:
            reached = await recall_by(host, asked[:-1])
            assert reached < TARGET - 0.02, "the segment is not spoiled"
            (estimate,) = host.reports()[0].recall
            assert (estimate.samples, estimate.recall) == (JUDGED_MIN - 1, pytest.approx(reached))
            assert estimate.filter_class is FilterClass.NONE and estimate.high < TARGET
            assert ReplicaReport.from_wire(host.reports()[0].to_wire()) == host.reports()[0]
            assert not events(logs), "99 samples are too few"

            await ask(host, asked[-1:])
            await settled(host)

            assert events(logs) == ["recall_below_target", "recall_curve_measured_again"]
            assert logs[-1]["factor_before"] == 2 and logs[-1]["queries"] == JUDGED_MIN
            assert host.reports()[0].recall == (), "the estimate begins anew"

            repaired = await recall_by(host, others)

            assert repaired >= TARGET - 0.01
            (estimate,) = host.reports()[0].recall
            assert estimate.low <= repaired <= estimate.high >= TARGET
            assert len(events(logs)) == 2
        await host.close_all()

    run(scenario())


def test_an_honest_segment_is_left_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = await sealed(tmp_path)
        with capture_logs() as logs:
            queries = rows_of(2 * JUDGED_MIN, seed=2)
            reached = await recall_by(host, queries)
            (estimate,) = host.reports()[0].recall
            assert estimate.samples == len(queries)
            assert estimate.recall == pytest.approx(reached)
            assert not events(logs)
        await host.close_all()

    run(scenario())
