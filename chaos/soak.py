"""`make soak MINUTES=30`: a real cluster under a steady load; what grows, and what slows reads.

Upserts, deletes and searches at a fixed pace over a fixed set of ids, so that memtables are sealed
and segments merged all the time while the collection keeps its size. Prints memory of each actor,
objects and bytes in the bucket and read latencies over time. Ends with status 1 when memory or
objects keep growing, when reads are more than three times slower while segments are built, or when
a row is lost.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

import shoal
from chaos import cluster as clusters
from chaos.watching import BuildWatch, Sample, Sampler
from chaos.workloads.steady import COLLECTION, DIMENSION, SteadyLoad
from tests.bench.machine import describe_machine

SERVERS, SHARDS, REPLICAS = 2, 2, 2
SAMPLES: Final = 120
SAMPLE_S_MIN: Final = 5.0
JUDGED_MINUTES_MIN: Final = 10.0
"""What waits to be deleted follows the pace of the last minute, and that the machine's other work:
a shorter run shows a trend where there is none."""

WARM_UP_SHARE: Final = 0.3
WARM_UP_S_MIN: Final = 120.0

GROWTH_SHARE_MAX: Final = 0.10
MEMORY_GROWTH_MIB: Final = 24.0
"""Less than that over a whole run is the allocator's business, whatever the share."""
OBJECTS_GROWTH: Final = 800
"""Less is the saw tooth of what waits to be deleted: 40 log objects a second, up to 50 s."""

P99_RATIO_MAX: Final = 3.0
READS_MIN: Final = 200
"""On either side: below it a p99 says nothing."""


def run(*, minutes: float, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs the load for so long and returns the figures and `problems`."""
    described = describe_machine()
    with tempfile.TemporaryDirectory(prefix="shoal-soak-") as folder:
        with clusters.running(Path(folder), servers=SERVERS) as cluster:
            with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
                collection = client.create_collection(
                    COLLECTION, dimension=DIMENSION, shards=SHARDS, replicas=REPLICAS
                )
                load = SteadyLoad(cluster.grpc_address, seed)
                load.fill(client)
                builds = BuildWatch(cluster)
                builds.start()
                load.start()
                started_s = time.monotonic()
                sampler = Sampler(client, Path(cluster.bucket), started_s)
                _sample(sampler, load, builds, minutes * 60, tell)
                load.stop()
                builds.stop()
                violations = load.violations(collection)
    reads = latencies(load.reads.answered, builds.spans_s())
    spent_s = sampler.samples[-1].at_s
    figures: dict[str, Any] = {
        "machine": described,
        "minutes": round(spent_s / 60, 2),
        "seed": seed,
        "collection": {"shards": SHARDS, "replicas": REPLICAS, "dimension": DIMENSION},
        "rows_written": load.rows_written,
        "rows_deleted": load.rows_deleted,
        "writes_failed": load.write_failures[:5],
        "writes_late_s": round(load.late_s, 2),
        "searches_failed": load.reads.failures[:5],
        "reads": reads,
        "building_share": round(sum(end - start for start, end in builds.spans_s()) / spent_s, 3),
        "builder_mib_max": round(builds.memory_bytes_max / 2**20, 1),
        "manifest_commits": sampler.samples[-1].manifest_versions
        - sampler.samples[0].manifest_versions,
        "growth": growth(settled(sampler.samples)),
        "judged": minutes >= JUDGED_MINUTES_MIN,
        "samples": [asdict(sample) for sample in sampler.samples],
    }
    figures["problems"] = violations + problems(figures)
    return figures


def _sample(
    sampler: Sampler,
    load: SteadyLoad,
    builds: BuildWatch,
    seconds: float,
    tell: Callable[[str], None],
) -> None:
    every_s = max(SAMPLE_S_MIN, seconds / SAMPLES)
    seen = 0
    while True:
        sample = sampler.take()
        answered = load.reads.answered[:]
        recent, seen = answered[seen:], len(answered)
        tell(_line(sample, latencies(recent, builds.spans_s())))
        left_s = seconds - sample.at_s
        if left_s <= 0:
            return
        time.sleep(min(every_s, left_s))


def latencies(
    answered: Sequence[tuple[float, float]], building_s: Sequence[tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """Returns p50 and p99 of all reads, of those that met a build, and of those that met none.

    answered: (begin, end) of each read. building_s: disjoint spans, ascending.
    """
    if not answered:
        return {}
    times = np.array(answered)
    spans = np.array(building_s).reshape(-1, 2)
    # The last span that began before the read ended: the only one that can reach into it.
    last = np.searchsorted(spans[:, 0], times[:, 1], side="right") - 1
    ends_s = np.append(spans[:, 1], -np.inf)  # index -1: no span began before
    met = ends_s[last] >= times[:, 0]
    taken_ms = (times[:, 1] - times[:, 0]) * 1e3
    parts = {"all": taken_ms, "building": taken_ms[met], "quiet": taken_ms[~met]}
    return {
        name: {
            "reads": len(part),
            "p50_ms": round(float(np.percentile(part, 50)), 2),
            "p99_ms": round(float(np.percentile(part, 99)), 2),
            "max_ms": round(float(part.max()), 2),
        }
        for name, part in parts.items()
        if len(part)
    }


def settled(samples: Sequence[Sample]) -> list[Sample]:
    """Returns the samples after the warm-up, or all when the run was shorter than that."""
    end_s = samples[-1].at_s
    warm_up_s = max(WARM_UP_S_MIN, WARM_UP_SHARE * end_s)
    return [sample for sample in samples if sample.at_s >= warm_up_s] or list(samples)


def growth(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Returns mean and growth over the samples of memory per actor (MiB), objects and live rows.

    Growth is the slope of a straight line times the time it spans: unlike last minus first it
    does not depend on where in a saw tooth the run ends.
    """
    series: dict[str, list[float]] = {
        "objects": [float(sample.objects_total) for sample in samples],
        "directories": [float(sample.directories) for sample in samples],
        "bucket_mib": [sample.bucket_mib for sample in samples],
        "rows_live": [float(sample.rows_live) for sample in samples],
    }
    for actor in samples[-1].anonymous_mib:
        series[actor] = [sample.anonymous_mib.get(actor, 0.0) for sample in samples]
    at_s = np.array([sample.at_s for sample in samples])
    grown = {}
    for name, values in series.items():
        slope = float(np.polyfit(at_s, values, 1)[0]) if len(samples) > 1 else 0.0
        grown[name] = {
            "mean": round(float(np.mean(values)), 1),
            "max": round(max(values), 1),
            "growth": round(slope * float(at_s[-1] - at_s[0]), 1),
        }
    return grown


def problems(figures: dict[str, Any]) -> list[str]:
    """Returns in words which bounds the figures break; growth only of a run long enough."""
    found = [f"a search failed: {failure}" for failure in figures["searches_failed"]]
    found += [f"a write failed: {failure}" for failure in figures["writes_failed"]]
    if not figures["judged"]:
        return found
    reads = figures["reads"]
    sides = [reads.get(side, {"reads": 0}) for side in ("building", "quiet")]
    if min(side["reads"] for side in sides) < READS_MIN:
        found.append(f"too few reads to compare: {[side['reads'] for side in sides]}")
    elif sides[0]["p99_ms"] > P99_RATIO_MAX * sides[1]["p99_ms"]:
        found.append(
            f"p99 of reads is {sides[0]['p99_ms']} ms while segments are built and "
            f"{sides[1]['p99_ms']} ms otherwise: more than {P99_RATIO_MAX:g} times"
        )
    for name, grown in figures["growth"].items():
        if name == "rows_live":
            continue  # the load's doing; the rest must not grow even so
        least = OBJECTS_GROWTH if name == "objects" else MEMORY_GROWTH_MIB
        if grown["growth"] > max(least, GROWTH_SHARE_MAX * grown["mean"]):
            found.append(f"{name} grew by {grown['growth']} after warm-up (mean {grown['mean']})")
    return found


def _line(sample: Sample, reads: dict[str, dict[str, float]]) -> str:
    memory = " ".join(f"{name} {mib:.0f}" for name, mib in sample.anonymous_mib.items())
    objects = " ".join(f"{kind} {count}" for kind, count in sorted(sample.objects.items()))
    p99 = " ".join(f"{side} {found['p99_ms']:.1f}" for side, found in reads.items())
    p50 = reads["all"]["p50_ms"] if reads else 0.0
    return (
        f"[{sample.at_s:6.0f} s] rows {sample.rows_live} segments {sample.segments} | "
        f"MiB: {memory} | bucket {sample.bucket_mib:.0f} MiB, objects {sample.objects_total}: "
        f"{objects} | reads p50 {p50:.1f} ms, p99 ms: {p99}"
    )


def render(figures: dict[str, Any]) -> str:
    """Returns the end of the report; the samples were told while they were taken."""
    lines = [
        f"{figures['minutes']} minutes: {figures['rows_written']:,} rows written, "
        f"{figures['rows_deleted']:,} deleted, {figures['manifest_commits']} manifests committed, "
        f"segments were being built {figures['building_share']:.0%} of the time",
    ]
    for side, found in figures["reads"].items():
        lines.append(
            f"  reads {side:9} {found['reads']:7}  p50 {found['p50_ms']:7.2f} ms  p99 "
            f"{found['p99_ms']:7.2f} ms  max {found['max_ms']:8.2f} ms"
        )
    for name, grown in figures["growth"].items():
        lines.append(
            f"  {name:14} mean {grown['mean']:10.1f}  max {grown['max']:10.1f}  growth after "
            f"warm-up {grown['growth']:+.1f}"
        )
    lines.append(f"  builders       max  {figures['builder_mib_max']:10.1f} MiB")
    if not figures["judged"]:
        lines.append(
            f"not judged: a run of less than {JUDGED_MINUTES_MIN:g} minutes does not settle"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("build/soak.json"))
    options = parser.parse_args()
    figures = run(
        minutes=options.minutes, seed=options.seed, tell=lambda line: print(line, flush=True)
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(render(figures))
    print(f"figures are in {options.json}")
    for problem in figures["problems"]:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if figures["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
