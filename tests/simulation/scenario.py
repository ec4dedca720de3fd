"""One run: a cluster, clients and misfortunes from one seed, then calm, then judgement.

0. limits are scaled down, so that seals, compactions and refusals happen all the time
1. a collection is created
2. clients work while misfortunes happen
3. calm: faults end, what died comes back; within REST_S_MAX everything must be at rest
4. every replica is asked; every client reads everything
5. every process is killed; a new cluster must show the same from the bucket alone
6. the history (history.py) and every answer of every shard (audit.py) are judged
"""

import asyncio
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from shoal_cluster.bucket.faults import NO_FAULTS
from shoal_cluster.domain.errors import ShoalError, Unavailable
from shoal_cluster.domain.observation import ReplicaState
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema
from tests.simulation import history as histories
from tests.simulation.audit import Audit, sum_of
from tests.simulation.bucket import CrashPlan, Site, StoreCalls, WatchedObjects
from tests.simulation.clients import (
    COLLECTION,
    Numbers,
    SimulatedClient,
    draw_points,
    schema_of,
)
from tests.simulation.cluster import Cluster
from tests.simulation.history import History, Level, Position, RestingReplica
from tests.simulation.inspector import Inspector
from tests.simulation.loop import SimulatedLoop, Stuck, current_process, run
from tests.simulation.nemesis import Nemesis, draw_weather
from tests.simulation.scaling import scaled_limits, scratch_directory
from tests.simulation.server import CLUSTER_UUID
from tests.simulation.world import World

REST_S_MAX = 120.0
"""After the last fault: restarts, takeovers, replays and retries take seconds, not minutes."""

RUN_S_MAX = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a run. counts: operations, faults and misfortunes by kind.

    chains: the await chains of store calls, with their numbers; hit: where a process was killed.
    """

    seed: int
    violations: tuple[str, ...]
    digest: str
    lines: tuple[str, ...]
    operations: int
    virtual_s: float
    counts: Mapping[str, int]
    chains: Mapping[tuple[Site, ...], int] = field(default_factory=dict)
    hit: frozenset[tuple[tuple[Site, ...], bool]] = frozenset()


def simulate(
    seed: int,
    *,
    crash: CrashPlan | None = None,
    work_s: float = 40.0,
) -> Outcome:
    """Runs one seed. crash: a crash point to kill a process at, besides the seed's misfortunes."""
    with scratch_directory() as scratch, quiet_log() as logged:
        attempt = _Run(seed, scratch, logged, crash)
        try:
            run(attempt.main(work_s), limit_s=RUN_S_MAX)
        except Stuck as stuck:
            attempt.world.violate(f"stuck: {stuck}")
        return attempt.judged()


class _Run:
    def __init__(
        self, seed: int, scratch: Path, logged: "EventTap", crash: CrashPlan | None
    ) -> None:
        self._seed = seed
        self._scratch = scratch
        self._logged = logged
        self._crash = crash
        self.world: World
        self._audit = Audit(WatchedObjects())
        self._history = History()
        self._calls: StoreCalls

    async def main(self, work_s: float) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        self.world = world = World(self._seed, loop, self._scratch)
        self._logged.world = world
        rng = world.rng("scenario")
        weather = draw_weather(rng)
        world.reply_loss = weather.reply_loss
        audit, history = self._audit, self._history
        calls = self._calls = StoreCalls(world, self._crash)
        shards, servers = rng.choice((1, 2)), rng.choice((2, 3))
        replicas = 2
        if weather.ambush is not None:
            servers = replicas = 3  # whoever sleeps needs a rival besides the primary
        schema = schema_of(shards, replicas)
        points = draw_points(rng)
        memory = world.rng("memory of requests")
        seal = None if weather.ambush is None else weather.ambush.seal
        with scaled_limits(rng, memory, hurried=weather.hurried, seal=seal):
            cluster = Cluster(
                world,
                servers=servers,
                coordinators=rng.choice((1, 2)),
                plan=weather.bucket if rng.random() < 0.3 else NO_FAULTS,
                calls=calls,
                audit=audit,
            )
            controller = cluster.start_controller()
            await self._create(world, cluster, controller, schema)
            cluster.weather(weather.bucket)
            world.delays = weather.delays
            world.stall, world.takeover_stall = weather.stall, weather.takeover_stall
            world.ambush, world.servers_apart = weather.ambush, weather.apart
            nemesis = Nemesis(cluster, weather, schema)
            numbers = Numbers()
            clients = [
                SimulatedClient(cluster, history, numbers, f"client-{i}", points, shards)
                for i in range(rng.choice((2, 4)))
            ]
            until_s = loop.time() + work_s
            misfortune = world.spawn(nemesis.run(until_s))
            if weather.ambush is not None:
                section = weather.ambush.section
                for name in cluster.server_names:
                    for number in range(section.inspectors):
                        world.spawn(
                            Inspector(cluster, name, number, section.inspect_s).work(until_s)
                        )
            pause_s = rng.choice((0.05, 0.3, 1.0))
            if weather.hurried:
                pause_s = 0.1 if weather.ambush is None else rng.choice((0.3, 1.0))
            await asyncio.gather(
                *(client.work(until_s, pause_s, weather.silence_s) for client in clients)
            )
            misfortune.cancel()
            nemesis.calm()
            await self._rest(world, cluster, audit, history, clients)
            there = await nemesis.catalog.judge(world, audit.objects)
            main = cluster.coordinators[0].board.current().collections[COLLECTION].schema.id
            audit.dropped = {place[0] for place in audit.durable_slots()} - there - {main}
            await self._start_over(world, cluster, audit, history, clients)

    async def _create(
        self, world: World, cluster: Cluster, controller: Any, schema: CollectionSchema
    ) -> None:
        rng = world.rng("setup")
        for _ in range(50):
            if not controller.process.alive:
                controller = cluster.start_controller()
                await asyncio.sleep(0.5)
            try:
                await world.remote_call(
                    controller.process,
                    functools.partial(
                        controller.loop.create_collection, schema, RequestName("setup", 1)
                    ),
                    rng=rng,
                    timeout_s=70.0,
                    lost=Unavailable,
                )
                break
            except ShoalError:
                await asyncio.sleep(0.2)
        while not all(
            COLLECTION in coordinator.board.current().collections
            for coordinator in cluster.coordinators
        ):
            await asyncio.sleep(0.1)

    async def _rest(
        self,
        world: World,
        cluster: Cluster,
        audit: Audit,
        history: History,
        clients: list[SimulatedClient],
    ) -> None:
        """Waits until every replica has the whole log, then has everybody read everything."""
        deadline_s = world.loop.time() + REST_S_MAX
        while (problem := self._unrest(cluster, audit)) != "":
            if world.loop.time() > deadline_s:
                world.violate(f"no rest within {REST_S_MAX:g} s of calm: {problem}")
                return
            if not any(controller.process.alive for controller in cluster.controllers):
                cluster.start_controller()  # the last one met a crash point
            await asyncio.sleep(0.5)
        history.resting.clear()
        for name, server in cluster.servers.items():
            for report in server.host.reports():
                rows, _ = audit.final_rows((report.collection, report.shard), CLUSTER_UUID)
                if (report.sum, report.live_rows) != (sum_of(rows), len(rows)):
                    world.violate(
                        f"{name}: shard {report.shard} has {report.live_rows} rows with sum "
                        f"{report.sum:016x}, its log {len(rows)} with {sum_of(rows):016x}"
                    )
                history.resting.append(
                    RestingReplica(
                        f"{report.collection}/{report.shard}",
                        name,
                        Position(report.epoch, report.seq),
                        report.live_rows,
                        report.sum,
                    )
                )
        for client in clients:
            for level in Level:
                for read in (client.scroll, client.search):
                    # A link may have to be found dead first; at rest the second try must do.
                    if not await read(level) and not await read(level):
                        world.violate(f"a {level.value} read of {client.name} failed at rest")

    def _unrest(self, cluster: Cluster, audit: Audit) -> str:
        """Returns what is not at rest yet, "" when everything is."""
        slots = audit.durable_slots()
        leaders: Counter[tuple[str, int]] = Counter()
        for name in cluster.server_names:
            server = cluster.find(name)
            if server is None:
                return f"{name} is down"
            for report in server.host.reports():
                place = (report.collection, report.shard)
                leaders[place] += report.leads
                if report.state is not ReplicaState.READY:
                    return f"{name}: shard {report.shard} is {report.state.value}: {report.reason}"
                if report.slot != slots.get(place, 0):
                    return (
                        f"{name}: shard {report.shard} is at slot {report.slot} of "
                        f"{slots.get(place, 0)} {report.reason}"
                    )
        if not leaders or set(leaders.values()) != {1}:
            return f"leaders per shard: {dict(leaders)}"
        for coordinator in cluster.coordinators:
            if not coordinator.process.alive:
                return f"{coordinator.machine.name} is down"
            known = coordinator.board.current().collections.get(COLLECTION)
            if known is None or any(shard.primary is None for shard in known.shards):
                return f"{coordinator.machine.name} does not know every primary"
        return ""

    async def _start_over(
        self,
        world: World,
        cluster: Cluster,
        audit: Audit,
        history: History,
        clients: list[SimulatedClient],
    ) -> None:
        """Kills everything, lets it come back, and looks again."""
        world.note("scenario", "everything is killed")
        processes = [server.process for server in cluster.servers.values()]
        processes += [coordinator.process for coordinator in cluster.coordinators]
        processes += [controller.process for controller in cluster.controllers]
        for process in processes:
            process.kill()
        cluster.start_controller()
        await asyncio.sleep(0.5)
        await self._rest(world, cluster, audit, history, clients)
        cluster.restarting = False

    def judged(self) -> Outcome:
        """Judges what happened; call when the run has ended, however it did."""
        world, audit, history, calls = self.world, self._audit, self._history, self._calls
        violations = list(world.violations)
        violations += [bug for process in world.loop.processes for bug in process.bugs]
        violations += audit.judge(CLUSTER_UUID)
        violations += [str(violation) for violation in histories.check(history)]
        violations += [
            alarm
            for alarm in self._logged.alarms
            if not any(gone in alarm for gone in audit.dropped)
        ]
        for violation in violations:
            world.note("judge", violation)
        for faults in world.bucket_faults:
            for fault, count in faults.items():
                if fault != "ok":
                    world.counts[f"bucket {fault.replace('_', ' ')}"] += count
        return Outcome(
            seed=self._seed,
            violations=tuple(dict.fromkeys(violations)),
            digest=world.log.digest(),
            lines=tuple(world.log.lines),
            operations=history.operations(),
            virtual_s=world.loop.time(),
            counts=dict(world.counts),
            chains=dict(calls.seen),
            hit=frozenset(calls.hit),
        )


_BROKEN_INVARIANT = re.compile(r"\([A-Z]-\d+\)")
"""How an error names an invariant of docs/design: whoever says so has found a bug, at any level."""

_HARMLESS = (
    "has ended",
    "was taken by another epoch",
    "another primary has moved on",
    "(injected)",
    " is gone",
    "holds no manifest",
)


class EventTap:
    """Takes the cluster's own log events into the run's log."""

    def __init__(self) -> None:
        self.world: World | None = None
        self.alarms: list[str] = []

    def __call__(self, _logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        process = current_process()
        name = "-" if process is None else process.name
        fields = " ".join(f"{key}={value}" for key, value in event.items() if key != "event")
        text = f"[{method}] {event['event']} {fields}"
        if self.world is not None:
            text = text.replace(str(self.world.scratch), "SCRATCH")
            self.world.note(name, text)
        reason = str(event.get("reason", ""))
        alarming = method in ("error", "critical", "exception") and not any(
            harmless in reason for harmless in _HARMLESS
        )
        if alarming or _BROKEN_INVARIANT.search(reason):
            self.alarms.append(f"{name}: {text}")
        raise structlog.DropEvent


@contextmanager
def quiet_log() -> Iterator[EventTap]:
    """Sends the cluster's log events to the run's log, nowhere else."""
    before = structlog.get_config()
    events = EventTap()
    structlog.configure(
        processors=[events],
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    try:
        yield events
    finally:
        structlog.configure(**before)
