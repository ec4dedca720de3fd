import os
from pathlib import Path

import pytest

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.settings import SETTINGS_MAX, Settings, load_settings, settings_reference

REFERENCE = Path(__file__).parents[3] / "docs" / "reference" / "settings.md"


def write_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file = tmp_path / "shoal.toml"
    file.write_text(text)
    monkeypatch.setenv("SHOAL_SETTINGS_FILE", str(file))


def test_defaults_are_complete_and_below_the_home_directory(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.name == "default"
    assert settings.bucket == str(tmp_path / ".local/share/shoal/bucket")
    assert settings.state_dir == tmp_path / ".local/state/shoal"
    assert settings.servers >= 2
    assert settings.servers == max(2, os.cpu_count() or 1)
    assert (settings.grpc_host, settings.grpc_port) == ("127.0.0.1", 7700)


def test_option_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(tmp_path, monkeypatch, 'name = "f"\nbucket = "s3://f/x"\nservers = 5\n')
    monkeypatch.setenv("SHOAL_NAME", "e")
    monkeypatch.setenv("SHOAL_BUCKET", "s3://e/x")
    settings = load_settings(name="o", bucket=None)
    assert (settings.name, settings.bucket, settings.servers) == ("o", "s3://e/x", 5)
    assert settings.grpc_port == 7700


def test_file_in_the_home_directory_is_read_without_being_named(tmp_path: Path) -> None:
    file = tmp_path / ".config/shoal/settings.toml"
    file.parent.mkdir(parents=True)
    file.write_text("grpc_port = 7701\n")
    assert load_settings().grpc_port == 7701


def test_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_GRPC_PORT", "")
    assert load_settings().grpc_port == 7700


def test_home_is_expanded_in_paths_but_urls_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(bucket="~/b").bucket == os.path.expanduser("~/b")
    assert load_settings(bucket="s3://~/b").bucket == "s3://~/b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("servers", "0"),
        ("servers", "257"),
        ("servers", "many"),
        ("grpc_port", "0"),
        ("grpc_port", "65536"),
        ("timeout_s", "0"),
        ("timeout_s", "nan"),
        ("timeout_s", "3601"),
        ("name", "../up"),
        ("name", "x" * 65),
    ],
)
def test_value_out_of_range_is_refused_by_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"SHOAL_{name.upper()}", value)
    with pytest.raises(InvalidRequest) as refused:
        load_settings()
    assert refused.value.field == name
    assert f"setting {name} is {value!r}" in refused.value.message


def test_every_wrong_setting_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_SERVERS", "0")
    monkeypatch.setenv("SHOAL_GRPC_PORT", "0")
    with pytest.raises(InvalidRequest, match=r"servers.*grpc_port"):
        load_settings()


def test_unknown_key_in_the_file_is_refused_with_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(tmp_path, monkeypatch, "port = 7700\n")
    with pytest.raises(InvalidRequest, match=r"no setting 'port'.*grpc_port"):
        load_settings()


def test_broken_file_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(tmp_path, monkeypatch, "bucket = \n")
    with pytest.raises(InvalidRequest, match=r"shoal\.toml is not TOML"):
        load_settings()


def test_named_file_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_SETTINGS_FILE", "/nowhere/shoal.toml")
    with pytest.raises(InvalidRequest, match="not a file"):
        load_settings()


def test_there_are_few_settings_and_each_says_what_it_means() -> None:
    assert len(Settings.model_fields) <= SETTINGS_MAX
    assert all(field.description for field in Settings.model_fields.values())


def test_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text() == settings_reference(), (
        "run: python -m shoal_cluster.cli.settings_reference"
    )


def test_reference_does_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_reference()
    monkeypatch.setenv("SHOAL_NAME", "other")
    assert settings_reference() == before
    assert str(Path.home()) not in before
