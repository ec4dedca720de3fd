"""Checks the protocol model with a larger budget: `python -m tests.model.run --seeds N`.

Runs the protocol and every broken variant over the seeds 0 to N - 1, prints a table and writes the
same figures to build/model.json. Ends with status 1 when the protocol itself is violated. A variant
that survives is reported, not an error: the rarest need thousands of schedules.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.model.load_model import Flaw, run_loads
from tests.model.protocol_model import Variant, run_schedule

REPORT = Path("build/model.json")
SEEDS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """violations: how many schedules ended in each kind; first_seeds: where to look."""

    variant: str
    schedules: int
    seconds: float
    takeovers: int
    acks: int
    flushes: int
    strong_reads: int
    violations: dict[str, int]
    first_seeds: list[int]


def check(variant: Variant, seeds: int) -> Tally:
    """Runs a variant over seeds 0 to seeds - 1."""
    began_s = time.monotonic()
    totals: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    first_seeds: list[int] = []
    for seed in range(seeds):
        outcome = run_schedule(seed, variant)
        totals["takeovers"] += outcome.takeovers
        totals["acks"] += outcome.acks
        totals["flushes"] += outcome.flushes
        totals["strong_reads"] += outcome.strong_reads
        if outcome.violation is not None:
            kinds[outcome.violation.kind.value] += 1
            if len(first_seeds) < SEEDS_SHOWN:
                first_seeds.append(seed)
    return Tally(
        variant=variant.value,
        schedules=seeds,
        seconds=round(time.monotonic() - began_s, 2),
        takeovers=totals["takeovers"],
        acks=totals["acks"],
        flushes=totals["flushes"],
        strong_reads=totals["strong_reads"],
        violations=dict(kinds),
        first_seeds=first_seeds,
    )


def line_of(tally: Tally) -> str:
    found = ", ".join(f"{kind} ×{count}" for kind, count in sorted(tally.violations.items()))
    seeds = f" (seeds {', '.join(map(str, tally.first_seeds))})" if found else ""
    return (
        f"{tally.variant:24} {tally.schedules:9,} {tally.takeovers:10,} {tally.acks:9,} "
        f"{tally.strong_reads:12,}   {found or 'none'}{seeds}"
    )


def check_loads(seeds: int) -> bool:
    """Prints what bulk loads, and each without one rule, did; False when the former failed."""
    sound = True
    for flaw in Flaw:
        outcomes = [run_loads(seed, flaw) for seed in range(seeds)]
        found = Counter(violation for violation, _, _ in outcomes if violation is not None)
        sound = sound and not (found and flaw is Flaw.NONE)
        shown = ", ".join(f"{kind} ×{count}" for kind, count in sorted(found.items()))
        loads = sum(count for _, count, _ in outcomes)
        takeovers = sum(count for _, _, count in outcomes)
        print(f"{flaw.value:24} {seeds:9,} {takeovers:10,} {loads:9,} loads   {shown or 'none'}")
    return sound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.model.run")
    parser.add_argument("--seeds", type=int, default=2000, help="schedules for each variant")
    seeds = parser.parse_args().seeds
    if seeds < 1:
        parser.error(f"--seeds is {seeds}; at least 1 schedule is needed")

    print(
        f"{'variant':24} {'schedules':>9} {'takeovers':>10} {'acks':>9} {'strong reads':>12}   "
        "violations"
    )
    tallies = []
    for variant in Variant:
        tallies.append(check(variant, seeds))
        print(line_of(tallies[-1]), flush=True)
    sound = check_loads(seeds)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps([asdict(tally) for tally in tallies], indent=2) + "\n")
    print(f"written to {REPORT}")
    return 1 if tallies[0].violations or not sound else 0


if __name__ == "__main__":
    sys.exit(main())
