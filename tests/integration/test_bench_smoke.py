"""`make bench` in small: runs to its end, and its figures are those of searches that find."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.rounds import PATHS, PATHS_OF_MANY
from tests.bench.stages import STAGES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    figures = tmp_path_factory.mktemp("bench") / "bench.json"
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--smoke", "--json", str(figures)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "SDK as installed (lane)" in ran.stdout
    read: dict[str, Any] = json.loads(figures.read_text())
    return read


def test_bench_reports_every_path_fast_and_right(bench: dict[str, Any]) -> None:
    (searches,) = bench["searches"]
    paths = {(each["path"], each["clients"]): each for each in searches["paths"]}
    clients = bench["size"]["clients"]
    many = [(path, clients) for path in PATHS_OF_MANY]
    assert set(paths) == {*((path, 1) for path in PATHS), *many}
    for name, figures in paths.items():
        assert figures["recall"] >= 0.95, name
        assert 0 < figures["p50_ms"] <= figures["p99_ms"], name
        assert figures["queries"] > 0 and figures["queries_per_s"] > 0, name
        assert figures["p50_ratio"] > 0 and figures["queries_ratio"] > 0, name
    assert paths["raw", 1]["p50_ratio"] == 1.0
    measured = paths["grpc", 1]["p50_ms"] - paths["raw", 1]["p50_ms"]
    assert bench["p50_minus_raw_ms_1_client_grpc"] == pytest.approx(measured, abs=0.002)


def test_bench_stages_add_up_to_the_whole_query(bench: dict[str, Any]) -> None:
    for way in ("", "grpc_"):
        (searches,) = bench["searches"]
        spent, total_ms = searches[f"{way}stages_ms"], searches[f"{way}stages_sum_ms"]
        assert {stage for stage, _ in STAGES} <= set(spent)
        assert all(spent[stage] >= 0 for stage, _ in STAGES), spent
        assert math.isclose(total_ms, spent["end to end"], rel_tol=0.01)
        # The middle half by time and the median are close unless the samples are nonsense.
        assert math.isclose(total_ms, spent["end to end p50"], rel_tol=0.25)


def test_bench_reports_writes_load_machine_and_processes(bench: dict[str, Any]) -> None:
    assert [(each["transport"], each["writers"]) for each in bench["writes"]] == [
        ("auto", 1),
        ("auto", 64),
        ("grpc", 1),
        ("grpc", 64),
    ]
    for each in bench["writes"]:
        assert 0 < each["p50_ms"] <= each["p99_ms"] and each["rows_per_s"] > 0
        assert each["rows_per_put"] >= 1
    assert bench["load"]["rows_live"] == bench["size"]["rows"]
    assert bench["load"]["rows_per_s"] > 0 and bench["load"]["segments"] >= 1
    assert bench["rows_per_s_bulk"] > 0 and bench["bulk"]["peak_mib"]["client"] > 0
    assert {"processor", "cores", "load_average_1min"} <= set(bench["machine"])
    assert {"python", "faiss-cpu", "ray", "grpcio", "shoal"} <= set(bench["versions"])
    assert bench["seeds"] and bench["links"]
    roles = {"client", "coordinator", "shard server", "everything else"}
    (searches,) = bench["searches"]
    assert set(searches["processor_ms_per_query"]) == roles
    assert all(searches["processor_ms_per_query"][role] > 0 for role in roles)
    named = " ".join(each["process"] for each in bench["processes"])
    assert "Coordinator" in named and "ShardServer" in named
