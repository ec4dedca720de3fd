"""Builders: processes of their own, below the serving actors, replaced when they die."""

import os
import signal

import numpy as np
import psutil
import pytest

import shoal
from chaos.cluster import processes_of, wait_until
from shoal_cluster.bootstrap import RunningCluster
from shoal_cluster.domain.limits import SEAL_OPERATIONS

DIMENSION = 16


def _builders(cluster: RunningCluster) -> list[psutil.Process]:
    return [
        process
        for process in processes_of(cluster)
        if process.cmdline()[0].startswith("ray::Builder")
    ]


def _sealed_rows(client: shoal.Client) -> int:
    (shard,) = client.status("builders").collections[0].shards
    return shard.rows_live - shard.memtable_rows


def _niceness(cluster: RunningCluster, title: str) -> set[int]:
    return {
        int(process.nice())
        for process in processes_of(cluster)
        if process.cmdline()[0].startswith(title)
    }


@pytest.mark.timeout(240)
def test_segments_go_on_being_built_after_a_builder_was_killed(
    cluster: RunningCluster, client: shoal.Client
) -> None:
    collection = client.create_collection("builders", dimension=DIMENSION, shards=1, replicas=1)
    rng = np.random.default_rng(1)

    def load_and_wait(first: int) -> None:
        ids = [str(number) for number in range(first, first + SEAL_OPERATIONS)]
        vectors = rng.standard_normal((len(ids), DIMENSION), dtype=np.float32)
        collection.bulk_upsert(ids=ids, vectors=vectors)
        wait_until(
            lambda: _sealed_rows(client) == first + SEAL_OPERATIONS,
            timeout_s=60,
            what="all rows are in segments",
        )

    load_and_wait(0)
    builders = _builders(cluster)
    assert builders, "one is kept for the next order"
    assert min(int(builder.nice()) for builder in builders) > max(
        _niceness(cluster, "ray::ShardServer")
    )
    for builder in builders:
        os.kill(builder.pid, signal.SIGKILL)
    load_and_wait(SEAL_OPERATIONS)
    assert collection.count() == 2 * SEAL_OPERATIONS
    client.drop_collection("builders")


def test_serving_actors_give_way_to_nobody(cluster: RunningCluster) -> None:
    assert _niceness(cluster, "ray::Coordinator") | _niceness(cluster, "ray::ShardServer") == {
        os.nice(0)
    }
