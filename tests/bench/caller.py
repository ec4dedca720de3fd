"""A client process of the bench: asks queries along the path it is told, as fast as it can.

    python -m tests.bench.caller SETUP

Takes one JSON object a line from standard input and answers each with one:
    {"path", "seconds", "gap_s"}  -> {"latencies_us", "seconds"}; the path goes on where it stopped
    {"found": path}               -> {"found": rows of each query asked so far, by query number}
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.corpus import Floats
from tests.bench.paths import (
    BATCH,
    LinkSearch,
    RawSearch,
    RawThreads,
    SdkSearch,
    SegmentsSearch,
    Setup,
    StreamSearch,
    rows_of,
)
from tests.bench.stages import StagedSearch


class Caller:
    """Holds one of each path, opened when first asked along."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        queries = setup.queries()
        self._queries: list[Floats] = [queries[i : i + 1] for i in range(len(queries))]
        self._open: dict[str, Any] = {}
        self._next: dict[str, int] = {}
        self._answers: dict[str, dict[int, Any]] = {}

    def close(self) -> None:
        for path in self._open.values():
            with contextlib.suppress(AttributeError):
                path.close()

    def found(self, path: str) -> dict[int, list[int]]:
        return {query: rows_of(answer) for query, answer in self._answers[path].items()}

    def run(self, path: str, seconds: float, gap_s: float) -> dict[str, Any]:
        """Asks for `seconds`. gap_s: how long to sleep between an answer and the next query."""
        searching = self._path(path)
        started_s = time.perf_counter()
        if isinstance(searching, LinkSearch):
            latencies_s = searching.run(self._run_link(path, searching, started_s + seconds))
        elif isinstance(searching, StagedSearch):
            return {"stages": self._run_stages(path, searching, started_s + seconds)}
        elif path == "raw_cores":
            latencies_s = searching.ask_for(self._queries, seconds)
        elif path.endswith("_batch"):
            latencies_s = self._run_batches(path, searching, started_s + seconds)
        else:
            latencies_s = self._run(path, searching, started_s + seconds, gap_s)
        elapsed_s = time.perf_counter() - started_s
        return {
            "latencies_us": [round(each * 1e6, 1) for each in latencies_s],
            "seconds": elapsed_s,
        }

    def _path(self, path: str) -> Any:
        searching = self._open.get(path)
        if searching is None:
            searching = self._open[path] = _OPEN[path](self._setup)
            self._next[path] = 0
            self._answers[path] = {}
        return searching

    def _run(self, path: str, searching: Any, end_s: float, gap_s: float) -> list[float]:
        latencies_s = []
        answers, queries = self._answers[path], self._queries
        number = self._next[path]
        while (before_s := time.perf_counter()) < end_s:
            query = number % len(queries)
            answers[query] = searching.ask(queries[query])
            latencies_s.append(time.perf_counter() - before_s)
            number += 1
            if gap_s:
                time.sleep(gap_s)
        self._next[path] = number
        return latencies_s

    def _run_batches(self, path: str, searching: Any, end_s: float) -> list[float]:
        """Returns the latency of each call, once for each of its queries."""
        latencies_s: list[float] = []
        answers, queries = self._answers[path], np.concatenate(self._queries)
        number = self._next[path]
        while (before_s := time.perf_counter()) < end_s:
            asked = [(number + i) % len(queries) for i in range(BATCH)]
            found = searching.ask_batch(queries[asked])
            latencies_s += [time.perf_counter() - before_s] * BATCH
            answers.update(zip(asked, found, strict=True))
            number += BATCH
        self._next[path] = number
        return latencies_s

    async def _run_link(self, path: str, searching: LinkSearch, end_s: float) -> list[float]:
        latencies_s = []
        answers, queries = self._answers[path], self._queries
        number = self._next[path]
        while (before_s := time.perf_counter()) < end_s:
            query = number % len(queries)
            answers[query] = await searching.ask(queries[query])
            latencies_s.append(time.perf_counter() - before_s)
            number += 1
        self._next[path] = number
        return latencies_s

    def _run_stages(
        self, path: str, searching: StagedSearch, end_s: float
    ) -> list[dict[str, float]]:
        samples = []
        number = self._next[path]
        while time.perf_counter() < end_s:
            samples.append(searching.ask(self._queries[number % len(self._queries)]))
            number += 1
        self._next[path] = number
        return samples


_OPEN: dict[str, Any] = {
    "raw": RawSearch,
    "raw_paced": RawSearch,
    "raw_segments": SegmentsSearch,
    "link": LinkSearch,
    "raw_cores": RawThreads,
    "raw_batch": RawThreads,
    "sdk": SdkSearch,
    "grpc": lambda setup: SdkSearch(setup, transport="grpc"),
    "grpc_stream": StreamSearch,
    "sdk_payload": lambda setup: SdkSearch(setup, with_payload=True),
    "sdk_batch": SdkSearch,
    "stages": StagedSearch,
    "grpc_stages": lambda setup: StagedSearch(setup, transport="grpc"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("setup", type=Path)
    caller = Caller(Setup.load(parser.parse_args().setup))
    print(json.dumps({"ready": True}), flush=True)
    # Ends with the bench: when its end of the pipe closes, whatever the reason.
    for line in sys.stdin:
        order = json.loads(line)
        if "found" in order:
            answer: dict[str, Any] = {"found": caller.found(order["found"])}
        else:
            answer = caller.run(order["path"], order["seconds"], order.get("gap_s", 0.0))
        print(json.dumps(answer), flush=True)
    caller.close()


if __name__ == "__main__":
    main()
