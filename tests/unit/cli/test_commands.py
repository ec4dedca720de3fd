"""Commands against a cluster in memory."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import shoal
from shoal_cluster.cli.main import cli
from shoal_cluster.cli.status import status_tables
from shoal_cluster.domain.errors import Unavailable
from tests.unit.cli.fakes import FakeWorld, status_report

PASSING_COMMANDS = [
    ["status"],
    ["collection", "create", "c2", "--dimension", "4"],
    ["collection", "list"],
    ["collection", "describe", "c1"],
    ["collection", "alter", "c1", "--replicas", "2"],
    ["collection", "drop", "c1", "--yes"],
    ["version"],
    ["down"],
]


def run(world: FakeWorld, *arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), obj=world.entrances)


@pytest.fixture
def served(world: FakeWorld) -> FakeWorld:
    assert run(world, "up").exit_code == 0
    assert run(world, "collection", "create", "c1", "--dimension", "3").exit_code == 0
    return world


def test_up_uses_settings_and_the_options_that_override_them(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHOAL_BUCKET", "s3://from/environment")
    monkeypatch.setenv("SHOAL_SERVERS", "7")
    result = run(world, "up", "--servers", "3", "--port", "7711", "--address", "10.0.0.1:6379")
    assert result.exit_code == 0, result.output
    (options,) = world.up_calls
    assert options.bucket == "s3://from/environment"
    assert options.servers == 3
    assert options.grpc_port == 7711
    assert options.ray_address == "10.0.0.1:6379"
    assert not options.take_over
    assert options.state_directory == tmp_path / ".local/state/shoal"
    assert "gRPC at 127.0.0.1:7711" in result.stdout
    assert "opening bucket" in result.stderr


def test_up_says_where_metrics_are_served_if_they_are(world: FakeWorld) -> None:
    assert "/metrics" not in run(world, "up").stdout
    result = run(world, "up", "--name", "other", "--metrics-port", "9464")
    assert [options.metrics_port for options in world.up_calls] == [None, 9464]
    assert "metrics at http://127.0.0.1:9464/metrics" in result.stdout


def test_take_over_is_passed_on(world: FakeWorld) -> None:
    assert run(world, "up", "--take-over").exit_code == 0
    assert world.up_calls[0].take_over


def test_up_twice_is_one_paragraph_and_status_1(served: FakeWorld) -> None:
    result = run(served, "up")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("opening") is False
    assert "running already" in result.stderr
    assert "Traceback" not in result.output


def test_down_stops_what_runs_and_is_no_error_when_nothing_does(served: FakeWorld) -> None:
    assert "is down" in run(served, "down").stdout
    again = run(served, "down")
    assert (again.exit_code, again.stdout) == (0, "cluster 'default' was not running\n")


@pytest.mark.parametrize("arguments", PASSING_COMMANDS, ids=" ".join)
def test_json_is_one_document_on_stdout(served: FakeWorld, arguments: list[str]) -> None:
    result = run(served, *arguments, "--json")
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)


@pytest.mark.parametrize("arguments", PASSING_COMMANDS, ids=" ".join)
def test_plain_output_holds_no_control_characters(served: FakeWorld, arguments: list[str]) -> None:
    result = run(served, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout
    assert all(each.isprintable() or each == "\n" for each in result.output)


@pytest.mark.parametrize("command", ["up", "down", "status", "demo", "check", "version"])
def test_every_command_offers_json(world: FakeWorld, command: str) -> None:
    assert "--json" in run(world, command, "--help").stdout


@pytest.mark.parametrize("command", ["create", "list", "describe", "alter", "drop"])
def test_every_collection_command_offers_json(world: FakeWorld, command: str) -> None:
    assert "--json" in run(world, "collection", command, "--help").stdout


def test_status_shows_every_kind_of_thing(served: FakeWorld) -> None:
    shown = run(served, "status").stdout
    for title in ("Nodes", "Actors", "Collections", "Shards", "Replicas"):
        assert f"\n{title}\n" in shown
    assert "server-0" in shown
    assert "primary" in shown


def test_status_shows_how_many_of_the_wanted_replicas_serve() -> None:
    report = status_report({"c": (1, 10)}, pids={"server-0": 1, "server-1": 2})
    report.collections[0].schema.replicas = 3
    report.collections[0].shards[0].replicas[1].state = "opening"
    shards = next(table for table in status_tables(report) if table.title == "Shards")
    assert shards.rows[0][shards.columns.index("replicas")] == "1 of 3"


def test_status_shows_what_fails_and_how_often() -> None:
    report = status_report({"c": (1, 10)}, pids={"server-0": 1, "server-1": 2})
    assert all(table.title != "Failures" for table in status_tables(report))
    replica = report.collections[0].shards[0].replicas[1]
    replica.reason, replica.failures = "seal: out of cheese", 7
    failing = next(table for table in status_tables(report) if table.title == "Failures")
    assert failing.rows == [("c", 0, "server-1", 7, "seal: out of cheese")]


def test_status_json_keeps_numbers_and_shows_hashes_as_hex(served: FakeWorld) -> None:
    document = json.loads(run(served, "status", "--json").stdout)
    assert document["uptime_ms"] == 61_000
    replica = document["collections"][0]["shards"][0]["replicas"][0]
    assert replica["set_checksum"] == "8000000000000000"
    assert replica["role"] == "primary"
    assert replica["position"] is None
    assert document["collections"][0]["schema"]["metric"] == "unspecified"


def test_client_commands_go_to_the_named_cluster_or_the_given_address(served: FakeWorld) -> None:
    run(served, "up", "--name", "other", "--port", "7799")
    run(served, "status", "--name", "other")
    run(served, "status", "--address", "db.example:7700")
    assert served.connected_to[-2:] == ["127.0.0.1:7799", "db.example:7700"]


def test_no_cluster_is_an_error_that_says_how_to_start_one(world: FakeWorld) -> None:
    result = run(world, "status")
    assert result.exit_code == 1
    assert "no cluster named 'default' runs" in result.stderr
    assert "`shoal up` starts a cluster" in result.stderr


def test_error_with_json_is_a_document_too(world: FakeWorld) -> None:
    result = run(world, "status", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "unavailable"
    assert "no cluster named" in result.stderr


@pytest.mark.parametrize(
    "error", [shoal.Indeterminate("lost", outcome="maybe_applied"), Unavailable("gone")]
)
def test_errors_of_both_trees_end_without_a_traceback(
    served: FakeWorld, error: BaseException
) -> None:
    served.raise_in["create_collection"] = error
    result = run(served, "collection", "create", "x", "--dimension", "3")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    expected = "may have been applied" if isinstance(error, shoal.Indeterminate) else "Nothing was"
    assert expected in result.stderr


def test_bug_is_not_dressed_up_as_an_error_of_the_user(served: FakeWorld) -> None:
    served.raise_in["status"] = ZeroDivisionError()
    assert isinstance(run(served, "status").exception, ZeroDivisionError)


def test_wrong_setting_is_one_paragraph(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_GRPC_PORT", "70000")
    result = run(world, "up")
    assert result.exit_code == 1
    assert "setting grpc_port is '70000'" in result.stderr
    assert world.up_calls == []


def test_wrong_usage_has_status_2(world: FakeWorld) -> None:
    assert run(world, "up", "--servers", "0").exit_code == 2
    assert run(world, "collection", "create", "c").exit_code == 2
    assert run(world, "surface").exit_code == 2


def test_create_passes_on_everything(served: FakeWorld) -> None:
    result = run(
        served, "collection", "create", "docs", "--dimension", "8", "--metric", "dot",
        "--attribute", "section:keyword", "--attribute", "year:int", "--partition-by", "section",
        "--shards", "4", "--replicas", "2", "--recall-target", "0.9", "--model", "a:b:2",
        "--chunking-rule", "by paragraph", "--storage", "float16", "--tier", "disk",
        "--recall-sample-share", "0.5", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    schema = json.loads(result.stdout)["schema"]
    assert schema == {
        "name": "docs",
        "dimension": 8,
        "metric": "dot",
        "attributes": {"section": "keyword", "year": "int"},
        "partition_by": "section",
        "shards": 4,
        "replicas": 2,
        "recall_target": 0.9,
        "model": ["a:b", "2"],
        "chunking_rule": "by paragraph",
        "id": "0" * 32,
        "version": 1,
        "storage": "float16",
        "tier": "disk",
        "recall_sample_share": 0.5,
    }


def test_describe_shows_which_recall_searches_reach(served: FakeWorld) -> None:
    bucket = served.buckets[served.up_calls[0].bucket]
    bucket.recall["c1"] = tuple(
        shoal.RecallEstimate(filter_class=kind, samples=1200, recall=0.96, low=0.95, high=0.97)
        for kind in ("none", "narrow")
    )
    shown = run(served, "collection", "describe", "c1").stdout
    assert "0.9600 (0.9500 to 0.9700, 1,200 samples)" in shown
    assert "recall reached, narrow filters" in shown
    described = json.loads(run(served, "collection", "describe", "c1", "--json").stdout)
    assert [each["filter_class"] for each in described["recall"]] == ["none", "narrow"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--attribute", "year"],
        ["--attribute", "year:number"],
        ["--attribute", ":int"],
        ["--attribute", "a:int", "--attribute", "a:float"],
        ["--model", "name"],
        ["--recall-target", "1.1"],
        ["--recall-sample-share", "-0.1"],
        ["--metric", "euclid"],
        ["--storage", "int8"],
        ["--tier", "tape"],
    ],
    ids=" ".join,
)
def test_malformed_schema_option_is_wrong_usage(served: FakeWorld, wrong: list[str]) -> None:
    result = run(served, "collection", "create", "docs", "--dimension", "8", *wrong)
    assert result.exit_code == 2
    assert "docs" not in served.buckets[served.up_calls[0].bucket].schemas


def test_alter_changes_what_is_named_and_respects_the_version(served: FakeWorld) -> None:
    result = run(
        served, "collection", "alter", "c1", "--add-attribute", "year:int", "--replicas", "2",
        "--if-version", "1", "--json",
    )  # fmt: skip
    schema = json.loads(result.stdout)["schema"]
    assert (schema["attributes"], schema["replicas"]) == ({"year": "int"}, 2)
    refused = run(served, "collection", "alter", "c1", "--replicas", "3", "--if-version", "1")
    assert refused.exit_code == 1
    assert "version 2" in refused.stderr


def test_drop_needs_a_yes(served: FakeWorld) -> None:
    schemas = served.buckets[served.up_calls[0].bucket].schemas
    assert run(served, "collection", "drop", "c1").exit_code == 2
    assert "c1" in schemas
    assert run(served, "collection", "drop", "c1", "--yes").exit_code == 0
    assert "c1" not in schemas


def test_version_names_what_shoal_stands_on(world: FakeWorld) -> None:
    versions = json.loads(run(world, "version", "--json").stdout)
    assert versions["shoal"] == "0.1.0"
    assert {"python", "ray", "faiss-cpu", "grpcio"} <= set(versions)


def test_check_does_not_make_the_directory_it_was_to_look_at(
    world: FakeWorld, tmp_path: Path
) -> None:
    absent = tmp_path / "absent"
    for named in (str(absent), f"file://{absent}"):
        result = run(world, "check", named)
        assert result.exit_code == 1
        assert "there is no directory" in result.stderr
    assert not absent.exists()


def test_plan_says_bytes_a_vector_without_a_cluster(world: FakeWorld) -> None:
    result = run(world, "plan", "--rows", "100000", "--dimension", "384", "--json")

    assert result.exit_code == 0, result.output
    tiers = json.loads(result.stdout)
    assert list(tiers) == ["full", "compact", "disk"]
    assert tiers["compact"]["memory_bytes_per_vector"] <= 120
    assert tiers["full"]["memory_bytes_per_vector"] > 384 * 4
    assert tiers["compact"]["family"] == "fast_scan"

    shown = run(
        world, "plan", "--rows", "9", "--dimension", "8", "--tier", "full", "--storage", "float16"
    )
    assert shown.exit_code == 0 and "full: 9 rows are at most" in shown.stdout


@pytest.mark.parametrize(
    "wrong",
    [["--rows", "0", "--dimension", "8"], ["--rows", "9", "--dimension", "4097"], ["--rows", "9"]],
    ids=" ".join,
)
def test_a_plan_of_impossible_sizes_is_wrong_usage(world: FakeWorld, wrong: list[str]) -> None:
    assert run(world, "plan", *wrong).exit_code == 2
