"""The command `shoal` as a process of its own, against real clusters."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import shoal
from chaos import cluster as clusters
from shoal_cluster import bootstrap
from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.control.catalog import CatalogLog
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.ids import SystemIdGenerator

# A start and a stop take 30 s on two idle cores, and longer where other tests run beside them.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 110


def run(*arguments: str, state: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "SHOAL_" not in name}
    environment["PYTHONPATH"] = os.pathsep.join(
        str(ROOT / part) for part in ("client", "protos", "cluster")
    )
    if state is not None:
        environment["SHOAL_STATE_DIR"] = str(state)
    return subprocess.run(
        [sys.executable, "-m", "shoal_cluster.cli", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def assert_failed(ran: subprocess.CompletedProcess[str], *said: str) -> None:
    """One paragraph on stderr after the steps, no traceback, nothing on stdout."""
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for each in said:
        assert each in last


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bucket filled by a cluster that `shoal up` started and `shoal down` stopped."""
    directory = tmp_path_factory.mktemp("cli")
    state, bucket, port = directory / "state", directory / "bucket", clusters.free_port()
    up = run(
        "up", "--name", "cli", "--bucket", str(bucket), "--servers", "2", "--port", str(port),
        "--json", state=state,
    )  # fmt: skip
    try:
        assert up.returncode == 0, up.stderr
        started = json.loads(up.stdout)
        assert started["grpc_address"] == f"127.0.0.1:{port}"
        cluster = bootstrap.RunningCluster(**started)
        assert clusters.processes_of(cluster)
        with shoal.Client(started["grpc_address"], timeout_s=60.0) as client:
            collection = client.create_collection("notes", dimension=8, shards=2, replicas=2)
            rows = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
            collection.upsert(ids=[f"n{row}" for row in range(300)], vectors=rows)
        shown = run("status", "--name", "cli", state=state)
        assert shown.returncode == 0, shown.stderr
        assert "server-1" in shown.stdout
        assert "notes" in shown.stdout
    finally:
        down = run("down", "--name", "cli", state=state)
    assert down.stdout == "cluster 'cli' is down\n", down.stderr
    assert clusters.processes_of(cluster) == []
    assert run("down", "--name", "cli", state=state).stdout.endswith("was not running\n")
    yield bucket


def test_status_names_processes_that_run(cluster: bootstrap.RunningCluster) -> None:
    ran = run("status", "--address", cluster.grpc_address, "--json")
    assert ran.returncode == 0, ran.stderr
    actors = json.loads(ran.stdout)["actors"]
    assert {actor["kind"] for actor in actors} >= {"controller", "coordinator", "shard_server"}
    assert all(psutil.pid_exists(actor["pid"]) for actor in actors)


def test_collection_is_created_altered_shown_and_dropped(
    cluster: bootstrap.RunningCluster,
) -> None:
    at = ("--address", cluster.grpc_address)
    created = run(
        "collection", "create", "by-cli", "--dimension", "4", "--attribute", "year:int",
        "--shards", "2", "--model", "m:1", *at,
    )  # fmt: skip
    assert created.returncode == 0, created.stderr
    assert_failed(
        run("collection", "create", "by-cli", "--dimension", "4", *at), "'by-cli' exists already"
    )
    altered = run("collection", "alter", "by-cli", "--add-attribute", "tag:keyword", *at)
    assert altered.returncode == 0, altered.stderr
    described = run("collection", "describe", "by-cli", "--json", *at)
    schema = json.loads(described.stdout)["schema"]
    assert schema["attributes"] == {"year": "int", "tag": "keyword"}
    assert (schema["shards"], schema["model"]) == (2, ["m", "1"])
    assert "by-cli" in run("collection", "list", *at).stdout
    assert run("collection", "drop", "by-cli", "--yes", *at).returncode == 0
    assert_failed(run("collection", "describe", "by-cli", *at), "no collection 'by-cli'")


def test_bucket_that_another_cluster_serves_is_refused(
    cluster: bootstrap.RunningCluster, tmp_path: Path
) -> None:
    ran = run("up", "--name", "second", "--bucket", cluster.bucket, "--port",
              str(clusters.free_port()), state=tmp_path)  # fmt: skip
    assert_failed(ran, "served by another cluster", "Nothing was changed")


def test_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ran = run("up", "--bucket", str(tmp_path / "b"), "--port", port, state=tmp_path)
    assert_failed(ran, port)


def test_address_where_nothing_listens_is_unavailable() -> None:
    ran = run("status", "--timeout", "1", "--address", f"127.0.0.1:{clusters.free_port()}")
    assert_failed(ran, "`shoal up` starts a cluster")


def test_down_gives_the_bucket_up(stopped: Path) -> None:
    log = CatalogLog(LocalStore(stopped), SystemClock(), SystemIdGenerator())
    assert asyncio.run(log.read()).owner is None


def test_sound_bucket_has_no_problems(stopped: Path) -> None:
    for options in ((), ("--fast",)):
        ran = run("check", str(stopped), "--json", *options)
        assert ran.returncode == 0, ran.stderr + ran.stdout
        report = json.loads(ran.stdout)
        assert report["problems"] == []
        assert (report["collections"], report["shards"]) == (1, 2)


def test_flipped_byte_is_found_and_its_object_named(stopped: Path, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    shutil.copytree(stopped, bucket)
    damaged = max((path for path in bucket.rglob("*") if path.is_file()), key=_size)
    body = bytearray(damaged.read_bytes())
    body[len(body) // 2] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(body)
    ran = run("check", str(bucket))
    assert ran.returncode == 3, ran.stderr + ran.stdout
    assert str(damaged.relative_to(bucket)) in ran.stdout


def _size(path: Path) -> int:
    return path.stat().st_size
