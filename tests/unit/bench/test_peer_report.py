"""What a comparison prints: nothing is left out, and where Shoal is behind it says so."""

from typing import Any

from tests.bench.peers.report import render, verdict

MACHINE = {
    "processor": "one",
    "cores": 2,
    "memory_gib": 4.0,
    "kernel": "6",
    "load_average_1min": 0.1,
}


def _engine(
    name: str,
    *,
    rate: float,
    rows_per_s: int = 1_000,
    networked: bool = True,
    reached: bool = True,
    finished: bool = True,
) -> dict[str, Any]:
    return {
        "engine": name,
        "networked": networked,
        "versions": {name: "1.0"},
        "build": {},
        "memory_mib": 100,
        "yardstick_ms": 10.0,
        "load": {"rows_per_s": rows_per_s, "seconds": {"add": 1.0}, "settings": {}, "note": ""},
        "sweep": [{"condition": None, "tried": [], "finished": finished}],
        "measured": [
            {
                "condition": None,
                "selectivity": 1.0,
                "target": 0.95,
                "reached": reached,
                "setting": {"ef": 32},
                "clients": clients,
                "queries_per_s": rate,
                "p50_ms": 1.0,
                "p99_ms": 2.0,
                "recall": 0.96 if reached else 0.8,
            }
            for clients in (1, 8)
        ],
    }


def _bench(*engines: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": MACHINE,
        "corpus": "windows",
        "size": {"rows": 1_000, "clients": (1, 8)},
        "k": 10,
        "targets": [0.95],
        "conditions": [{"condition": None, "selectivity": 1.0}],
        "engines": list(engines),
    }


def test_report_has_every_engine_with_its_setting_and_its_share_of_shoal() -> None:
    report = render(_bench(_engine("shoal", rate=100.0), _engine("other", rate=50.0)))
    row = next(line for line in report.splitlines() if line.startswith("  other*"))
    assert "0.9600" in row and "0.50" in row and "ef 32" in row


def test_missed_recall_is_marked_with_its_reason() -> None:
    ours = _engine("shoal", rate=100.0)
    for finished, why in ((True, "no setting reaches it"), (False, "no time to try every setting")):
        sloppy = _engine("sloppy", rate=50.0, reached=False, finished=finished)
        assert f"MISSED: {why}" in render(_bench(ours, sloppy))


def test_engine_that_failed_is_reported_with_its_error() -> None:
    failed = {
        "engine": "broken",
        "yardstick_ms": 10.0,
        "failed": {"at": "start", "error": "no such library"},
    }
    report = render(_bench(_engine("shoal", rate=100.0), failed))
    assert "broken is not in the tables: failed at start: no such library" in report


def test_report_says_where_shoal_is_behind_and_by_how_much() -> None:
    ours, other = _engine("shoal", rate=80.0), _engine("other", rate=100.0, rows_per_s=2_000)
    lines = verdict(_bench(ours, other))
    assert "Shoal is behind other*: 0.50 of its rows/s to fully indexed" in lines
    assert any("0.80 of its queries/s at recall 0.95, 8 clients" in line for line in lines)


def test_engine_below_the_recall_or_without_a_socket_does_not_put_shoal_behind() -> None:
    ours = _engine("shoal", rate=80.0)
    sloppy = _engine("sloppy", rate=900.0, reached=False)
    library = _engine("library", rate=900.0, networked=False)
    assert verdict(_bench(ours, sloppy, library)) == ["Shoal is ahead of sloppy* everywhere"]


def test_recall_that_shoal_misses_is_said() -> None:
    lines = verdict(_bench(_engine("shoal", rate=80.0, reached=False), _engine("other", rate=1.0)))
    assert lines[0] == "Shoal misses recall 0.95 no filter: 0.8"


def test_failed_shoal_is_no_victory() -> None:
    ours = {"engine": "shoal", "yardstick_ms": 1.0, "failed": {"at": "load", "error": "full"}}
    assert verdict(_bench(ours, _engine("other", rate=1.0))) == [
        "Shoal was not measured: nothing is compared"
    ]
