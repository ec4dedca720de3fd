"""What `make soak` makes of its samples; the run itself is too long for a test."""

import numpy as np

from chaos.soak import WARM_UP_S_MIN, growth, latencies, problems, settled
from chaos.watching import Sample

MIB = {"controller": 70.0, "coordinator": 80.0, "server-0": 90.0}


def sample(at_s: float, *, server_mib: float = 90.0, objects: int = 2000) -> Sample:
    return Sample(
        at_s=at_s,
        anonymous_mib={**MIB, "server-0": server_mib},
        resident_mib=MIB,
        objects={"wal": objects - 10, "seg": 10},
        directories=20,
        bucket_mib=30.0,
        rows_live=18_000,
        segments=6,
        manifest_versions=10,
    )


def figures(samples: list[Sample], *, building_p99_ms: float = 20.0) -> dict[str, object]:
    return {
        "judged": True,
        "searches_failed": [],
        "writes_failed": [],
        "growth": growth(settled(samples)),
        "reads": {
            "building": {"reads": 1000, "p99_ms": building_p99_ms},
            "quiet": {"reads": 1000, "p99_ms": 10.0},
        },
    }


def test_reads_are_told_apart_by_whether_they_met_a_build() -> None:
    rng = np.random.default_rng(1)
    edges = np.sort(rng.uniform(0, 100, 40))
    spans = [(float(a), float(b)) for a, b in edges.reshape(-1, 2)]
    began = rng.uniform(-5, 105, 2000)
    answered = [
        (float(b), float(b + t)) for b, t in zip(began, rng.uniform(0, 3, 2000), strict=True)
    ]
    met = sum(any(s <= end and e >= begin for s, e in spans) for begin, end in answered)
    found = latencies(answered, spans)
    assert 0 < met < len(answered)
    assert found["building"]["reads"] == met
    assert found["quiet"]["reads"] == len(answered) - met
    assert set(latencies(answered, [])) == {"all", "quiet"}
    assert latencies([], spans) == {}


def test_a_saw_tooth_is_no_growth_and_a_warm_up_is_left_out() -> None:
    samples = [
        sample(at_s, objects=int(2000 * min(1, at_s / WARM_UP_S_MIN)) + int(at_s * 7) % 500)
        for at_s in np.arange(1, 1800, 13.0)
    ]
    assert growth(samples)["objects"]["growth"] > 200
    assert problems(figures(samples)) == []


def test_memory_and_objects_that_keep_growing_are_problems() -> None:
    times = np.arange(0, 1800, 15.0)
    leaking = figures([sample(at_s, server_mib=90 + at_s / 30) for at_s in times])
    assert [each.split()[0] for each in problems(leaking)] == ["server-0"]
    hoarding = figures([sample(at_s, objects=2000 + int(at_s)) for at_s in times])
    assert [each.split()[0] for each in problems(hoarding)] == ["objects"]
    leaking["judged"] = False
    assert problems(leaking) == [], "a short run has not settled"


def test_reads_that_builds_slow_down_are_a_problem() -> None:
    samples = [sample(at_s) for at_s in np.arange(0, 1800, 15.0)]
    assert problems(figures(samples, building_p99_ms=30.0)) == []
    (problem,) = problems(figures(samples, building_p99_ms=30.1))
    assert "30.1 ms while segments are built" in problem
    failed = figures(samples) | {"searches_failed": ["gone"]}
    assert problems(failed) == ["a search failed: gone"]
