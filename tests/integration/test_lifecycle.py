"""Starting and stopping: a Ray that was there before, state files that lie, what is left behind."""

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

import shoal
from chaos import cluster as clusters
from shoal_cluster import bootstrap
from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.control.catalog import CatalogLog, Owner
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Conflict, InvalidRequest, Unavailable
from shoal_cluster.domain.ids import SystemIdGenerator


def _state(directory: Path, **changes: object) -> Path:
    cluster = bootstrap.RunningCluster(
        name="test",
        cluster_uuid="",
        incarnation="0",
        bucket="",
        grpc_address="127.0.0.1:1",
        ray_address="127.0.0.1:1",
        ray_pid=None,
        namespace="shoal",
        run_directory=str(directory / "run"),
        started_ms=0,
    )
    path = directory / "state" / "test.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**asdict(cluster), **changes}))
    return path


def test_down_spares_a_process_that_only_has_our_old_pid(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()  # ray"], stdin=subprocess.PIPE) as other:
        path = _state(tmp_path, ray_pid=other.pid)
        assert bootstrap.running("test", tmp_path / "state") is None
        clusters.stop(tmp_path)
        assert psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE
        assert not path.exists()
        other.communicate(b"\n", timeout=10)


def test_unreadable_state_file_is_named(tmp_path: Path) -> None:
    path = _state(tmp_path)
    path.write_text("{")
    with pytest.raises(InvalidRequest, match=r"test\.json"):
        clusters.stop(tmp_path)


def test_down_of_a_joined_ray_that_is_gone_says_so_and_forgets_it(tmp_path: Path) -> None:
    path = _state(tmp_path)
    steps: list[str] = []
    bootstrap.down("test", tmp_path / "state", steps.append)
    assert any("no Ray answers" in step for step in steps)
    assert not path.exists()


def test_joining_a_ray_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no Ray answers"):
        bootstrap.up(
            bootstrap.UpOptions(
                name="test",
                bucket=str(tmp_path / "bucket"),
                ray_address="127.0.0.1:1",
                servers=2,
                grpc_port=clusters.free_port(),
                state_directory=tmp_path / "state",
                on_step=lambda step: None,
            )
        )
    assert bootstrap.running("test", tmp_path / "state") is None


def test_a_bucket_of_another_machine_is_taken_over_only_when_told_to(tmp_path: Path) -> None:
    """Asking 127.0.0.1 would ask ourselves, who do not serve it."""
    bucket = str(tmp_path / "bucket")
    owner = Owner(incarnation="i", address="127.0.0.1:1", since_ms=0, host="elsewhere/1")
    asyncio.run(bootstrap._inspect_bucket(bucket))

    async def claimed() -> Owner | None:
        log = CatalogLog(LocalStore(Path(bucket)), SystemClock(), SystemIdGenerator())
        catalog = await log.update(lambda catalog: replace(catalog, owner=owner))
        return catalog.owner

    assert asyncio.run(claimed()) == owner
    options = bootstrap.UpOptions(
        name="test",
        bucket=bucket,
        ray_address="127.0.0.1:1",
        servers=2,
        grpc_port=clusters.free_port(),
        state_directory=tmp_path / "state",
        on_step=lambda step: None,
    )
    with pytest.raises(Conflict, match=r"'elsewhere'.*--take-over"):
        bootstrap.up(options)
    with pytest.raises(Unavailable, match="no Ray answers"):
        bootstrap.up(replace(options, take_over=True))


@pytest.mark.timeout(240)
def test_a_cluster_on_a_joined_ray_indexes_and_leaves_the_ray_alone(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_directory = Path(f"/tmp/shoal-joined-{clusters.free_port()}")
    run_directory.mkdir()
    pid, address = bootstrap._start_ray(run_directory)
    try:
        running = bootstrap.up(
            bootstrap.UpOptions(
                name="test",
                bucket=str(tmp_path / "bucket"),
                ray_address=address,
                servers=2,
                grpc_port=clusters.free_port(),
                state_directory=tmp_path / "state",
                on_step=lambda step: None,
            )
        )
        with shoal.Client(running.grpc_address, timeout_s=60.0) as client:
            made = client.create_collection("joined", dimension=4, replicas=2)
            vectors = np.random.default_rng(0).standard_normal((2000, 4)).astype(np.float32)
            made.bulk_upsert(ids=[f"p{i}" for i in range(2000)], vectors=vectors)
            clusters.wait_until(
                lambda: client.status("joined").collections[0].shards[0].segments,
                timeout_s=60,
                what="a segment is built",
            )
            assert made.count() == 2000
        clusters.stop(tmp_path)
        assert psutil.pid_exists(pid), "down ended a Ray it had joined"
        assert bootstrap.running("test", tmp_path / "state") is None
    finally:
        bootstrap._stop_ray(pid)
        for path in sorted(run_directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        run_directory.rmdir()
