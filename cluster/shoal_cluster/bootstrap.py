"""Brings a cluster up and down: Ray, the bucket's identity, and the controller for the rest.

The only module that wires everything. A running cluster is described by a small file in the state
directory, so that `down` and `status` find it; losing that file loses nothing but convenience.

up: (1) take the state file's name; (2) open the bucket, check or write its `cluster` object; (3)
refuse when another cluster serves the bucket, or may (control/ownership.py); (4) start Ray, or join
one; (5) start the controller and wait until it serves; (6) write the state file. A failure at any
step undoes the steps before.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from shoal_cluster.actors.calls import bounded
from shoal_cluster.actors.configuration import CONTROLLER, ClusterConfiguration, environment
from shoal_cluster.actors.coordinator import ControllerClient
from shoal_cluster.bucket.identity import open_identity
from shoal_cluster.bucket.open import open_store
from shoal_cluster.control.catalog import CatalogLog, Owner
from shoal_cluster.control.ownership import host_identity, objection
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Conflict, InvalidRequest, ShoalError, Unavailable
from shoal_cluster.domain.ids import ServerId, SystemIdGenerator, cluster_uuid_text
from shoal_cluster.edge.server import EdgeServer, Services, start_server
from shoal_cluster.ingest.execute import Writer
from shoal_cluster.ingest.loads import Loader
from shoal_cluster.query.execute import Searcher
from shoal_cluster.query.explore import Explorer

RAY_START_TIMEOUT_S = 90.0
_RAY_POLL_S = 0.05
RAY_CONNECT_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Nothing of ours travels through Ray's object store; this is close to its least size."""
_RAY_NODE_ADDRESS = "127.0.0.2"
"""Loopback, but not the name Ray replaces by the machine's outward address."""
_RAY_CPUS = 64
"""Logical only: our own local Ray is never short of slots for actors and builds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """ray_address None: start a Ray of our own here. on_step: told each step in words.

    take_over: claim the bucket though another machine's cluster may still serve it.
    """

    name: str = "default"
    bucket: str
    ray_address: str | None = None
    servers: int
    coordinators: int = 1
    grpc_host: str = "127.0.0.1"
    grpc_port: int = 7700
    metrics_port: int | None = None
    state_directory: Path
    on_step: Callable[[str], None]
    take_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """What `up` started. ray_pid: of our own `ray start`, None when a Ray was joined."""

    name: str
    cluster_uuid: str
    incarnation: str
    bucket: str
    grpc_address: str
    ray_address: str
    ray_pid: int | None
    namespace: str
    run_directory: str
    started_ms: int


def running(name: str, state_directory: Path) -> RunningCluster | None:
    """Returns the cluster of that name if its state file is there and its Ray still lives."""
    cluster = _read_state(_state_file(name, state_directory))
    if cluster is None or (cluster.ray_pid is not None and not _is_ours(cluster)):
        return None
    return cluster


def up(options: UpOptions) -> RunningCluster:
    """Starts a cluster and returns once it serves.

    Raises: Conflict (already running, port in use, bucket served by another cluster or written by
    a newer Shoal), Unavailable, PermissionDenied, InvalidRequest. Whatever was started is stopped.
    """
    if running(options.name, options.state_directory) is not None:
        raise Conflict(
            f"a cluster named {options.name!r} is running already; `shoal down --name "
            f"{options.name}` stops it, --name chooses another name"
        )
    _require_free_port(options.grpc_host, options.grpc_port, "--port")
    if options.metrics_port is not None:
        _require_free_port(options.grpc_host, options.metrics_port, "--metrics-port")
    options.on_step(f"opening bucket {options.bucket}")
    bucket = _absolute(options.bucket)
    cluster_uuid, owner = asyncio.run(_inspect_bucket(bucket))
    reason = objection(
        owner,
        host=host_identity(),
        answers=owner is not None and _serves(owner, cluster_uuid),
        take_over=options.take_over,
    )
    if reason is not None:
        raise Conflict(f"nothing was changed: bucket {options.bucket} {reason}", field="bucket")
    run_directory = Path(tempfile.mkdtemp(prefix="shoal-"))
    ray_pid: int | None = None
    try:
        if options.ray_address is None:
            options.on_step("starting Ray on this machine")
            ray_pid, ray_address = _start_ray(run_directory)
        else:
            ray_address = options.ray_address
        options.on_step("starting controller, coordinators and shard servers")
        cluster = RunningCluster(
            name=options.name,
            cluster_uuid=cluster_uuid_text(cluster_uuid),
            incarnation=SystemIdGenerator().hex(8),
            bucket=bucket,
            grpc_address="",
            ray_address=ray_address,
            ray_pid=ray_pid,
            namespace="shoal",
            run_directory=str(run_directory),
            started_ms=SystemClock().wall_ms(),
        )
        # Known before it runs: whatever happens next, `down` finds it.
        _write_state(cluster, options.state_directory)
        cluster = _start_actors(options, cluster, cluster_uuid)
        _write_state(cluster, options.state_directory)
    except BaseException:
        if ray_pid is not None:
            _stop_ray(ray_pid)
        elif _state_file(options.name, options.state_directory).exists():
            with contextlib.suppress(ShoalError):
                _stop_actors(cluster)
        shutil.rmtree(run_directory, ignore_errors=True)
        _state_file(options.name, options.state_directory).unlink(missing_ok=True)
        raise
    options.on_step(f"serving at {cluster.grpc_address}")
    return cluster


def down(name: str, state_directory: Path, on_step: Callable[[str], None]) -> bool:
    """Stops a cluster and every process it started; False when none of that name was running."""
    path = _state_file(name, state_directory)
    cluster = _read_state(path)
    if cluster is None:
        return False
    alive = cluster.ray_pid is None or _is_ours(cluster)
    if alive:
        on_step("stopping shard servers, coordinators and controller")
        try:
            _stop_actors(cluster)
        except ShoalError as error:
            on_step(f"they could not be asked to stop: {error.message}")
    if cluster.ray_pid is not None and _is_ours(cluster):
        on_step("stopping Ray")
        _stop_ray(cluster.ray_pid)
    _kill_leftovers(cluster)
    shutil.rmtree(cluster.run_directory, ignore_errors=True)
    path.unlink(missing_ok=True)
    return alive


async def _inspect_bucket(bucket: str) -> tuple[bytes, Owner | None]:
    """Returns the bucket's cluster uuid and who claims to serve it; formats an empty bucket."""
    store, second = open_store(bucket), open_store(bucket)
    try:
        clock, ids = SystemClock(), SystemIdGenerator()
        identity = await open_identity(store, second, clock=clock, ids=ids)
        catalog = await CatalogLog(store, clock, ids).read()
        return identity.cluster_uuid, catalog.owner
    finally:
        await second.close()
        await store.close()


def _serves(owner: Owner, cluster_uuid: bytes) -> bool:
    """Asks the claimed owner whether it lives and serves this very bucket."""
    import shoal

    with shoal.Client(owner.address, timeout_s=2.0) as client:
        try:
            return client.status().cluster_uuid == cluster_uuid_text(cluster_uuid)
        except shoal.ShoalError:
            return False


def _start_ray(run_directory: Path) -> tuple[int, str]:
    """Starts `ray start --block` in a session of its own; returns its pid and Ray's address."""
    port = _free_port()
    log = run_directory / "ray.log"
    ray = str(Path(sys.executable).with_name("ray"))
    command = [
        ray,
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--node-ip-address={_RAY_NODE_ADDRESS}",
        f"--num-cpus={_RAY_CPUS}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        "--include-dashboard=false",
        "--disable-usage-stats",
        f"--temp-dir={run_directory / 'ray'}",
    ]
    with log.open("wb") as output, Path(os.devnull).open("rb") as nothing:
        pid = os.posix_spawn(
            ray,
            command,
            _ray_environment(),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, nothing.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
            ],
            setsid=True,
        )
    clock = SystemClock()
    deadline_s = clock.monotonic_s() + RAY_START_TIMEOUT_S
    process = psutil.Process(pid)
    while b"Ray runtime started" not in log.read_bytes():
        ended = True
        try:
            process.wait(_RAY_POLL_S)
        except psutil.TimeoutExpired:
            ended = False
        if ended or clock.monotonic_s() > deadline_s:
            _stop_ray(pid)
            tail = log.read_text(errors="replace")[-2000:]
            raise Unavailable(f"Ray did not start; its last words:\n{tail}")
    return pid, f"{_RAY_NODE_ADDRESS}:{port}"


def _ray_environment() -> dict[str, str]:
    return {
        **os.environ,
        "RAY_DEDUP_LOGS": "0",
        # Workers for programs to come: 90 MB each, and none of ours could use one, because each
        # starts in an environment of its own.
        "RAY_num_prestart_python_workers": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _connect_ray(cluster: RunningCluster) -> None:
    """Connects this process to the cluster's Ray. Raises: Unavailable when nobody answers."""
    import ray

    host, _, port = cluster.ray_address.rpartition(":")
    try:
        # Ray itself would try for a minute and then fail with a page of text.
        socket.create_connection((host, int(port)), timeout=RAY_CONNECT_TIMEOUT_S).close()
        ray.init(
            address=cluster.ray_address,
            namespace=cluster.namespace,
            logging_level="error",
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address=_RAY_NODE_ADDRESS if cluster.ray_pid is not None else None,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(
            f"no Ray answers at {cluster.ray_address}: {reason}", field="ray_address"
        ) from error


def _start_actors(
    options: UpOptions, cluster: RunningCluster, cluster_uuid: bytes
) -> RunningCluster:
    import ray

    from shoal_cluster.actors.controller import Controller

    configuration = ClusterConfiguration(
        cluster=f"{cluster.name}-{cluster.incarnation}",
        incarnation=cluster.incarnation,
        cluster_uuid=cluster_uuid,
        bucket=cluster.bucket,
        run_directory=cluster.run_directory,
        link_host=None if cluster.ray_pid is not None else "",
        secret=bytes.fromhex(SystemIdGenerator().hex(32)),
        servers=tuple(ServerId(f"server-{number}") for number in range(options.servers)),
        coordinators=options.coordinators,
        search_threads=max(1, os.cpu_count() or 1),
        grpc_host=options.grpc_host,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
    )
    _connect_ray(cluster)
    try:
        controller = Controller.options(  # type: ignore[attr-defined]
            name=configuration.actor_name(CONTROLLER),
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=0,
            max_concurrency=1000,
            runtime_env=environment(),
        ).remote(configuration, start_edge)
        address: str = _wait_for(controller.ready.remote(), READY_TIMEOUT_S)
    finally:
        ray.shutdown()
    return replace(cluster, grpc_address=address)


async def start_edge(
    address: str,
    share_port: bool,
    lane_socket: str,
    searcher: Searcher,
    writer: Writer,
    loader: Loader,
    control: ControllerClient,
) -> EdgeServer:
    """Starts a coordinator's gRPC server and fast lanes; handed to actors, who know no gRPC."""
    services = Services(
        control=control,
        searching=searcher,
        reading=searcher.rows,
        exploring=Explorer(searcher.scatter),
        writing=writer,
        loading=loader,
        status=control,
    )
    return await start_server(
        address, services, ids=SystemIdGenerator(), lane_socket=lane_socket, share_port=share_port
    )


def _wait_for(reference: Any, timeout_s: float) -> Any:
    """Waits for a call to the controller. Raises: as actors/calls.py bounded."""

    async def wait() -> Any:
        return await bounded(reference, timeout_s, "the controller")

    return asyncio.run(wait())


def _stop_actors(cluster: RunningCluster) -> None:
    import ray

    prefix = f"{cluster.name}-{cluster.incarnation}:"
    _connect_ray(cluster)
    try:
        controller = ray.get_actor(prefix + CONTROLLER)
        _wait_for(controller.shutdown.remote(), STOP_TIMEOUT_S)
    except ValueError:
        pass  # the controller is gone already; the others are killed below
    finally:
        for entry in ray.util.list_named_actors(all_namespaces=False):
            if str(entry).startswith(prefix):
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(str(entry)), no_restart=True)
        ray.shutdown()


def _stop_ray(pid: int) -> None:
    """Ends our `ray start` and, through it, Ray's processes; kills what is left of its session."""
    with contextlib.suppress(psutil.NoSuchProcess):
        head = psutil.Process(pid)
        family = head.children(recursive=True)
        head.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs([head, *family], timeout=STOP_TIMEOUT_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def _kill_leftovers(cluster: RunningCluster) -> None:
    """Kills processes that name our private run directory: only ours do."""
    if cluster.ray_pid is None:
        return
    for process in psutil.process_iter(["pid", "cmdline"]):
        with contextlib.suppress(psutil.Error):
            if any(cluster.run_directory in part for part in process.info["cmdline"] or ()):
                process.kill()


def _is_ours(cluster: RunningCluster) -> bool:
    """Says whether the recorded pid is still our `ray start`: pids are used again."""
    if cluster.ray_pid is None:
        return False
    try:
        command = psutil.Process(cluster.ray_pid).cmdline()
    except psutil.Error:
        return False
    return any(cluster.run_directory in part for part in command)


def _require_free_port(host: str, port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"cannot listen at {host}:{port}: {error.strerror}; choose another {option}",
                field="metrics_port" if option == "--metrics-port" else "grpc_port",
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_RAY_NODE_ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


def _absolute(bucket: str) -> str:
    return bucket if "://" in bucket else str(Path(bucket).expanduser().resolve())


def _state_file(name: str, state_directory: Path) -> Path:
    return state_directory / f"{name}.json"


def _read_state(path: Path) -> RunningCluster | None:
    """Returns what the state file says, or None when there is none.

    Raises: InvalidRequest naming the file when it cannot be read.
    """
    try:
        return RunningCluster(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRequest(
            f"state file {path} cannot be read ({error}); if no cluster of that name runs, "
            "remove the file",
            field="state_dir",
        ) from error


def _write_state(cluster: RunningCluster, state_directory: Path) -> None:
    state_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = _state_file(cluster.name, state_directory)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(cluster), indent=2))
    partial.replace(path)
