"""`make chaos`: a real cluster under writes and searches, hurt on purpose, then checked.

Each nemesis strikes, the load must go on, the cluster must heal. At the end everything is read
strongly and compared with what was acknowledged; what other clients saw all the while goes before
the checker of the simulation (tests/simulation/history.py); and the bucket of the stopped cluster
is checked as `shoal check` does. Exit status 1 on any violation.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import shoal
from chaos import cluster as clusters
from chaos.observe import leading_server, pid_of, ready_replicas, replicas_agree
from chaos.workloads import recorded
from chaos.workloads.recorded import RecordedClients
from chaos.workloads.upserts import COLLECTION, DIMENSION, Upserts
from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.shard.checking import check_bucket

SHARDS, REPLICAS = 4, 2
HEAL_S = 60.0
STOP_S = 6.0
"""Longer than the controller waits before it suspects a silent server."""


class Searches:
    """One searcher that counts failures; none should fail while servers die one by one."""

    def __init__(self, address: str) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._address = address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._search, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)

    def _search(self) -> None:
        rng = np.random.default_rng(7)
        with shoal.Client(self._address, timeout_s=30.0) as client:
            while not self._stop.is_set():
                try:
                    client.collection(COLLECTION).search(rng.standard_normal(DIMENSION), k=5)
                    self.answered += 1
                except shoal.ShoalError as error:
                    self.failures.append(str(error))


def kill_leader(client: shoal.Client) -> str:
    server = leading_server(client)
    os.kill(pid_of(client, server), signal.SIGKILL)
    return f"SIGKILL {server}"


def stop_leader(client: shoal.Client) -> str:
    """SIGSTOP and, later, SIGCONT: makes a zombie that still believes it leads."""
    server = leading_server(client)
    pid = pid_of(client, server)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(STOP_S)
    os.kill(pid, signal.SIGCONT)
    return f"SIGSTOP {server} for {STOP_S:g} s"


def kill_controller(client: shoal.Client) -> str:
    os.kill(pid_of(client, "controller"), signal.SIGKILL)
    return "SIGKILL controller"


def kill_coordinator(client: shoal.Client) -> str:
    os.kill(pid_of(client, "coordinator"), signal.SIGKILL)
    return "SIGKILL coordinator"


NEMESES = (kill_leader, stop_leader, kill_controller, kill_coordinator)


def run(*, rounds: int, seed: int) -> dict[str, object]:
    """Runs `rounds` strikes and returns figures and violations."""
    rng = random.Random(seed)
    struck: list[str] = []
    heal_s: list[float] = []
    with tempfile.TemporaryDirectory(prefix="shoal-chaos-") as folder:
        with clusters.running(Path(folder), servers=3) as cluster:
            with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
                collection = client.create_collection(
                    COLLECTION, dimension=DIMENSION, shards=SHARDS, replicas=REPLICAS
                )
                RecordedClients.create(client, shards=SHARDS, replicas=REPLICAS)
                load = Upserts(cluster.grpc_address, writers=2)
                clients = RecordedClients(cluster.grpc_address, shards=SHARDS, seed=seed)
                searches = Searches(cluster.grpc_address)
                load.start()
                searches.start()
                clients.start()
                clusters.wait_until(
                    lambda: len(load.acknowledged) > 300, timeout_s=60, what="the load started"
                )
                order = [NEMESES[i % len(NEMESES)] for i in range(rounds)]
                rng.shuffle(order)
                for nemesis in order:
                    struck.append(nemesis(client))
                    started_s = time.monotonic()
                    before = len(load.acknowledged)
                    clusters.wait_until(
                        lambda before=before: len(load.acknowledged) > before + 100,
                        timeout_s=HEAL_S,
                        what=f"writes go on after {struck[-1]}",
                    )
                    clusters.wait_until(
                        lambda: _healed(client), timeout_s=HEAL_S, what=f"heals after {struck[-1]}"
                    )
                    heal_s.append(time.monotonic() - started_s)
                load.stop()
                searches.stop()
                clients.stop()
                violations = load.violations(collection)
                for name in (COLLECTION, recorded.COLLECTION):
                    clusters.wait_until(
                        lambda name=name: replicas_agree(client, name),
                        timeout_s=HEAL_S,
                        what=f"replicas of {name} agree",
                    )
                clients.rest(client.status(recorded.COLLECTION))
        violations += clients.violations()
        violations += asyncio.run(damages(Path(folder) / "bucket"))
    return {
        "seed": seed,
        "strikes": struck,
        "heal_s": [round(value, 2) for value in heal_s],
        "rows_acknowledged": len(load.acknowledged),
        "writes_unknown": len(load.unknown) + len(load.unknown_deletes),
        "operations_recorded": clients.history.operations(),
        "searches_answered": searches.answered,
        "searches_failed": len(searches.failures),
        "search_failures": searches.failures[:5],
        "violations": violations,
    }


async def damages(bucket: Path) -> list[str]:
    """Checks the bucket of a cluster that has stopped; returns what is wrong, in words."""
    store = LocalStore(bucket)
    try:
        report = await check_bucket(store, deep=True, progress=lambda done, total: None)
    finally:
        await store.close()
    return [f"{each.key} ({each.invariant}): {each.message}" for each in report.problems]


def _healed(client: shoal.Client) -> bool:
    try:
        return ready_replicas(client, None) == SHARDS * REPLICAS
    except shoal.ShoalError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = run(rounds=options.rounds, seed=options.seed)
    Path("build").mkdir(exist_ok=True)
    Path("build/chaos.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
