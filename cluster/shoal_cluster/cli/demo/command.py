"""`shoal demo`: runs the scenario in a place of its own and cleans up on every way out."""

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from shoal_cluster.cli.demo.figures import document_of, tables_of, targets_of
from shoal_cluster.cli.demo.scenario import REPLICAS, DemoOptions, Stage, run_demo
from shoal_cluster.cli.demo.signals import unwound_by_termination
from shoal_cluster.cli.failure import EXIT_ERROR, SHOAL_ERRORS, CommandFailed
from shoal_cluster.cli.session import Session, shoal_command
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import InvalidRequest, Unavailable
from shoal_cluster.settings import SERVERS_MAX

NAME = "demo"
SERVERS = 2
"""As many as replicas: with fewer the kill would leave shards without a copy."""


@click.command()
@click.option(
    "--bucket", "given_bucket", metavar="DIR|URL", help="Use this one and leave it there."
)
@click.option("--keep", is_flag=True, help="Leave the temporary bucket and print its path.")
@click.option(
    "--servers",
    "server_count",
    type=click.IntRange(REPLICAS, SERVERS_MAX),
    default=SERVERS,
    show_default=True,
)
@click.option(
    "--json-file", type=click.Path(dir_okay=False, path_type=Path), help="Also write figures here."
)
@shoal_command
def demo(
    session: Session,
    given_bucket: str | None,
    keep: bool,
    server_count: int,
    json_file: Path | None,
) -> None:
    """Loads 8,000 real documents, searches them, kills a shard server, restarts, measures.

    Uses a cluster of its own called "demo". Exit status 0 only when every target holds.
    """
    output = session.output
    stage = Stage(
        entrances=session.entrances,
        clock=SystemClock(),
        on_step=output.step,
        progress=output.progress,
    )
    with unwound_by_termination(), _bucket(given_bucket, keep, session) as bucket:
        try:
            figures = run_demo(
                DemoOptions(
                    name=NAME,
                    bucket=bucket,
                    servers=server_count,
                    grpc_port=_free_port(),
                    state_directory=session.settings.state_dir,
                ),
                stage,
            )
        except SHOAL_ERRORS as error:
            raise CommandFailed(
                error,
                as_json=output.as_json,
                aftermath=f"The demo stopped at the step: {stage.step}. Its processes were ended.",
            ) from error
        document = {**document_of(figures), "bucket": bucket if keep or given_bucket else None}
        if json_file is not None:
            _write(json_file, json.dumps(document, indent=2) + "\n")
        missed = [target.name for target in targets_of(figures) if not target.holds]
        verdict = f"missed: {'; '.join(missed)}" if missed else "all targets hold"
        output.result(document, *tables_of(figures), verdict)
        if missed:
            click.get_current_context().exit(EXIT_ERROR)


@contextmanager
def _bucket(given: str | None, keep: bool, session: Session) -> Iterator[str]:
    """Yields the bucket to use; a temporary one is removed at the end unless it is to be kept."""
    if given is not None:
        yield given
        return
    directory = Path(tempfile.mkdtemp(prefix="shoal-demo-"))
    try:
        yield str(directory / "bucket")
    finally:
        if keep:
            session.output.step(f"bucket kept: try `shoal check {directory / 'bucket'}`")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _free_port() -> int:
    """Returns a port nobody listens on now. Another process may take it first: `up` then says so.

    Raises: Unavailable.
    """
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        raise Unavailable(f"no free port on 127.0.0.1: {error}") from error


def _write(path: Path, text: str) -> None:
    """Raises: InvalidRequest when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}", field="json_file") from error
