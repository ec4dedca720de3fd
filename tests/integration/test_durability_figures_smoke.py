"""`make bench-durability` in small: every figure is there and the machine-independent ones hold."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.durability import ROWS_PER_PUT_MIN, missed_targets, render

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("durability") / "durability.json"
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bench.durability", "--smoke", "--json", str(path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    # Status 1: a target was missed, which a busy machine may do; what may not be is tested below.
    assert ran.returncode in (0, 1) and path.exists(), ran.stdout + ran.stderr
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def test_group_commit_puts_at_least_twenty_rows_into_a_put_at_64_writers(
    figures: dict[str, Any],
) -> None:
    for bucket in ("local", "s3"):
        one, many = figures["acknowledgements"][bucket]
        assert (one["writers"], many["writers"]) == (1, 64)
        assert one["rows_per_put"] == 1.0, "one writer waits for each acknowledgement"
        assert many["rows_per_put"] >= ROWS_PER_PUT_MIN, bucket
        assert many["log_puts_per_1000_rows"] <= 1000 / ROWS_PER_PUT_MIN
        assert 0 < many["p50_ms"] <= many["p99_ms"]


def test_an_acknowledgement_waits_for_its_put(figures: dict[str, Any]) -> None:
    for measured in figures["acknowledgements"]["s3"]:
        assert measured["p50_ms"] >= figures["put_delay_ms"]


def test_recovery_brings_every_row_back(figures: dict[str, Any]) -> None:
    segments, log = figures["recovery"]["segments"], figures["recovery"]["log"]
    assert segments["rows"] == figures["size"]["segment_rows"]
    assert segments["segments"] >= 1 and log["segments"] == 0
    assert log["bytes"] >= figures["size"]["tail_bytes"]
    for recovered in (segments, log):
        assert recovered["load_s"] > 0 and recovered["next_write_acknowledged"]
    assert segments["s_per_million_rows"] > 0 and log["s_per_100_mb"] > 0


def test_takeovers_lose_nothing(figures: dict[str, Any]) -> None:
    taken = figures["takeovers"]
    assert {name: each["count"] for name, each in taken["strikes"].items()} == {
        "SIGKILL": 1,
        "SIGSTOP": 1,
    }
    assert all(0 < each["p50_s"] <= each["max_s"] for each in taken["strikes"].values())
    assert taken["rows_lost"] == 0 and taken["rows_acknowledged"] > 0


def test_a_missed_target_is_named(figures: dict[str, Any]) -> None:
    worse = json.loads(json.dumps(figures))
    worse["acknowledgements"]["s3"][-1]["rows_per_put"] = 19.0
    worse["takeovers"]["strikes"]["SIGKILL"]["p99_s"] = 5.1
    worse["takeovers"]["rows_lost"] = 1
    missed = "\n".join(missed_targets(worse))
    for named in ("19.0 rows a put", "SIGKILL: p99 5.1 s", "1 acknowledged rows were lost"):
        assert named in missed
    assert "target p99 5 s" in render(figures)
