"""Describes where and with what a bench ran, so that figures can be read next year."""

import contextlib
import os
import platform
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import faiss
import psutil

from chaos.cluster import processes_of
from shoal_cluster.bootstrap import RunningCluster

_DISTRIBUTIONS: Final = (
    "shoal",
    "faiss-cpu",
    "numpy",
    "ray",
    "grpcio",
    "protobuf",
    "uvloop",
    "msgpack",
    "obstore",
)


def describe_machine() -> dict[str, Any]:
    """load_average_1min: before the bench; on an idle machine below 0.2 a core."""
    memory = psutil.virtual_memory()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory.total / 2**30, 1),
        "kernel": platform.release(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "faiss_instructions": faiss.get_compile_options().strip(),
        "openmp_threads": 1,
    }


def describe_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _DISTRIBUTIONS
    }


def describe_processes(cluster: RunningCluster, *, seconds: float) -> list[dict[str, Any]]:
    """Returns threads, memory and idle processor time of every process of the cluster.

    idle_cpu_percent: over `seconds` with nobody asking; what Ray and our own timers cost a query's
    neighbours.
    """
    processes = processes_of(cluster)
    before_s = processor_seconds(processes)
    time.sleep(seconds)
    after_s = processor_seconds(processes)
    described = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            spent_s = after_s[process.pid] - before_s[process.pid]
            described.append(
                {
                    "process": title_of(process),
                    "threads": process.num_threads(),
                    "memory_mib": round(process.memory_info().rss / 2**20),
                    "idle_cpu_percent": round(100 * spent_s / seconds, 2),
                }
            )
    return sorted(described, key=lambda each: str(each["process"]))


def processor_seconds(processes: Iterable[psutil.Process]) -> dict[int, float]:
    """Returns processor time of all threads so far, by pid, to the nanosecond.

    From schedstat: what `ps` shows is sampled by timer ticks, too coarse for a query.
    """
    spent_s = {}
    for process in processes:
        nanoseconds = 0
        for thread in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            # A thread may end while it is being looked at.
            with contextlib.suppress(OSError):
                nanoseconds += int(thread.read_text().split()[0])
        if nanoseconds:
            spent_s[process.pid] = nanoseconds / 1e9
    return spent_s


def title_of(process: psutil.Process) -> str:
    """Returns `ray::Coordinator` for an actor, `raylet` for a binary, `ray x.py` for a script."""
    command = process.cmdline()
    words = command[0].split() if command else []
    first = Path(words[0]).name if words else "?"
    if not first.startswith("python"):
        return first
    script = next((word for word in command[1:] if word.endswith(".py")), "")
    if script:
        return f"ray {Path(script).name}"
    return "ray start" if "start" in command else f"python {' '.join(command[1:3])}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
