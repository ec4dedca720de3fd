"""Starts the bench's own processes and talks to them; none outlives the bench."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1"}
"""FAISS asks OpenMP; on an executor's thread only the environment keeps it to one thread."""

STOP_TIMEOUT_S: Final = 10.0


class CallerProcess:
    """One client process (caller.py). `send` starts a round, `receive` waits for its answer."""

    def __init__(self, setup: Path) -> None:
        self._process = _start("tests.bench.caller", str(setup))
        self.receive()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a client process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self.send(order)
        return self.receive()

    def close(self) -> None:
        _stop(self._process)


@contextlib.contextmanager
def callers(setup: Path, count: int) -> Iterator[list[CallerProcess]]:
    started: list[CallerProcess] = []
    try:
        for _ in range(count):
            started.append(CallerProcess(setup))
        yield started
    finally:
        for caller in started:
            caller.close()


@contextlib.contextmanager
def shard_process(
    *, bucket: str, collection_id: str, socket: Path, secret: bytes
) -> Iterator[tuple[str, int]]:
    """Yields the link address of a shard process, and how many segments it opened."""
    process = _start(
        "tests.bench.shard_process",
        *("--bucket", bucket),
        *("--collection", collection_id),
        *("--listen", f"unix:{socket}"),
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(secret.hex() + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the shard process ended with status {process.wait()}")
        address, segments = line.split()
        yield address, int(segments)
    finally:
        _stop(process)


def _start(module: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **_ENVIRONMENT},
    )


def _stop(process: "subprocess.Popen[str]") -> None:
    """Ends a process by closing its input, as each of ours expects; kills it if that fails."""
    with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
        process.communicate(timeout=STOP_TIMEOUT_S)
    if process.poll() is None:
        process.kill()
        process.communicate()
