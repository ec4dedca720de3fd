"""Real kills: one shard server under queries and writes; then every process at once."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import shoal
from chaos import cluster as clusters
from chaos.cluster import wait_until
from chaos.observe import leading_server, pid_of, ready_replicas, replicas_agree
from chaos.workloads.upserts import DIMENSION, Upserts


@pytest.mark.timeout(240)
def test_killed_shard_server_costs_no_query_and_no_acknowledged_write(tmp_path: Path) -> None:
    with clusters.running(tmp_path) as cluster:
        with shoal.Client(cluster.grpc_address, timeout_s=30.0) as client:
            collection = client.create_collection("load", dimension=DIMENSION, shards=4, replicas=2)
            load = Upserts(cluster.grpc_address, writers=2)
            load.start()
            wait_until(lambda: len(load.acknowledged) > 300, timeout_s=60, what="some rows")
            failures: list[str] = []
            answered = 0
            stop = threading.Event()

            def query() -> None:
                nonlocal answered
                rng = np.random.default_rng(9)
                with shoal.Client(cluster.grpc_address, timeout_s=20.0) as mine:
                    while not stop.is_set():
                        try:
                            mine.collection("load").search(rng.standard_normal(DIMENSION), k=5)
                            answered += 1
                        except shoal.ShoalError as error:
                            failures.append(str(error))

            searcher = threading.Thread(target=query)
            searcher.start()
            wait_until(lambda: answered > 20, timeout_s=30, what="some queries")
            server = leading_server(client)
            os.kill(pid_of(client, server), signal.SIGKILL)
            killed_s = time.monotonic()
            before = len(load.acknowledged)
            wait_until(
                lambda: len(load.acknowledged) > before + 200, timeout_s=30, what="writes go on"
            )
            wait_until(
                lambda: ready_replicas(client, server) == 4, timeout_s=60, what="replicas back"
            )
            back_s = time.monotonic() - killed_s
            stop.set()
            searcher.join(30)
            load.stop()
            assert failures == []
            assert answered > 20
            assert load.violations(collection) == []
            wait_until(lambda: replicas_agree(client, "load"), timeout_s=30, what="replicas agree")
            print(f"replicas back after {back_s:.1f} s, {len(load.acknowledged)} rows")


@pytest.mark.timeout(300)
def test_kill_of_every_process_during_a_load_loses_nothing(tmp_path: Path) -> None:
    cluster = clusters.start(tmp_path)
    try:
        with shoal.Client(cluster.grpc_address, timeout_s=30.0) as client:
            client.create_collection("load", dimension=DIMENSION, shards=2, replicas=2)
        load = Upserts(cluster.grpc_address, writers=3)
        load.start()
        # Past the first seals, so that logs, segments and manifests are all in play.
        wait_until(lambda: len(load.acknowledged) > 4000, timeout_s=120, what="rows to lose")
        killed = clusters.kill_everything(cluster)
        load.stop()
        assert killed >= 5
    finally:
        clusters.stop(tmp_path)
    with clusters.running(tmp_path) as again:
        with shoal.Client(again.grpc_address, timeout_s=60.0) as client:
            collection = client.collection("load")
            wait_until(lambda: ready_replicas(client, None) == 4, timeout_s=60, what="all ready")
            assert load.violations(collection) == []
            collection.upsert(ids=["after"], vectors=np.ones((1, DIMENSION), dtype=np.float32))
            wait_until(lambda: replicas_agree(client, "load"), timeout_s=30, what="replicas agree")
