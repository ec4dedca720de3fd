"""What every command works with: settings, output, and the ways to a cluster. Tests pass fakes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

import shoal
from shoal_cluster import bootstrap
from shoal_cluster.bootstrap import RunningCluster, UpOptions
from shoal_cluster.cli.failure import SHOAL_ERRORS, CommandFailed
from shoal_cluster.cli.output import Output
from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.settings import Settings, load_settings

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrances:
    """The ways to a cluster: bootstrap's functions and the SDK's client, or fakes in tests."""

    up: Callable[[UpOptions], RunningCluster] = bootstrap.up
    down: Callable[..., bool] = bootstrap.down
    running: Callable[..., RunningCluster | None] = bootstrap.running
    client: Callable[..., shoal.Client] = shoal.Client


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One command being run."""

    settings: Settings
    output: Output
    entrances: Entrances

    def connect(self) -> shoal.Client:
        """Returns a client of the cluster that --address or --name says.

        Raises: Unavailable when no cluster of that name runs on this machine.
        """
        return self.entrances.client(self.address(), timeout_s=self.settings.timeout_s)

    def address(self) -> str:
        """Returns where the cluster takes requests. Raises: Unavailable."""
        if self.settings.address is not None:
            return self.settings.address
        name = self.settings.name
        cluster = self.entrances.running(name, self.settings.state_dir)
        if cluster is None:
            raise Unavailable(
                f"no cluster named {name!r} runs on this machine; --address names one elsewhere"
            )
        return cluster.grpc_address


def shoal_command(
    command: Callable[Concatenate[Session, P], R],
) -> Callable[P, R]:
    """Gives a command --json and a Session made from settings and the options that override them.

    An option counts as a setting when it has a setting's name. A ShoalError ends the command with
    one paragraph instead of a traceback.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for programs.")
    @click.pass_context
    @wraps(command)
    def run(context: click.Context, /, *args: P.args, **kwargs: P.kwargs) -> R:
        options: dict[str, Any] = dict(kwargs)
        as_json: bool = options.pop("as_json")
        given = {name: options.pop(name) for name in Settings.model_fields if name in options}
        entrances = context.obj if isinstance(context.obj, Entrances) else Entrances()
        try:
            session = Session(
                settings=load_settings(**given),
                output=Output(as_json=as_json),
                entrances=entrances,
            )
            return command(session, *args, **options)
        except SHOAL_ERRORS as error:
            raise CommandFailed(error, as_json=as_json) from error

    return run


name_option = click.option("--name", help="Name of the cluster.  [default: default]")


def client_options(command: Callable[P, R]) -> Callable[P, R]:
    """Adds the options of a command that talks to a running cluster."""
    for option in (
        click.option("--timeout", "timeout_s", type=float, help="Seconds to wait for an answer."),
        click.option("--address", help="host:port of the cluster, instead of --name."),
        name_option,
    ):
        command = option(command)
    return command
