"""A minute's worth of the simulation in half of one: sound seeds, equal logs, mutants caught."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutants import MUTANTS, hunt
from tests.simulation.power_cuts import cut_power
from tests.simulation.scenario import simulate

WORK_S = 15.0
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_seed_keeps_every_promise(seed: int) -> None:
    outcome = simulate(seed, work_s=WORK_S)
    assert not outcome.violations, outcome.violations
    assert outcome.operations > 0


@pytest.mark.slow
def test_same_seed_gives_the_same_event_log() -> None:
    first, second = simulate(3, work_s=WORK_S), simulate(3, work_s=WORK_S)
    assert first.lines == second.lines
    assert first.digest == second.digest


@pytest.mark.slow
def test_event_log_does_not_depend_on_the_process() -> None:
    """Sets of text have another order in every process unless somebody sorts them."""
    script = (
        f"from tests.simulation.scenario import simulate;print(simulate(5, work_s={WORK_S}).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={
                "PYTHONPATH": ":".join(map(str, (ROOT, *(ROOT / p for p in PATHS)))),
                "PYTHONHASHSEED": hash_seed,
            },
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


PATHS = ("client", "protos", "cluster")


@pytest.mark.slow
def test_power_cuts_take_nothing_back() -> None:
    outcome = cut_power(1)
    assert not outcome.violations, outcome.violations
    assert outcome.operations > 0
    assert outcome.digest == cut_power(1).digest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ack_before_put", "session_token_ignored", "file_sync_skipped"])
def test_mutant_is_caught(name: str) -> None:
    verdict = hunt(MUTANTS[name], range(10))
    assert verdict.violation, f"{name} survived {verdict.seeds} seeds"
