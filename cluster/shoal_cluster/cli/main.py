"""The command `shoal`. Exit status: 0 done, 1 error, 2 wrong usage, 3 problems found by check."""

import click

from shoal_cluster.cli.check import check
from shoal_cluster.cli.collections import collection
from shoal_cluster.cli.demo.command import demo
from shoal_cluster.cli.lifecycle import down, up
from shoal_cluster.cli.load import load
from shoal_cluster.cli.plan import plan
from shoal_cluster.cli.status import status
from shoal_cluster.cli.version import version


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Shoal, a distributed vector database.

    `shoal up` starts it on this machine, `shoal demo` shows what it does. Settings come from
    options, from SHOAL_... variables or from a TOML file: docs/reference/settings.md.
    """


for command in (up, down, status, plan, collection, load, demo, check, version):
    cli.add_command(command)


def main() -> None:
    cli(prog_name="shoal")
