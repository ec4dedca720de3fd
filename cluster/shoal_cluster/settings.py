"""What one process of Shoal can be told, with ranges. Everything else is nowhere, or in a schema.

A value is taken from the command's option, else from the environment (SHOAL_NAME_OF_FIELD), else
from a TOML file, else it is the default. docs/reference/settings.md is generated from this module.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings.exceptions import SettingsError

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import NAME_LENGTH_MAX

SETTINGS_MAX = 25
"""Past this nobody reads the reference: a new knob has to replace one, or become a constant."""

ENVIRONMENT_PREFIX = "SHOAL_"
SETTINGS_FILE_VARIABLE = "SHOAL_SETTINGS_FILE"
SETTINGS_FILE_DEFAULT = "~/.config/shoal/settings.toml"

SERVERS_MAX = 256
"""Shard servers one `up` starts; a process costs about 150 MB before it holds a row."""

COORDINATORS_MAX = 64
"""On one port: the kernel deals connections out among them, so more than cores serve nobody."""

SERVERS_MIN_DEFAULT = 2
"""Two, so that a collection with 2 replicas survives a killed server on the smallest machine."""


def _expanded(text: str) -> str:
    """Replaces a leading ~; leaves URLs alone."""
    return text if "://" in text else str(Path(text).expanduser())


def _default_servers() -> int:
    return min(SERVERS_MAX, max(SERVERS_MIN_DEFAULT, os.cpu_count() or 1))


class Settings(BaseSettings):
    """The settings of one process, checked."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        extra="forbid",
        frozen=True,
        validate_default=True,
        env_ignore_empty=True,
    )

    name: str = Field(
        "default",
        pattern=rf"^[A-Za-z0-9][A-Za-z0-9_-]{{0,{NAME_LENGTH_MAX - 1}}}$",
        description="Name of the cluster on this machine; several may run side by side.",
    )
    bucket: Annotated[str, AfterValidator(_expanded)] = Field(
        "~/.local/share/shoal/bucket",
        min_length=1,
        description=(
            "Directory or URL (s3://, gs://, az://) that holds everything durable. "
            "Credentials of object stores come from their own environment variables."
        ),
    )
    state_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        Path("~/.local/state/shoal"),
        description=(
            "Directory of the small files by which `down` and `status` find a running cluster."
        ),
    )
    servers: int = Field(
        default_factory=_default_servers,
        ge=1,
        le=SERVERS_MAX,
        description="Shard servers that `up` starts.",
        json_schema_extra={"default_text": f"number of CPUs, at least {SERVERS_MIN_DEFAULT}"},
    )
    coordinators: int = Field(
        1,
        ge=1,
        le=COORDINATORS_MAX,
        description=(
            "Coordinators that `up` starts on the gRPC port; each client connection meets one. "
            "One serves some thousands of searches a second."
        ),
    )
    grpc_host: str = Field(
        "127.0.0.1", min_length=1, description="Interface the gRPC server listens on."
    )
    grpc_port: int = Field(7700, ge=1, le=65535, description="Port the gRPC server listens on.")
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port at which the controller serves `/metrics` for Prometheus.",
        json_schema_extra={"default_text": "not served"},
    )
    ray_address: str | None = Field(
        None,
        min_length=1,
        description="Address of a running Ray to join.",
        json_schema_extra={"default_text": "a Ray of our own on this machine"},
    )
    address: str | None = Field(
        None,
        min_length=1,
        description="host:port that client commands connect to.",
        json_schema_extra={"default_text": "where the cluster called `name` listens"},
    )
    timeout_s: float = Field(
        30.0,
        ge=0.1,
        le=3600.0,
        description="Seconds a client command waits for one answer, retries included.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Orders the sources, strongest first; .env files and secret directories are not read."""
        file = settings_file()
        if file is None:
            return init_settings, env_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file)


def settings_file() -> Path | None:
    """Returns the TOML file to read, if any.

    Raises: InvalidRequest when SHOAL_SETTINGS_FILE names a file that does not exist.
    """
    named = os.environ.get(SETTINGS_FILE_VARIABLE)
    file = Path(named or SETTINGS_FILE_DEFAULT).expanduser()
    if file.is_file():
        return file
    if named:
        raise InvalidRequest(
            f"{SETTINGS_FILE_VARIABLE} names {named!r}, which is not a file",
            field=SETTINGS_FILE_VARIABLE,
        )
    return None


def load_settings(**options: Any) -> Settings:
    """Returns the settings; `options` are those given on the command line, None for not given.

    Raises: InvalidRequest naming every wrong setting, its value and what it may be.
    """
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        raise _invalid(error) from error
    except SettingsError as error:
        raise InvalidRequest(f"the environment cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{settings_file()} is not TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{settings_file()} cannot be read: {error}") from error


def _invalid(error: ValidationError) -> InvalidRequest:
    complaints = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(Settings.model_fields)
            complaints.append(f"there is no setting {name!r}; there are: {known}")
        else:
            reason = problem["msg"][:1].lower() + problem["msg"][1:]
            complaints.append(f"setting {name} is {problem['input']!r}: {reason}")
    return InvalidRequest(
        "; ".join(complaints), field=".".join(str(part) for part in error.errors()[0]["loc"])
    )


def settings_reference() -> str:
    """Returns docs/reference/settings.md."""
    rows = "\n".join(_reference_row(name) for name in Settings.model_fields)
    return (
        "# Settings\n\n"
        "<!-- Generated from cluster/shoal_cluster/settings.py by\n"
        "     `python -m shoal_cluster.cli.settings_reference`; do not edit. -->\n\n"
        "A value is taken from the command's option, else from the environment, else from a TOML "
        "file, else\n"
        f"it is the default. The TOML file is `{SETTINGS_FILE_DEFAULT}`, or the one that\n"
        f"`{SETTINGS_FILE_VARIABLE}` names; a key in it is the setting's name. A name nobody knows "
        "and a value out\n"
        "of range are errors.\n\n"
        "| setting | environment | default | allowed | meaning |\n"
        "|---|---|---|---|---|\n"
        f"{rows}\n"
    )


def _reference_row(name: str) -> str:
    field = Settings.model_fields[name]
    extra = field.json_schema_extra
    told = extra.get("default_text") if isinstance(extra, dict) else None
    default = str(told) if told is not None else f"`{field.default}`"
    return (
        f"| `{name}` | `{ENVIRONMENT_PREFIX}{name.upper()}` | {default} | {_allowed(name)} "
        f"| {field.description} |"
    )


def _allowed(name: str) -> str:
    """Returns the values a setting takes, from its JSON schema."""
    schema = Settings.model_json_schema()["properties"][name]
    schema = next((each for each in schema.get("anyOf", ()) if each.get("type") != "null"), schema)
    if "minimum" in schema:
        return f"{schema['minimum']:g} to {schema['maximum']:g}"
    if "pattern" in schema:
        return f"1 to {NAME_LENGTH_MAX} of letters, digits, `_` and `-`"
    return "a directory" if schema.get("format") == "path" else "text"
