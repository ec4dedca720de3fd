"""Simulates the cluster: `python -m tests.simulation.run --seconds 600 --jobs 2`.

    --seconds S      seeds, power cuts, a crash at every crash point, and every mutant, within about
                     S seconds
    --seeds A..B     only the seeds A to B - 1
    --replay SEED    one seed, twice: prints its event log and whether both runs were equal
    --mutant NAME    with --replay or --seeds: with that breakage applied
    --crash PLAN     with --replay: and killed where PLAN says; a failed crash prints it
    --power-cuts     with --replay or --seeds: power cuts of a local directory (power_cuts.py)

Prints a table and writes the same figures to build/simulate.json. Ends with status 1 when a
violation was found, a crash point missed, or a mutant survived.
"""

import argparse
import functools
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation.bucket import CrashPlan
from tests.simulation.crash_points import Sweep
from tests.simulation.mutants import MUTANTS, Verdict, hunt
from tests.simulation.mutants.registry import Trial
from tests.simulation.power_cuts import cut_power
from tests.simulation.scenario import Outcome, simulate

REPORT = Path("build/simulate.json")
SEEDS_SHARE, SWEEP_SHARE = 0.3, 0.4
"""Of the time, at most; mutants get the rest, and what is left over goes to more seeds."""

POWER_CUT_SEEDS = 40
LEARNING_SEEDS = 4
MUTANT_SEEDS_MAX = 150
FAILURES_SHOWN = 20
SECONDS_PER_HOUR = 3600


@dataclass(slots=True)
class Tally:
    """What some runs came to. failures: how to see each violation again, and what it says."""

    seeds: int = 0
    operations: int = 0
    virtual_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    points_hit: set[str] = field(default_factory=set)
    points: set[str] = field(default_factory=set)

    def add(self, outcome: Outcome, how: str) -> None:
        self.seeds += 1
        self.operations += outcome.operations
        self.virtual_s += outcome.virtual_s
        self.counts.update(outcome.counts)
        self.failures += [f"{how}: {violation}" for violation in outcome.violations]

    def merge(self, other: "Tally") -> None:
        self.seeds += other.seeds
        self.operations += other.operations
        self.virtual_s += other.virtual_s
        self.counts.update(other.counts)
        self.failures += other.failures
        self.points_hit |= other.points_hit
        self.points |= other.points


def run_seeds(first: int, stride: int, seconds: float, end: int | None = None) -> Tally:
    """Runs every `stride`-th seed from `first` until the time is up or `end` is reached."""
    warnings.simplefilter("ignore")
    tally = Tally()
    until_s = time.monotonic() + seconds
    seed = first
    while time.monotonic() < until_s and (end is None or seed < end):
        tally.add(simulate(seed), f"seed {seed}")
        seed += stride
    return tally


def run_power_cuts(seeds: range) -> Tally:
    warnings.simplefilter("ignore")
    tally = Tally()
    for seed in seeds:
        tally.add(cut_power(seed), f"power cuts, seed {seed}")
    return tally


def sweep(job: int, jobs: int, seconds: float) -> Tally:
    """Crashes at every `jobs`-th crash point."""
    warnings.simplefilter("ignore")
    tally = Tally()
    until_s = time.monotonic() + seconds
    work = Sweep(job)
    tally.points = {str(point) for point in work.points}
    work.points = work.points[job::jobs]
    learnt = 0
    while time.monotonic() < until_s and work.missing():
        # First a few runs to learn from; more when none so far came to what is missing.
        step = None if learnt < LEARNING_SEEDS else work.step()
        if step is None:
            outcome, how = simulate(learnt), f"seed {learnt}"
            work.learn(outcome)
            learnt += 1
        else:
            outcome, how = step
        tally.add(outcome, how)
    tally.points_hit = {str(point) for point in work.hit}
    return tally


def hunt_one(name: str, seeds: int) -> Verdict:
    warnings.simplefilter("ignore")
    return hunt(MUTANTS[name], range(seeds))


def simulate_all(seconds: float, jobs: int) -> int:
    """Does everything; returns the status to end with."""
    began_s = time.monotonic()
    total, verdicts = Tally(), []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for part in [
            pool.submit(run_seeds, 1000 + job, jobs, seconds * SEEDS_SHARE) for job in range(jobs)
        ]:
            total.merge(part.result())
        print(f"{total.seeds} seeds after {time.monotonic() - began_s:.0f} s", flush=True)
        for part in [
            pool.submit(run_power_cuts, range(job, POWER_CUT_SEEDS, jobs)) for job in range(jobs)
        ]:
            total.merge(part.result())
        for part in [pool.submit(sweep, job, jobs, seconds * SWEEP_SHARE) for job in range(jobs)]:
            total.merge(part.result())
        hit = len(total.points_hit)
        print(f"{hit}/{len(total.points)} crash points hit", flush=True)
        hunts = [pool.submit(hunt_one, name, MUTANT_SEEDS_MAX) for name in MUTANTS]
        for verdict in hunts:
            verdicts.append(verdict.result())
            print(line_of(verdicts[-1]), flush=True)
        left_s = seconds - (time.monotonic() - began_s)
        if left_s > 0:
            for part in [
                pool.submit(run_seeds, 100_000 + job, jobs, left_s) for job in range(jobs)
            ]:
                total.merge(part.result())
    return report(total, verdicts, time.monotonic() - began_s)


def line_of(verdict: Verdict) -> str:
    told = f"after {verdict.seeds} seeds: {verdict.violation}" if verdict.violation else "SURVIVED"
    return f"  {verdict.name:36} {told[:140]}"


def report(total: Tally, verdicts: Sequence[Verdict], seconds: float) -> int:
    """Prints the table, writes the figures; returns the status."""
    killed = [verdict for verdict in verdicts if verdict.violation]
    missed = sorted(total.points - total.points_hit)
    figures = {
        "seeds": total.seeds,
        "simulated_hours": round(total.virtual_s / SECONDS_PER_HOUR, 2),
        "operations": total.operations,
        "faults": dict(sorted(total.counts.items())),
        "violations": len(total.failures),
        "failures": total.failures[:FAILURES_SHOWN],
        "crash_points_hit": len(total.points_hit & total.points),
        "crash_points_total": len(total.points),
        "crash_points_missed": missed,
        "mutants_killed": len(killed),
        "mutants_total": len(verdicts),
        "mutants": {verdict.name: verdict.seeds for verdict in killed},
        "mutants_survived": [v.name for v in verdicts if not v.violation],
        "seconds": round(seconds, 1),
    }
    for name in ("seeds", "simulated_hours", "operations"):
        print(f"{name.replace('_', ' '):28} {figures[name]:>12,}")
    for kind, count in sorted(total.counts.items()):
        print(f"  {kind:26} {count:>12,}")
    print(f"{'crash points hit':28} {figures['crash_points_hit']:>6}/{len(total.points)}")
    print(f"{'mutants killed':28} {len(killed):>6}/{len(verdicts)}")
    print(f"{'violations':28} {len(total.failures):>12,}")
    for failure in total.failures[:FAILURES_SHOWN]:
        print(f"  {failure[:2000]}")
    for point in missed:
        print(f"  crash point missed: {point}")
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {REPORT}")
    return 1 if total.failures or missed or len(killed) < len(verdicts) else 0


def simulate_crash(seed: int, plan: str) -> Outcome:
    return simulate(seed, crash=CrashPlan.parse(plan))


def replay(seed: int, mutant: str | None, trial: Trial) -> int:
    """Runs a seed twice and prints what happened."""
    warnings.simplefilter("ignore")
    outcomes = []
    for _ in range(2):
        with MUTANTS[mutant].applied() if mutant else nullcontext():
            outcomes.append(trial(seed))
    first, second = outcomes
    print("\n".join(first.lines))
    equal = first.digest == second.digest
    print(f"seed {seed}: digest {first.digest[:16]}, second run {'equal' if equal else 'DIFFERS'}")
    for violation in first.violations:
        print(f"violation: {violation}")
    return 0 if equal and not first.violations else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="python -m tests.simulation.run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", metavar="A..B")
    parser.add_argument("--replay", type=int, metavar="SEED")
    parser.add_argument("--mutant", choices=sorted(MUTANTS))
    parser.add_argument("--crash", metavar="PLAN")
    parser.add_argument("--power-cuts", action="store_true")
    options = parser.parse_args()
    trial: Trial = cut_power if options.power_cuts else simulate
    if options.mutant:
        trial = MUTANTS[options.mutant].trial
    if options.crash:
        trial = functools.partial(simulate_crash, plan=options.crash)
    if options.replay is not None:
        return replay(options.replay, options.mutant, trial)
    if options.seeds is None:
        return simulate_all(options.seconds, options.jobs)
    first, end = (int(number) for number in options.seeds.split(".."))
    if options.mutant:
        verdict = hunt(MUTANTS[options.mutant], range(first, end))
        print(line_of(verdict))
        return 0 if verdict.violation else 1
    began_s = time.monotonic()
    if options.power_cuts:
        tally = run_power_cuts(range(first, end))
    else:
        tally = run_seeds(first, 1, float("inf"), end)
    return report(tally, [], time.monotonic() - began_s)


if __name__ == "__main__":
    sys.exit(main())
