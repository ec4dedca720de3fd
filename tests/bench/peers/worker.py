"""A process of the bench in an engine's environment: runs the engine, or is one of its clients.

    python -m tests.bench.peers.worker NAME DIRECTORY

Takes one JSON object a line from standard input and answers each with one; see `Worker`. An error
is answered as {"error": text}. Ends, and ends the engine, when its input closes. What engines print
goes to standard error: the bench keeps it in a file.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.bench.peers.known import adapter
from tests.bench.peers.peer import Address, Condition, Floats, Rows, Session, Setting

VECTORS: Final = "vectors.npy"
QUERIES: Final = "queries.npy"
COLUMNS: Final = "columns.json"
ENGINE: Final = "engine"
"""Where the engine writes, below the same directory."""

_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_SUBREAPER: Final = 36
"""PR_SET_CHILD_SUBREAPER: what an engine starts in the background stays below this process."""


class Worker:
    """Every public method is an order; its arguments and answers are JSON objects."""

    def __init__(self, name: str, directory: Path) -> None:
        self._peer = adapter(name)
        self._directory = directory
        self._queries: Floats = np.load(directory / QUERIES)
        self._address: Address = {}
        self._sessions: list[Session] = []

    def describe(self) -> dict[str, Any]:
        return {
            "versions": {each: metadata.version(each) for each in self._peer.distributions},
            "networked": self._peer.networked,
            "clients": self._peer.clients,
            "builds": self._peer.builds,
        }

    def start(self) -> dict[str, Any]:
        engine = self._directory / ENGINE
        engine.mkdir()
        self._address = self._peer.start(engine)
        return {"address": self._address}

    def load(self, build: Setting) -> dict[str, Any]:
        columns = json.loads((self._directory / COLUMNS).read_text())
        rows = Rows(
            vectors=np.load(self._directory / VECTORS, mmap_mode="r"),
            columns={
                name: [column["values"][code] for code in column["codes"]]
                for name, column in columns.items()
            },
        )
        loaded = self._peer.load(rows, build)
        return {
            "seconds": {step: round(spent, 2) for step, spent in loaded.seconds.items()},
            "settings": loaded.settings,
            "note": loaded.note,
        }

    def settings(self, condition: Mapping[str, str] | None, rows: int) -> dict[str, Any]:
        return {"chains": self._peer.settings(_condition(condition), rows)}

    def connect(self, address: Address, sessions: int) -> dict[str, Any]:
        """Opens as many sessions as there are to be threads asking at once."""
        while len(self._sessions) < sessions:
            self._sessions.append(self._peer.connect(address))
        return {}

    def ask(
        self,
        setting: Setting,
        condition: Mapping[str, str] | None,
        k: int,
        seconds: float,
        first: int,
        threads: int,
        once: bool,
    ) -> dict[str, Any]:
        """Asks for so long, or with `once` until every query was asked if that is sooner.

        first: the query to begin with; threads begin evenly spread from there.
        """
        askers = [
            _Asker(session, self._queries, _condition(condition), setting, k)
            for session in self._sessions[:threads]
        ]
        most = -(-len(self._queries) // threads) if once else None
        step = len(self._queries) // threads
        started_s = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            running = [
                pool.submit(asker.run, first + number * step, seconds, most)
                for number, asker in enumerate(askers)
            ]
        elapsed_s = time.perf_counter() - started_s
        for each in running:
            each.result()
        found: dict[int, list[int]] = {}
        for asker in askers:
            found |= asker.found
        return {
            "latencies_us": [round(each * 1e6, 1) for one in askers for each in one.latencies_s],
            "found": found,
            "seconds": elapsed_s,
        }

    def tune(self, setting: Setting) -> dict[str, Any]:
        self._peer.tune(setting)
        return {}

    def stop(self) -> dict[str, Any]:
        while self._sessions:
            self._sessions.pop().close()
        self._peer.stop()
        return {}


class _Asker:
    """One client: asks one query after the other."""

    def __init__(
        self,
        session: Session,
        queries: Floats,
        condition: Condition | None,
        setting: Setting,
        k: int,
    ) -> None:
        self._session = session
        self._queries = queries
        self._condition = condition
        self._setting = setting
        self._k = k
        self.latencies_s: list[float] = []
        self.found: dict[int, list[int]] = {}

    def run(self, first: int, seconds: float, most: int | None) -> None:
        search = self._session.search
        number = first
        end_s = time.perf_counter() + seconds
        while (before_s := time.perf_counter()) < end_s and len(self.latencies_s) != most:
            query = number % len(self._queries)
            ids = search(self._queries[query], self._k, self._condition, self._setting)
            self.latencies_s.append(time.perf_counter() - before_s)
            self.found[query] = [int(each) for each in ids]
            number += 1


def _condition(given: Mapping[str, str] | None) -> Condition | None:
    return None if given is None else Condition(column=given["column"], value=given["value"])


def _keep_stdout() -> Callable[[Mapping[str, Any]], None]:
    """Returns what answers on the real standard output, which engines then cannot print to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(given: Mapping[str, Any]) -> None:
        print(json.dumps(given), file=answers, flush=True)

    return answer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    answer = _keep_stdout()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    _raise_loopback()
    try:
        worker = Worker(options.name, options.directory)
    except Exception as error:  # noqa: BLE001 - the outermost loop of a process
        answer(_described(error))
        return
    answer({"ready": True})
    try:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer(getattr(worker, order.pop("do"))(**order))
            except Exception as error:  # noqa: BLE001 - the outermost loop of a process
                answer(_described(error))
    finally:
        worker.stop()


def _raise_loopback() -> None:
    """Brings up the loopback device, which is down in a network of one's own."""
    up = struct.pack("16sH14x", b"lo", _IFF_UP)
    with socket.socket() as any_socket, contextlib.suppress(PermissionError):
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, up)


def _described(error: Exception) -> dict[str, str]:
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
