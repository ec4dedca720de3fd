"""Builds as Ray tasks: each in a process of its own, away from the serving actors."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from shoal_cluster.actors.configuration import ClusterConfiguration
from shoal_cluster.bucket.local import end_process
from shoal_cluster.bucket.open import open_store
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import ShoalError, Unavailable, from_wire, to_wire
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.segment.build import SegmentInput
from shoal_cluster.shard.building import BuildOrder, execute_build
from shoal_cluster.shard.compute import InlineCompute

BUILD_TIMEOUT_S = 3600.0
"""A build of SEGMENT_ROWS_MAX rows takes minutes; past an hour it is ordered again."""

_CPUS = 0.5
"""Ray's logical CPUs of a build. Half: two cores run a build beside servers that wait for it."""


@ray.remote(num_cpus=_CPUS, max_retries=0)
def build(
    configuration: ClusterConfiguration, order: dict[str, Any], rows: SegmentInput | None
) -> dict[str, Any]:
    """Carries out one order. Returns {"entry": …} or {"error": …}, so that errors keep a kind."""

    async def run() -> SegmentEntry | None:
        store = open_store(configuration.bucket, on_broken=end_process)
        scratch = Path(configuration.run_directory) / "builds"
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            return await execute_build(
                BuildOrder.from_wire(order), store, scratch, SystemClock(), InlineCompute(), rows
            )
        finally:
            await store.close()

    try:
        entry = asyncio.run(run())
    except ShoalError as error:
        return {"error": to_wire(error)}
    return {"entry": None if entry is None else entry.to_wire()}


class RayBuilds:
    """The Builds port (shard/building.py) over Ray tasks."""

    def __init__(self, configuration: ClusterConfiguration) -> None:
        self._configuration = configuration

    async def build(
        self, order: BuildOrder, rows: SegmentInput | None = None
    ) -> SegmentEntry | None:
        reference = build.options(
            name=f"build {order.segment}",
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        ).remote(self._configuration, order.to_wire(), rows)
        try:
            async with asyncio.timeout(BUILD_TIMEOUT_S):
                result = await reference
        except asyncio.CancelledError:
            with contextlib.suppress(RayError):
                ray.cancel(reference, force=True)  # nobody will commit what it builds
            raise
        except TimeoutError as error:
            with contextlib.suppress(RayError):
                ray.cancel(reference, force=True)
            raise Unavailable(
                f"build {order.segment} took more than {BUILD_TIMEOUT_S:g} s"
            ) from error
        except RayError as error:
            raise Unavailable(f"build {order.segment} died: {type(error).__name__}") from error
        if "error" in result:
            raise from_wire(result["error"])
        return None if result["entry"] is None else SegmentEntry.from_wire(result["entry"])
