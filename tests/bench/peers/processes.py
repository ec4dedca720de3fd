"""Starts workers in an engine's environment, asks them with deadlines, and ends what they started.

The bench process adopts whatever its workers leave behind (a subreaper), so that an engine that
moved to the background is found and ended as well; nothing else on the machine is touched.
"""

import contextlib
import ctypes
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import psutil

from tests.bench.peers.known import THEIRS
from tests.bench.peers.peer import PeerFailed

VENVS: Final = Path("build/bench-venv")
INSTALL_ERROR: Final = "install-error.txt"
STOP_S: Final = 30.0
"""Postgres and Milvus write what they hold before they end."""

READY_S: Final = 60.0
"""To import what an engine needs on a machine whose disk is busy."""

_ROOT: Final = Path(__file__).parents[3]
_SUBREAPER: Final = 36

_ENVIRONMENT: Final = {
    "ANONYMIZED_TELEMETRY": "False",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(_ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Nobody calls home."""


def interpreter_of(name: str, venvs: Path = VENVS) -> str:
    """Returns the Python that runs this engine.

    Raises: PeerFailed when its environment could not be made.
    """
    if name not in THEIRS:
        return sys.executable
    directory = venvs / name
    failed = directory / INSTALL_ERROR
    if failed.exists():
        raise PeerFailed(f"not installed: {failed.read_text().strip()}")
    python = directory / "bin" / "python"
    if not python.exists():
        raise PeerFailed(f"not installed: no {python}; make bench-peers installs it")
    return str(python.absolute())


def adopt_orphans() -> None:
    """Makes this process the parent of what its descendants leave behind."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


class Worker:
    """One worker process (worker.py). network_of: the worker whose network it joins.

    own_network: it gets a network of its own with nothing but loopback, so that an engine that
    listens on every address is reached by its clients alone.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        log: IO[bytes],
        *,
        own_network: bool = False,
        network_of: "Worker | None" = None,
    ) -> None:
        command = [interpreter_of(name), "-m", "tests.bench.peers.worker", name, str(directory)]
        if own_network:
            command = ["unshare", *_as_whom("--map-root-user"), "--net", *command]
        if network_of is not None:
            pid = str(network_of.pid)
            command = [
                "nsenter",
                "--target",
                pid,
                *_as_whom("--preserve-credentials"),
                "--net",
                *command,
            ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=_ROOT,
            env={**os.environ, **_ENVIRONMENT},
        )
        self._unread = b""
        self._hangs = False

    def wait_ready(self) -> None:
        """Waits until the engine's adapter is imported. Several workers start side by side."""
        self.receive(READY_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(self._ended()) from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Raises: PeerFailed with the worker's error, or when there is no answer in time."""
        line = self._read_line(timeout_s)
        if not line:
            raise PeerFailed(self._ended())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        self.send(do, **arguments)
        return self.receive(timeout_s)

    def memory_mib(self) -> int:
        """Returns the memory of this process and all below it, shared pages counted once."""
        total_bytes = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                total_bytes += process.memory_full_info().pss
        return round(total_bytes / 2**20)

    def close(self) -> None:
        """Lets it stop by itself, then ends it and everything it started.

        One that did not answer in time gets no time to stop either.
        """
        family = self._family()
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate(timeout=0 if self._hangs else STOP_S)
        family += [each for each in self._family() if each not in family]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=STOP_S)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()

    def _family(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    self._hangs = True
                    raise PeerFailed(f"no answer within {timeout_s:.0f} s")
                part = os.read(self._process.stdout.fileno(), 1 << 20)
                if not part:
                    return b""
                self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> str:
        return f"its process ended with status {self._process.wait()}"


def _as_whom(of_users: str) -> list[str]:
    """Only root may make a network; anyone else must first be root of a user namespace."""
    return [] if os.geteuid() == 0 else ["--user", of_users]


@contextlib.contextmanager
def closing(workers: list[Worker]) -> Iterator[list[Worker]]:
    try:
        yield workers
    finally:
        while workers:
            workers.pop().close()


@contextlib.contextmanager
def ending_orphans() -> Iterator[None]:
    """Ends what was started meanwhile, left behind by its parent and adopted by this process."""
    before = psutil.Process().children(recursive=True)
    try:
        yield
    finally:
        left = [each for each in psutil.Process().children(recursive=True) if each not in before]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_S)
