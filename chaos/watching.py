"""Watches a cluster from outside while something else loads it: builds, memory, the bucket."""

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import shoal
from shoal_cluster.bootstrap import RunningCluster

POLL_S = 0.05
FIND_WORKERS_S = 1.0
AFTER_BUILD_S = 0.5
"""A finished segment is still verified, opened and committed by the shard server."""

_BUILD_TITLE = b"ray::Builder.build"
"""Ray names a worker after the task that it carries out."""


class BuildWatch:
    """Notes when at least one segment was being built: by a seal or by a compaction."""

    def __init__(self, cluster: RunningCluster) -> None:
        assert cluster.ray_pid is not None, "the cluster has a Ray of its own"
        self._head = psutil.Process(cluster.ray_pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._spans_s: list[tuple[float, float]] = []
        self.memory_bytes_max = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def spans_s(self) -> list[tuple[float, float]]:
        """Returns from when to when something was built, ascending and disjoint."""
        return self._spans_s[:]

    def _watch(self) -> None:
        workers: list[int] = []
        found_s = float("-inf")
        while not self._stop.wait(POLL_S):
            now_s = time.monotonic()
            if now_s - found_s > FIND_WORKERS_S:
                workers, found_s = self._workers(), now_s
            building = [pid for pid in workers if _title(pid).startswith(_BUILD_TITLE)]
            if not building:
                continue
            self.memory_bytes_max = max(self.memory_bytes_max, *map(anonymous_bytes, building))
            until_s = now_s + AFTER_BUILD_S
            if self._spans_s and self._spans_s[-1][1] >= now_s:
                self._spans_s[-1] = (self._spans_s[-1][0], until_s)
            else:
                self._spans_s.append((now_s - POLL_S, until_s))

    def _workers(self) -> list[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in self._head.children(recursive=True)]
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The cluster at one moment. anonymous_mib: per actor, memory that no file backs.

    resident_mib also counts mapped files, which stay as long as nobody else needs the memory.
    objects: in the bucket, by the part of a shard that they belong to; directories: of all of it.
    """

    at_s: float
    anonymous_mib: dict[str, float]
    resident_mib: dict[str, float]
    objects: dict[str, int]
    directories: int
    bucket_mib: float
    rows_live: int
    segments: int
    manifest_versions: int

    @property
    def objects_total(self) -> int:
        return sum(self.objects.values())


@dataclass(slots=True)
class Sampler:
    """Takes samples of a cluster with a local bucket."""

    client: shoal.Client
    bucket: Path
    started_s: float
    samples: list[Sample] = field(default_factory=list)

    def take(self) -> Sample:
        status = self.client.status()
        shards = [shard for entry in status.collections for shard in entry.shards]
        actors = {actor.id: actor.pid for actor in status.actors if actor.pid}
        objects, directories, size_bytes = _count(self.bucket)
        sample = Sample(
            at_s=time.monotonic() - self.started_s,
            anonymous_mib={name: _mib(anonymous_bytes(pid)) for name, pid in actors.items()},
            resident_mib={name: _mib(_resident_bytes(pid)) for name, pid in actors.items()},
            objects=objects,
            directories=directories,
            bucket_mib=_mib(size_bytes),
            rows_live=sum(shard.rows_live for shard in shards),
            segments=sum(shard.segments for shard in shards),
            manifest_versions=sum(shard.manifest_version for shard in shards),
        )
        self.samples.append(sample)
        return sample


def anonymous_bytes(pid: int) -> int:
    """Returns the memory of a process that no file backs and nobody shares; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        resident: int = psutil.Process(pid).memory_info().rss
        return resident
    return 0


def _title(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _count(bucket: Path) -> tuple[dict[str, int], int, int]:
    """Returns objects by class (`wal` of `c/…/s/0000/wal/…`), directories, bytes of all objects."""
    objects: dict[str, int] = {}
    directories = size_bytes = 0
    for directory, _, names in os.walk(bucket):
        directories += 1
        parts = Path(directory).relative_to(bucket).parts
        kind = parts[4] if len(parts) > 4 else (parts[0] if parts else "cluster")
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size_bytes += os.stat(os.path.join(directory, name)).st_size
                objects[kind] = objects.get(kind, 0) + 1
    return objects, directories, size_bytes


def _mib(size_bytes: int) -> float:
    return round(size_bytes / 2**20, 1)
