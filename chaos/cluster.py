"""Real clusters for tests: real Ray, real sockets, a temporary bucket, nothing left behind."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from shoal_cluster import bootstrap

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    directory: Path,
    *,
    bucket: str | None = None,
    servers: int = 2,
    coordinators: int = 1,
    port: int | None = None,
    metrics_port: int | None = None,
) -> bootstrap.RunningCluster:
    """Starts a cluster whose bucket and state live under `directory`."""
    return bootstrap.up(
        bootstrap.UpOptions(
            name="test",
            bucket=bucket or str(directory / "bucket"),
            servers=servers,
            coordinators=coordinators,
            grpc_port=port or free_port(),
            metrics_port=metrics_port,
            state_directory=directory / "state",
            on_step=lambda step: None,
        )
    )


def stop(directory: Path) -> None:
    bootstrap.down("test", directory / "state", lambda step: None)


@contextlib.contextmanager
def running(directory: Path, **options: int | str) -> Iterator[bootstrap.RunningCluster]:
    cluster = start(directory, **options)  # type: ignore[arg-type]
    try:
        yield cluster
    finally:
        stop(directory)
        assert processes_of(cluster) == [], "down left processes behind"


def processes_of(cluster: bootstrap.RunningCluster) -> list[psutil.Process]:
    """Returns Ray's and our processes of a cluster: all descend from its `ray start`, or name its
    run directory.
    """
    found: dict[int, psutil.Process] = {}
    if cluster.ray_pid is not None and psutil.pid_exists(cluster.ray_pid):
        head = psutil.Process(cluster.ray_pid)
        for process in [head, *head.children(recursive=True)]:
            found[process.pid] = process
    for process in psutil.process_iter(["cmdline"]):
        if any(cluster.run_directory in part for part in process.info["cmdline"] or ()):
            found[process.pid] = process
    return [process for process in found.values() if _is_alive(process)]


def kill_everything(cluster: bootstrap.RunningCluster) -> int:
    """SIGKILLs every process of the cluster; returns how many there were."""
    killed: set[int] = set()
    while processes := processes_of(cluster):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)
                killed.add(process.pid)
        psutil.wait_procs(processes, timeout=5)
    return len(killed)


def wait_until(holds: Callable[[], T | None], *, timeout_s: float, what: str) -> T:
    """Polls until `holds` returns something true; fails naming `what` at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = holds()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
