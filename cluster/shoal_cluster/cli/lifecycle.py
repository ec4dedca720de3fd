"""`shoal up` and `shoal down`."""

from dataclasses import asdict

import click

from shoal_cluster.bootstrap import UpOptions
from shoal_cluster.cli.session import Session, name_option, shoal_command
from shoal_cluster.settings import COORDINATORS_MAX, SERVERS_MAX


@click.command()
@click.option("--bucket", metavar="DIR|URL", help="Where everything durable lives.")
@click.option("--address", "ray_address", metavar="RAY", help="Join this Ray, start none.")
@click.option("--servers", type=click.IntRange(1, SERVERS_MAX), help="Shard servers to start.")
@click.option(
    "--coordinators", type=click.IntRange(1, COORDINATORS_MAX), help="Coordinators to start."
)
@click.option("--host", "grpc_host", help="Interface the gRPC server listens on.")
@click.option("--port", "grpc_port", type=click.IntRange(1, 65535), help="gRPC port.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="Serve /metrics there.")
@click.option("--take-over", is_flag=True, help="Also if a lost machine's cluster has the bucket.")
@name_option
@shoal_command
def up(session: Session, take_over: bool) -> None:
    """Starts a cluster on this machine, or on a running Ray, and returns once it serves."""
    settings = session.settings
    cluster = session.entrances.up(
        UpOptions(
            name=settings.name,
            bucket=settings.bucket,
            ray_address=settings.ray_address,
            servers=settings.servers,
            coordinators=settings.coordinators,
            grpc_host=settings.grpc_host,
            grpc_port=settings.grpc_port,
            metrics_port=settings.metrics_port,
            state_directory=settings.state_dir,
            on_step=session.output.step,
            take_over=take_over,
        )
    )
    chosen = "" if cluster.name == "default" else f" --name {cluster.name}"
    session.output.result(
        asdict(cluster),
        f"cluster {cluster.name!r} is up: gRPC at {cluster.grpc_address}, {settings.servers} shard "
        f"servers, bucket {cluster.bucket}",
        f"`shoal status{chosen}` shows it, `shoal down{chosen}` stops it",
        *(
            []
            if settings.metrics_port is None
            else [f"metrics at http://{settings.grpc_host}:{settings.metrics_port}/metrics"]
        ),
    )


@click.command()
@name_option
@shoal_command
def down(session: Session) -> None:
    """Stops a cluster and every process it started. What was acknowledged stays in its bucket."""
    settings = session.settings
    was_running = session.entrances.down(settings.name, settings.state_dir, session.output.step)
    session.output.result(
        {"name": settings.name, "was_running": was_running},
        f"cluster {settings.name!r} is down"
        if was_running
        else f"cluster {settings.name!r} was not running",
    )
