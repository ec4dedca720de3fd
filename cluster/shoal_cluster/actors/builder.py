"""Builds in processes of their own, away from the serving actors and below them in priority.

A shard server has a builder that seals and one that merges, because a seal holds up writers when it
waits behind a merge of minutes, and some for bulk loads. Each carries out one order at a time, is
started by its first order and goes when it has had none for IDLE_S: a quiet server pays for none.

Actors and not tasks: Ray ends a task's process as soon as the program that started the cluster
has gone, so every seal started a process anew (two, in fact), and the second of processor time
that takes came off the writes that had filled the memtable.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.actor import ActorHandle
from ray.exceptions import RayError

from shoal_cluster.actors.configuration import ClusterConfiguration, environment
from shoal_cluster.bucket.local import end_process
from shoal_cluster.bucket.open import open_store
from shoal_cluster.domain import limits
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Internal, ShoalError, from_wire, to_wire
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.segment.build import SegmentInput
from shoal_cluster.shard.build_memory import bounded_memory
from shoal_cluster.shard.building import BuildOrder, execute_build
from shoal_cluster.shard.compute import InlineCompute
from shoal_cluster.shard.loading import BUILDS_AT_ONCE
from shoal_cluster.telemetry.logs import configure_logging

_log = structlog.get_logger()

BUILD_TIMEOUT_S = 3600.0
"""A build of SEGMENT_ROWS_MAX rows takes minutes; past an hour it is ordered again."""

IDLE_S = 30.0
"""Above the pause between two seals of a shard that takes 50 rows a second."""

LOAD_THREADS = min(os.cpu_count() or 1, 4)
"""Of a build for a bulk load, whose caller waits for it; builders are below the serving actors in
priority, so more than the cores they leave gains nothing."""

NICENESS = 10
"""Above the serving actors': about a tenth of a core that they want too, all of one they leave."""


@ray.remote
class Builder:
    """Carries out build orders, one at a time. Holds nothing between them."""

    def __init__(self, configuration: ClusterConfiguration, name: str) -> None:
        configure_logging(cluster=configuration.cluster, actor=name)
        self._configuration = configuration

    async def build(self, order: dict[str, Any], rows: SegmentInput | None) -> dict[str, Any]:
        """Returns {"entry": …} or {"error": …}, so that errors keep their kind."""
        store = open_store(self._configuration.bucket, on_broken=end_process)
        scratch = Path(self._configuration.run_directory) / "builds"
        scratch.mkdir(parents=True, exist_ok=True)
        segment = order["segment"]
        try:
            with bounded_memory():
                entry = await execute_build(
                    BuildOrder.from_wire(order),
                    store,
                    scratch,
                    SystemClock(),
                    InlineCompute(),
                    rows,
                    threads=LOAD_THREADS,
                )
        except ShoalError as error:
            return {"error": to_wire(error)}
        except MemoryError as error:
            _log.error("build_too_large", segment=segment, exc_info=error)
            needs = f"needs more than {limits.BUILD_MEMORY_BYTES_MAX} bytes of memory"
            return {"error": to_wire(Internal(f"build {segment} {needs}"))}
        except Exception as error:  # noqa: BLE001  the outermost call of this process
            _log.error("build_met_a_bug", segment=segment, exc_info=error)
            bug = f"met a bug, {error!r}; the builder's log has the details"
            return {"error": to_wire(Internal(f"build {segment} {bug}"))}
        finally:
            await store.close()
        return {"entry": None if entry is None else entry.to_wire()}


class RayBuilds:
    """The Builds port (shard/building.py) over a server's builders."""

    def __init__(self, configuration: ClusterConfiguration, server: str) -> None:
        self._sealing = _Lane(configuration, f"{server}-sealing")
        self._merging = _Lane(configuration, f"{server}-merging")
        self._loading = [
            _Lane(configuration, f"{server}-loading-{number}") for number in range(BUILDS_AT_ONCE)
        ]

    async def build(
        self, order: BuildOrder, rows: SegmentInput | None = None
    ) -> SegmentEntry | None:
        if order.chunks:
            lane = min(self._loading, key=lambda lane: lane.orders)
        else:
            lane = self._merging if order.sources else self._sealing
        return await lane.build(order, rows)

    def expect_load(self) -> None:
        self._loading[0].warm_up()


class _Lane:
    """One builder, while there is something to build; it dies with the server that made it.

    orders: those it carries out or that wait for it.
    """

    def __init__(self, configuration: ClusterConfiguration, name: str) -> None:
        self._configuration = configuration
        self._name = name
        self._turn = asyncio.Lock()
        self._builder: ActorHandle[Any] | None = None
        self._retirement: asyncio.TimerHandle | None = None
        self.orders = 0

    def warm_up(self) -> None:
        """Starts the builder, which takes a second or two, for an order that is about to come."""
        if self._builder is None and not self.orders:
            self._builder = self._start()
            self._retire_later()

    def _retire_later(self) -> None:
        self._retirement = asyncio.get_running_loop().call_later(IDLE_S, self._retire)

    async def build(self, order: BuildOrder, rows: SegmentInput | None) -> SegmentEntry | None:
        self.orders += 1
        try:
            result = await self._in_turn(order, rows)
        finally:
            self.orders -= 1
        if "error" in result:
            raise from_wire(result["error"])
        return None if result["entry"] is None else SegmentEntry.from_wire(result["entry"])

    async def _in_turn(self, order: BuildOrder, rows: SegmentInput | None) -> dict[str, Any]:
        async with self._turn:
            if self._retirement is not None:
                self._retirement.cancel()
            try:
                return await self._carry_out(order, rows)
            finally:
                self._retire_later()

    async def _carry_out(self, order: BuildOrder, rows: SegmentInput | None) -> dict[str, Any]:
        """Returns what `Builder.build` does. A builder that did not get to the end is ended.

        Raises: Internal.
        """
        if self._builder is None:
            self._builder = self._start()
        ended = False
        try:
            async with asyncio.timeout(BUILD_TIMEOUT_S):
                result: dict[str, Any] = await self._builder.build.remote(order.to_wire(), rows)
            ended = True
            return result
        except TimeoutError as error:
            raise Internal(f"build {order.segment} took more than {BUILD_TIMEOUT_S:g} s") from error
        except RayError as error:
            reason = repr(getattr(error, "cause", None) or error).splitlines()[0]
            # Ended from outside, out of memory, a crash: the same build may do it again.
            raise Internal(f"build {order.segment} died: {reason}") from error
        finally:
            if not ended:
                # Also when we are cancelled: nobody will commit what it builds.
                self._retire()

    def _start(self) -> "ActorHandle[Any]":
        builder: ActorHandle[Any] = Builder.options(  # type: ignore[attr-defined]
            # None reserved, as for servers: there are two a server, whatever waits to be built.
            num_cpus=0,
            runtime_env=environment(niceness=NICENESS),
        ).remote(self._configuration, self._name)
        return builder

    def _retire(self) -> None:
        if self._builder is not None:
            ray.kill(self._builder)
            self._builder = None
