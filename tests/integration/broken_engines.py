"""Engines that do one thing wrong each, for the bench to notice."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.peers.exact_peer import Adapter
from tests.bench.peers.peer import Address, Condition, Floats, Loaded, Rows, Session, Setting


class WrongRows(Adapter):
    """Answers every query with the same rows."""

    def connect(self, address: Address) -> Session:
        return _SameRows()


class _SameRows:
    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        return [0] * k

    def close(self) -> None:
        return None


class RaisesAtStart(Adapter):
    def start(self, directory: Path) -> Address:
        raise RuntimeError("broken at start")


class RaisesAtLoad(Adapter):
    def load(self, rows: Rows, build: Setting) -> Loaded:
        raise RuntimeError("broken at load")


class RaisesAtSearch(Adapter):
    def connect(self, address: Address) -> Session:
        raise RuntimeError("broken at search")


class Hangs(Adapter):
    """Starts a process of another session in the background, then never answers again."""

    def load(self, rows: Rows, build: Setting) -> Loaded:
        child = "import os, time; os.fork() and os._exit(0); os.setsid(); "
        child += "print('in the background:', os.getpid(), flush=True); time.sleep(600)"
        subprocess.run([sys.executable, "-c", child], check=True)
        time.sleep(600)
        raise AssertionError("it was ended before")

    def stop(self) -> None:
        time.sleep(600)
