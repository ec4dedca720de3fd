"""Measures how long writes wait when the primary's process is killed or stopped, on real Ray."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

import shoal
from chaos import cluster as clusters
from chaos.cluster import wait_until
from chaos.observe import leading_server, pid_of, ready_replicas
from chaos.workloads.upserts import COLLECTION

DIMENSION: Final = 32
WRITERS: Final = 4
PACE_S: Final = 0.01
REPLICAS: Final = 2
TAKEOVER_S_MAX: Final = 60.0
HEAL_S_MAX: Final = 120.0
STEADY_WRITES: Final = 20
"""Acknowledged between two strikes, so that each strikes a shard at work."""


class Writers:
    """Threads that each write one row after another and note when each was acknowledged."""

    def __init__(self, address: str) -> None:
        self.acknowledged: list[tuple[float, float, str]] = []
        self.failures: list[str] = []
        self._address = address
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(number,), daemon=True)
            for number in range(WRITERS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TAKEOVER_S_MAX)
            assert not thread.is_alive(), "a writer hangs"

    def first_after(self, moment_s: float) -> float | None:
        """Returns when the first write begun after `moment_s` was acknowledged, if any was."""
        ends = [end_s for begin_s, end_s, _ in self.acknowledged[:] if begin_s > moment_s]
        return min(ends, default=None)

    def _write(self, number: int) -> None:
        rng = np.random.default_rng(number)
        written = 0
        with shoal.Client(self._address, timeout_s=TAKEOVER_S_MAX) as client:
            collection = client.collection(COLLECTION)
            while not self._stop.wait(PACE_S):
                written += 1
                name = f"{number}-{written}"
                begin_s = time.monotonic()
                try:
                    collection.upsert(ids=[name], vectors=rng.standard_normal((1, DIMENSION)))
                except shoal.ShoalError as error:
                    self.failures.append(str(error))
                else:
                    self.acknowledged.append((begin_s, time.monotonic(), name))


def measure(
    directory: Path, *, kills: int, stops: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Strikes the primary of a shard with two replicas and returns how long writes waited.

    A write that was under way when the signal came does not count: its reply may have been on its
    way. A stopped process is let go on once another leads: it wakes as a zombie.
    """
    directory.mkdir(parents=True, exist_ok=True)
    progress("starting a cluster")
    taken_s: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
    with clusters.running(directory, servers=REPLICAS) as cluster:
        with shoal.Client(cluster.grpc_address, timeout_s=TAKEOVER_S_MAX) as client:
            collection = client.create_collection(
                COLLECTION, dimension=DIMENSION, shards=1, replicas=REPLICAS
            )
            writers = Writers(cluster.grpc_address)
            writers.start()
            strikes = ["SIGKILL"] * kills + ["SIGSTOP"] * stops
            for number, strike in enumerate(strikes, start=1):
                _wait_until_steady(client, writers)
                waited_s = _strike(client, writers, signal.Signals[strike])
                taken_s[strike].append(waited_s)
                progress(f"{strike} {number} of {len(strikes)}: {waited_s:.2f} s")
            writers.stop()
            found = {point.id for point in collection.scroll(consistency="strong")}
    acknowledged = {name for _, _, name in writers.acknowledged}
    return {
        "strikes": {strike: _summary(each) for strike, each in taken_s.items() if each},
        "rows_acknowledged": len(acknowledged),
        "rows_lost": len(acknowledged - found),
        "writes_failed": len(writers.failures),
        "write_failures": writers.failures[:5],
    }


def _wait_until_steady(client: shoal.Client, writers: Writers) -> None:
    wait_until(lambda: _all_ready(client), timeout_s=HEAL_S_MAX, what="both replicas are ready")
    before = len(writers.acknowledged)
    wait_until(
        lambda: len(writers.acknowledged) >= before + STEADY_WRITES,
        timeout_s=HEAL_S_MAX,
        what="writes go on",
    )


def _strike(client: shoal.Client, writers: Writers, strike: signal.Signals) -> float:
    pid = pid_of(client, leading_server(client))
    os.kill(pid, strike)
    struck_s = time.monotonic()
    try:
        wait_until(
            lambda: writers.first_after(struck_s) is not None,
            timeout_s=TAKEOVER_S_MAX,
            what=f"a write is acknowledged after {strike.name}",
        )
    finally:
        if strike is signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    acknowledged_s = writers.first_after(struck_s)
    assert acknowledged_s is not None, "just seen"
    return acknowledged_s - struck_s


def _all_ready(client: shoal.Client) -> bool:
    try:
        return ready_replicas(client, None) == REPLICAS
    except shoal.ShoalError:
        return False


def _summary(taken_s: list[float]) -> dict[str, Any]:
    p50_s, p99_s = np.percentile(taken_s, [50, 99])
    return {
        "count": len(taken_s),
        "p50_s": round(float(p50_s), 2),
        "p99_s": round(float(p99_s), 2),
        "max_s": round(max(taken_s), 2),
        "each_s": [round(each_s, 2) for each_s in taken_s],
    }
