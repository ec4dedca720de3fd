"""`shoal version`."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import click

from shoal_cluster.cli.output import Table
from shoal_cluster.cli.session import Session, shoal_command

_PARTS = ("shoal", "ray", "faiss-cpu", "grpcio", "obstore", "numpy")
"""What a report of a bug has to name."""


@click.command()
@shoal_command
def version(session: Session) -> None:
    """Prints the version of Shoal and of what it stands on."""
    versions = {"python": platform.python_version()}
    for part in _PARTS:
        try:
            versions[part] = installed_version(part)
        except PackageNotFoundError:
            versions[part] = "not installed"
    session.output.result(
        versions,
        Table(title="Versions", columns=("part", "version"), rows=list(versions.items())),
    )
