"""`make bench-peers` in small: Shoal and numpy, nothing installed; and engines that break."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bench.corpus import make_corpus
from tests.bench.peers import known
from tests.bench.peers.__main__ import SMOKE
from tests.bench.peers.measure import TARGETS, Workload, make_workload, measure_engine
from tests.bench.peers.peer import PeerFailed
from tests.bench.peers.processes import INSTALL_ERROR, Worker, interpreter_of

ROOT = Path(__file__).parents[2]
BROKEN = "tests.integration.broken_engines:"


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    size = replace(SMOKE, rows=2_000, seconds=0.05, sweep_seconds=0.2)
    return make_workload(make_corpus(size.rows), size, tmp_path_factory.mktemp("workload"))


def _quiet(step: str) -> None:
    return None


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Any]:
    with (tmp_path / "log").open("w+b") as file:
        yield file


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_comparison_measures_shoal_and_an_exact_engine_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bench.peers", "--smoke", "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    bench = json.loads(path.read_text())
    assert [engine["engine"] for engine in bench["engines"]] == ["shoal", "exact"]
    for engine in bench["engines"]:
        assert "failed" not in engine, engine["failed"]
        measured = engine["measured"]
        assert len(measured) == len(SMOKE.clients) * len(bench["conditions"]) * len(TARGETS)
        assert all(each["queries_per_s"] > 0 for each in measured)
        assert all(each["recall"] >= each["target"] for each in measured if each["reached"])
        assert engine["load"]["rows_per_s"] > 0 and engine["memory_mib"] > 0
    exact = bench["engines"][1]
    assert {each["setting"]["drop"] for each in exact["measured"]} == {0}
    assert [round(each["selectivity"], 2) for each in bench["conditions"]] == [1.0, 0.11, 0.01]
    assert "recall 0.95, no filter" in ran.stdout and "exact" in ran.stdout


@pytest.mark.slow
def test_engine_that_returns_wrong_rows_is_seen_to_miss_the_recall(
    workload: Workload, log: Any
) -> None:
    figures = measure_engine(BROKEN + "WrongRows", 0, workload, log, _quiet)
    assert "failed" not in figures, figures
    assert not any(each["reached"] for each in figures["measured"])
    assert max(each["recall"] for each in figures["measured"]) <= 0.1


@pytest.mark.slow
def test_engine_that_raises_is_reported_with_the_step_and_its_error(
    workload: Workload, log: Any
) -> None:
    for step in ("start", "load", "search"):
        figures = measure_engine(BROKEN + f"RaisesAt{step.title()}", 0, workload, log, _quiet)
        assert figures["failed"] == {"at": step, "error": f"RuntimeError: broken at {step}"}


@pytest.mark.slow
def test_engine_that_hangs_is_ended_with_what_it_started_in_the_background(
    workload: Workload, log: Any
) -> None:
    hasty = replace(workload, size=replace(workload.size, load_seconds=1.0))
    started_s = time.monotonic()
    figures = measure_engine(BROKEN + "Hangs", 0, hasty, log, _quiet)
    assert figures["failed"] == {"at": "load", "error": "no answer within 1 s"}
    assert time.monotonic() - started_s < 20
    log.seek(0)
    background = re.search(rb"in the background: (\d+)", log.read())
    assert background is not None
    assert not psutil.pid_exists(int(background[1]))


def test_engine_that_is_not_installed_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"not installed: no .*python; make bench-peers"):
        interpreter_of("chroma", tmp_path)
    (tmp_path / "chroma").mkdir()
    (tmp_path / "chroma" / INSTALL_ERROR).write_text("ERROR: no matching distribution\n")
    with pytest.raises(PeerFailed, match=r"not installed: ERROR: no matching distribution"):
        interpreter_of("chroma", tmp_path)


def test_worker_that_dies_is_reported(workload: Workload, log: Any) -> None:
    worker = Worker(known.EXACT, workload.directory, log)
    worker.wait_ready()
    psutil.Process(worker.pid).kill()
    with pytest.raises(PeerFailed, match="ended with status -9"):
        worker.ask("describe", 10.0)
    worker.close()


def test_every_engine_of_the_full_run_has_pinned_requirements() -> None:
    for name in known.THEIRS:
        path = ROOT / "tests/bench/peers" / f"requirements-{name}.txt"
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert lines and all("==" in line and "/" not in line for line in lines), path
        distributions = {line.partition("==")[0].lower() for line in lines}
        assert {each.lower() for each in known.adapter(name).distributions} <= distributions
