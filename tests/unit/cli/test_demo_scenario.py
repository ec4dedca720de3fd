"""The whole scenario against a cluster in memory, whose servers are real processes to kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import shoal
from shoal_cluster.bootstrap import RunningCluster, UpOptions
from shoal_cluster.cli.demo import scenario
from shoal_cluster.cli.demo.figures import Figures, document_of, tables_of, targets_of
from shoal_cluster.cli.demo.scenario import DemoOptions, Stage, run_demo
from shoal_cluster.cli.main import cli
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Unavailable
from tests.unit.cli.fakes import FakeWorld

HEADLINE = {
    "rows_acknowledged",
    "rows_after_restart",
    "recall_plain",
    "recall_filtered_min",
    "mrr_known_item",
    "failed_queries_during_kill",
    "replica_back_seconds",
    "p50_ms",
    "p99_ms",
}


@contextlib.contextmanager
def silent_progress(text: str) -> Iterator[Callable[[int, int | None], None]]:
    yield lambda done, total: None


def play(world: FakeWorld, tmp_path: Path) -> Figures:
    return run_demo(
        DemoOptions(
            name="demo",
            bucket="memory",
            servers=2,
            grpc_port=7700,
            state_directory=tmp_path,
            before_s=0.2,
            after_s=0.2,
        ),
        Stage(
            entrances=world.entrances,
            clock=SystemClock(),
            on_step=lambda step: None,
            progress=silent_progress,
        ),
    )


def missed(figures: Figures) -> list[str]:
    return [target.name for target in targets_of(figures) if not target.holds]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


def run(world: FakeWorld, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["demo", *arguments], obj=world.entrances)


@pytest.mark.slow
def test_exact_engine_that_loses_nothing_meets_every_target(
    world: FakeWorld, tmp_path: Path
) -> None:
    figures = play(world, tmp_path)
    assert missed(figures) == []
    document = document_of(figures)
    assert set(document) >= HEADLINE
    assert document["passed"] is True
    assert document["rows_acknowledged"] == document["rows_after_restart"] == 8000
    assert document["mrr_known_item"] == pytest.approx(0.4957, abs=0.0002)
    assert figures.outage.before.queries > 0
    json.dumps(document)
    assert len(tables_of(figures)) == 3
    assert world.down_calls == ["demo", "demo"]
    assert world.clusters == {}


@pytest.mark.slow
def test_row_lost_or_changed_by_the_restart_is_a_missed_target(
    world: FakeWorld, tmp_path: Path
) -> None:
    world.forget = ["oddjob"]
    world.blur = ["libvelocity-tools-java"]
    assert missed(play(world, tmp_path)) == [
        "rows after restart",
        "ids missing after restart",
        "vectors changed after restart",
    ]


@pytest.mark.slow
def test_engine_that_misses_neighbours_is_caught(world: FakeWorld, tmp_path: Path) -> None:
    world.misplace = lambda ids: ["oddjob", *ids[1:]]
    names = missed(play(world, tmp_path))
    assert "recall@10 plain" in names
    assert len([name for name in names if name.startswith("recall@10")]) == 4
    assert any(name.startswith("MRR") for name in names)


@pytest.mark.parametrize("method", ["create_collection", "bulk_upsert", "search", "status"])
@pytest.mark.parametrize(
    ("failure", "status"), [(shoal.Unavailable("gone"), 1), (KeyboardInterrupt(), 1)]
)
def test_every_way_out_stops_the_cluster_and_removes_the_bucket(
    world: FakeWorld, temporary: Path, method: str, failure: BaseException, status: int
) -> None:
    world.raise_in[method] = failure
    result = run(world)
    assert result.exit_code == status
    assert world.down_calls == ["demo"]
    assert world.clusters == {}
    assert list(temporary.iterdir()) == []
    if isinstance(failure, shoal.Unavailable):
        assert "error: gone. The demo stopped at the step: " in result.stderr


def test_cluster_that_does_not_come_up_leaves_nothing(world: FakeWorld, temporary: Path) -> None:
    world.raise_in["up"] = Unavailable("Ray did not start")
    world.clusters["demo"] = world.up(  # somebody else's: it must be left alone
        UpOptions(
            name="demo", bucket="b", servers=2, state_directory=temporary, on_step=lambda _: None
        )
    )
    result = run(world)
    assert result.exit_code == 1
    assert "running already" in result.stderr
    assert world.down_calls == []
    assert list(temporary.iterdir()) == []


def test_keep_leaves_the_bucket_and_says_where(world: FakeWorld, temporary: Path) -> None:
    world.raise_in["bulk_upsert"] = shoal.Unavailable("gone")
    result = run(world, "--keep")
    (kept,) = temporary.iterdir()
    assert f"shoal check {kept / 'bucket'}" in result.stderr


def test_given_bucket_is_used_and_left(world: FakeWorld, temporary: Path) -> None:
    world.raise_in["bulk_upsert"] = shoal.Unavailable("gone")
    run(world, "--bucket", "s3://mine/demo")
    assert world.up_calls[0].bucket == "s3://mine/demo"
    assert list(temporary.iterdir()) == []


def test_termination_unwinds_like_an_interrupt(
    world: FakeWorld, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`up` leaves the system's handler in place, as Ray's driver does when it disconnects."""
    start = world.up

    def up(options: UpOptions) -> RunningCluster:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return start(options)

    monkeypatch.setattr(world, "up", up)
    before = signal.getsignal(signal.SIGTERM)

    def terminate(ids: list[str]) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return ids

    world.misplace = terminate
    result = run(world)
    assert result.exit_code == 128 + signal.SIGTERM
    assert world.down_calls == ["demo"]
    assert list(temporary.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_server_cannot_show_a_takeover(world: FakeWorld) -> None:
    assert run(world, "--servers", "1").exit_code == 2


def test_process_that_is_no_actor_is_not_killed() -> None:
    innocent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with pytest.raises(Unavailable, match="no Ray actor"):
            scenario._kill(innocent.pid)
        assert innocent.poll() is None
    finally:
        innocent.communicate(b"\n")
