"""Compares Shoal with other vector databases: same rows, same recall, same machine, one run.

    python -m tests.bench.peers [--rows 100000] [--corpus windows] [--engines shoal,pgvector,...]
    python -m tests.bench.peers --smoke

`make bench-peers` installs the others first, each in an environment of its own, and makes the
corpus. docs/benchmarks.md says how to read what it prints.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.bench import machine
from tests.bench.corpora.files import NoCorpus
from tests.bench.corpus import CORPORA, DEMO, BenchCorpus, K, make_corpus, seed_of
from tests.bench.peers.known import ENGINES, EXACT, OF_THE_FULL_RUN, SHOAL, builds_of
from tests.bench.peers.measure import TARGETS, Size, Workload, make_workload, measure_engine
from tests.bench.peers.processes import VENVS, adopt_orphans
from tests.bench.peers.report import render

_PLOTS: Final = "plots"
_PLOTS_S: Final = 120.0
_YARDSTICK_ROUNDS: Final = 30


def full_size(rows: int) -> Size:
    """Eight engines at 100,000 rows within 25 minutes on two idle cores."""
    return Size(
        rows=rows,
        clients=(1, 8),
        seconds=2.0,
        sweep_seconds=2.5,
        sweeps_seconds=20.0,
        load_seconds=300.0 + rows / 150,
    )


SMOKE: Final = Size(
    rows=5_000,
    clients=(1, 2),
    seconds=0.3,
    sweep_seconds=0.5,
    sweeps_seconds=5.0,
    load_seconds=60.0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--corpus", choices=CORPORA, default="windows")
    parser.add_argument("--engines", default=",".join(OF_THE_FULL_RUN))
    parser.add_argument("--all-builds", action="store_true", help="every index the adapters know")
    parser.add_argument("--smoke", action="store_true", help="Shoal and numpy, 5,000 demo rows")
    parser.add_argument("--json", type=Path, default=Path("build/bench-peers.json"))
    options = parser.parse_args()
    if options.smoke:
        size, name, engines = SMOKE, DEMO, [SHOAL, EXACT]
    else:
        size, name, engines = full_size(options.rows), options.corpus, options.engines.split(",")
    if unknown := set(engines) - set(ENGINES):
        parser.error(f"no engine {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    # A terminated run cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tell = _teller(time.perf_counter())
    tell(f"reading {size.rows:,} rows of {name!r} and finding exact answers")
    try:
        corpus = make_corpus(size.rows, name)
    except NoCorpus as missing:
        parser.error(str(missing))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    bench = run(corpus, name, size, engines, options.json, tell, all_builds=options.all_builds)
    print(render(bench))
    print(f"\nfigures are in {options.json}, what engines printed in {log_of(options.json)}")
    _plot(options.json)


def run(
    corpus: BenchCorpus,
    name: str,
    size: Size,
    engines: Sequence[str],
    path: Path,
    tell: Callable[[str], None],
    *,
    all_builds: bool = False,
) -> dict[str, Any]:
    """Measures one engine after the other; `path` holds what is known after each."""
    adopt_orphans()
    bench: dict[str, Any] = {
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
        "corpus": name,
        "seed": seed_of(name),
        "size": asdict(size),
        "k": K,
        "targets": TARGETS,
        "engines": [],
    }
    with (
        tempfile.TemporaryDirectory(prefix="shoal-peers-") as directory,
        log_of(path).open("wb") as log,
    ):
        workload = make_workload(corpus, size, Path(directory))
        bench["conditions"] = [
            {"condition": each.order, "selectivity": round(each.selectivity, 4)}
            for each in workload.asked
        ]
        for engine in engines:
            for build in range(builds_of(engine) if all_builds else 1):
                bench["engines"].append(_one(engine, build, workload, log, tell))
                path.write_text(json.dumps(bench, indent=1) + "\n")
    return bench


def log_of(path: Path) -> Path:
    return path.with_suffix(".log")


def _one(
    engine: str, build: int, workload: Workload, log: Any, tell: Callable[[str], None]
) -> dict[str, Any]:
    started_s = time.perf_counter()
    yardstick_ms = _yardstick_ms(workload.corpus)
    figures = measure_engine(engine, build, workload, log, lambda step: tell(f"{engine}: {step}"))
    return figures | {
        "yardstick_ms": round(yardstick_ms, 2),
        "took_s": round(time.perf_counter() - started_s, 1),
    }


def _yardstick_ms(corpus: BenchCorpus) -> float:
    """Returns the median time of one fixed computation: what differs between engines of a run is
    the machine's, not theirs.
    """
    rows, queries = corpus.vectors[:4_000], corpus.queries[:64]
    spent_s = []
    for _ in range(_YARDSTICK_ROUNDS):
        before_s = time.perf_counter()
        np.sort(queries @ rows.T, axis=1)
        spent_s.append(time.perf_counter() - before_s)
    return float(np.median(spent_s)) * 1e3


def _plot(path: Path) -> None:
    """Draws the curves where the environment with matplotlib was made."""
    python = VENVS / _PLOTS / "bin" / "python"
    if not python.exists():
        print(f"no curves: there is no {python}")
        return
    command = [str(python), "-m", "tests.bench.peers.curves", str(path)]
    drawn = subprocess.run(command, check=False, timeout=_PLOTS_S, capture_output=True, text=True)
    print(drawn.stdout.strip() if drawn.returncode == 0 else f"no curves: {drawn.stderr}")


def _teller(started_s: float) -> Callable[[str], None]:
    def tell(step: str) -> None:
        print(f"[{time.perf_counter() - started_s:6.1f} s] {step}", flush=True)

    return tell


if __name__ == "__main__":
    main()
