"""Real kills: one shard server under queries and writes; then every process at once."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal import Point
from tests.integration import clusters
from tests.integration.clusters import wait_until

DIMENSION = 32


class Load:
    """Writers that note what was acknowledged; each owns its ids, so the last word is known."""

    def __init__(self, address: str, writers: int) -> None:
        self.acknowledged: dict[str, int] = {}
        self.deleted: set[str] = set()
        self.unknown: set[str] = set()
        self.unknown_deletes: set[str] = set()
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._address = address
        self._threads = [
            threading.Thread(target=self._write, args=(number,)) for number in range(writers)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _write(self, number: int) -> None:
        rng = np.random.default_rng(number)
        with shoal.Client(self._address, timeout_s=20.0) as client:
            collection = client.collection("load")
            for batch in range(100_000):
                if self._stop.is_set():
                    return
                ids = [f"w{number}-{batch}-{i}" for i in range(10)]
                vectors = rng.standard_normal((10, DIMENSION)).astype(np.float32)
                try:
                    collection.upsert(ids=ids, vectors=vectors, payloads=[{"n": batch}] * 10)
                    self.acknowledged.update(dict.fromkeys(ids, batch))
                except shoal.ShoalError as error:
                    self.unknown.update(ids)
                    self.failed.append(str(error))
                    continue
                if batch % 3 == 0:
                    victims = ids[:4]
                    try:
                        collection.delete(victims)
                        self.deleted.update(victims)
                    except shoal.ShoalError as error:
                        self.unknown_deletes.update(victims)
                        self.failed.append(str(error))


def _check(load: Load, collection: shoal.Collection) -> None:
    found = {point.id for point in collection.scroll(page_size=1000, consistency="strong")}
    must = set(load.acknowledged) - load.deleted - load.unknown_deletes
    assert must - found == set(), "acknowledged rows were lost"
    assert load.deleted & found == set(), "deleted rows came back"
    allowed = must | load.unknown | load.unknown_deletes
    assert found - allowed == set(), "rows that nobody wrote"
    # Rows whose delete was never acknowledged may be there or not, but batches are atomic per
    # shard and nothing else is missing.
    assert len(found) == collection.count(consistency="strong")


@pytest.mark.timeout(240)
def test_killed_shard_server_costs_no_query_and_no_acknowledged_write(tmp_path: Path) -> None:
    with clusters.running(tmp_path) as cluster:
        with shoal.Client(cluster.grpc_address, timeout_s=30.0) as client:
            collection = client.create_collection(
                "load", dimension=DIMENSION, shards=4, replicas=2
            )
            load = Load(cluster.grpc_address, writers=2)
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
            server = _leading_server(client)
            os.kill(_pid_of(client, server), signal.SIGKILL)
            killed_s = time.monotonic()
            before = len(load.acknowledged)
            wait_until(
                lambda: len(load.acknowledged) > before + 200, timeout_s=30, what="writes go on"
            )
            wait_until(
                lambda: _ready_replicas(client, server) == 4, timeout_s=60, what="replicas back"
            )
            back_s = time.monotonic() - killed_s
            stop.set()
            searcher.join(30)
            load.stop()
            assert failures == []
            assert answered > 20
            _check(load, collection)
            wait_until(lambda: _replicas_agree(client), timeout_s=30, what="replicas agree")
            print(f"replicas back after {back_s:.1f} s, {len(load.acknowledged)} rows")


@pytest.mark.timeout(300)
def test_kill_of_every_process_during_a_load_loses_nothing(tmp_path: Path) -> None:
    cluster = clusters.start(tmp_path)
    try:
        with shoal.Client(cluster.grpc_address, timeout_s=30.0) as client:
            client.create_collection("load", dimension=DIMENSION, shards=2, replicas=2)
        load = Load(cluster.grpc_address, writers=3)
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
            wait_until(lambda: _ready_replicas(client, None) == 4, timeout_s=60, what="all ready")
            _check(load, collection)
            collection.upsert(ids=["after"], vectors=np.ones((1, DIMENSION), dtype=np.float32))
            wait_until(lambda: _replicas_agree(client), timeout_s=30, what="replicas agree")


def _leading_server(client: shoal.Client) -> str:
    (collection,) = client.status("load").collections
    leaders = [
        replica.server
        for shard in collection.shards
        for replica in shard.replicas
        if replica.role == 1
    ]
    return max(set(leaders), key=leaders.count)


def _pid_of(client: shoal.Client, server: str) -> int:
    return next(actor.pid for actor in client.status().actors if actor.id == server)


def _ready_replicas(client: shoal.Client, server: str | None) -> int:
    (collection,) = client.status("load").collections
    return sum(
        replica.state == "ready" and server in (None, replica.server)
        for shard in collection.shards
        for replica in shard.replicas
    )


def _replicas_agree(client: shoal.Client) -> bool:
    (collection,) = client.status("load").collections
    return all(
        len(shard.replicas) == 2
        and len({(r.position.seq, r.set_checksum) for r in shard.replicas}) == 1
        for shard in collection.shards
    )
