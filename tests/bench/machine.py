"""Describes where and with what a bench ran, so that figures can be read next year."""

import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import faiss
import psutil

from shoal_cluster.bootstrap import RunningCluster
from chaos.cluster import processes_of

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

IDLE_S: Final = 3.0


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


def describe_processes(cluster: RunningCluster) -> list[dict[str, Any]]:
    """Returns threads, memory and idle processor time of every process of the cluster.

    idle_cpu_percent: over IDLE_S with nobody asking; what Ray and our own timers cost a query's
    neighbours.
    """
    processes = processes_of(cluster)
    before = _cpu_seconds(processes)
    time.sleep(IDLE_S)
    after = _cpu_seconds(processes)
    described = []
    for process in processes:
        if process.pid not in before or process.pid not in after:
            continue
        try:
            described.append(
                {
                    "process": _title(process.cmdline()),
                    "threads": process.num_threads(),
                    "memory_mib": round(process.memory_info().rss / 2**20),
                    "idle_cpu_percent": round(
                        100 * (after[process.pid] - before[process.pid]) / IDLE_S, 1
                    ),
                }
            )
        except psutil.NoSuchProcess:
            continue
    return sorted(described, key=lambda each: str(each["process"]))


def _cpu_seconds(processes: Sequence[psutil.Process]) -> dict[int, float]:
    spent = {}
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent[process.pid] = times.user + times.system
    return spent


def _title(command: Sequence[str]) -> str:
    """Returns `ray::Coordinator` of an actor, `raylet` of a binary, `ray monitor.py` of a script.
    """
    if not command:
        return "?"
    words = command[0].split()
    first = Path(words[0]).name if words else "?"
    if first.startswith("python"):
        script = next((word for word in command[1:] if word.endswith(".py")), "")
        return f"ray {Path(script).name}" if script else first
    return first


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
