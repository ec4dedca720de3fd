"""What goes wrong in a run, and when; all of it drawn from the seed."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal_cluster.bucket.faults import LEGAL_FAULTS, NO_FAULTS, FaultPlan, draw_legal_plan
from shoal_cluster.control.controller import ControlLoop
from shoal_cluster.domain.errors import ShoalError, Unavailable
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import AttributeType, CollectionSchema
from shoal_cluster.domain.schema_change import SchemaChange
from tests.simulation.ambush import Ambush, Role
from tests.simulation.catalog_ledger import ABSENT, ALTERED, CREATED, EXTRA, CatalogLedger
from tests.simulation.cluster import Cluster
from tests.simulation.loop import Process
from tests.simulation.server import SimulatedServer, draw_between
from tests.simulation.world import Delays

_NO_DELAYS = Delays(usual_s=0.001, rare_s=0.0, rare=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How hard a run is. mean_calm_s: between two misfortunes; misfortunes: their kinds.

    hurried: seals, garbage collection, clients and takeovers follow each other as fast as they can,
    so that much happens behind the back of a process that sleeps. ambush: where it falls asleep.
    apart: servers cannot connect to each other; followers learn of writes from the bucket only.
    silence_s: for how long all clients pause at once, in turns with bursts.
    """

    bucket: FaultPlan
    delays: Delays
    reply_loss: float
    stall: float
    takeover_stall: float
    mean_calm_s: float
    misfortunes: Sequence[str]
    hurried: bool
    ambush: Ambush | None = None
    apart: bool = False
    silence_s: float = 0.0


AMBUSHED_SHARE, HURRIED_SHARE = 0.45, 0.15
"""Of all runs. The others have everything at once, or a single kind of misfortune, or none."""

MISFORTUNES = (
    "crash server",
    "crash server",
    "freeze server",
    "freeze server",
    "partition server",
    "sever links",
    "forced takeover",
    "forced takeover",
    "second controller",
    "crash controller",
    "crash coordinator",
    "clock jump",
    "collection comes and goes",
    "replica closed",
)


def draw_weather(rng: random.Random) -> Weather:
    """Returns a run's weather; one in four has a single kind of misfortune, one in eight none."""
    kinds: Sequence[str] = MISFORTUNES
    luck = rng.random()
    kind = rng.random()
    if kind < AMBUSHED_SHARE:
        return _draw_ambush(rng)
    if kind < AMBUSHED_SHARE + HURRIED_SHARE:
        return Weather(
            bucket=NO_FAULTS if rng.random() < 0.7 else _draw_bucket(rng),
            delays=Delays(usual_s=0.005, rare_s=4.0, rare=rng.choice((0.0, 0.005))),
            reply_loss=0.0,
            stall=rng.choice((0.0, 0.003)),
            takeover_stall=rng.choice((0.02, 0.08)),
            mean_calm_s=rng.choice((1.5, 4.0)),
            misfortunes=("forced takeover", "freeze server", "forced takeover", "crash server"),
            hurried=True,
        )
    if luck < 0.25:
        kinds = (rng.choice(MISFORTUNES),)
    elif luck < 0.375:
        kinds = ()
    return Weather(
        bucket=_draw_bucket(rng),
        delays=Delays(
            usual_s=rng.choice((0.001, 0.005, 0.03)),
            rare_s=rng.choice((0.1, 1.0, 4.0)),
            rare=rng.choice((0.0, 0.01, 0.04)),
        ),
        reply_loss=rng.choice((0.0, 0.01, 0.05)),
        stall=rng.choice((0.0, 0.0, 0.002, 0.01)),
        takeover_stall=rng.choice((0.0, 0.05, 0.2)),
        mean_calm_s=rng.choice((1.0, 2.5, 6.0)),
        misfortunes=kinds,
        hurried=False,
    )


def _draw_ambush(rng: random.Random) -> Weather:
    """Returns a hurried run with little else going wrong than that somebody sleeps in one place."""
    ambush = Ambush(rng)
    return Weather(
        bucket=NO_FAULTS if rng.random() < 0.8 else _draw_bucket(rng),
        delays=Delays(usual_s=0.005, rare_s=1.0, rare=rng.choice((0.0, 0.005))),
        reply_loss=0.0,
        stall=0.0,
        takeover_stall=0.0,
        mean_calm_s=rng.choice(ambush.section.calm_s),
        misfortunes=ambush.section.misfortunes,
        hurried=True,
        ambush=ambush,
        apart=ambush.apart,
        silence_s=ambush.silence_s,
    )


def _draw_bucket(rng: random.Random) -> FaultPlan:
    """Returns a plan; usually thinned, so that there is something left to go wrong in between."""
    plan = draw_legal_plan(rng)
    share = rng.choice((0.0, 0.1, 0.3, 0.3, 1.0))
    odds = {fault.value: share * plan.probability(fault) for fault in LEGAL_FAULTS}
    return replace(plan, **odds)  # type: ignore[arg-type]


class Nemesis:
    """Lets one misfortune after the other befall a cluster, until told to stop."""

    def __init__(self, cluster: Cluster, weather: Weather, schema: CollectionSchema) -> None:
        self._cluster = cluster
        self._weather = weather
        self._schema = schema
        self._shards = schema.shards
        self._rng = cluster.world.rng("nemesis")
        self.catalog = CatalogLedger()
        if weather.ambush is not None:
            weather.ambush.on_sleep = self._behind_the_back_of
            weather.ambush.role_of = self._role_of

    async def run(self, until_s: float) -> None:
        world = self._cluster.world
        while self._weather.misfortunes:
            await asyncio.sleep(self._rng.expovariate(1 / self._weather.mean_calm_s))
            if world.loop.time() >= until_s:
                return
            ambush = world.ambush
            if ambush is not None and ambush.sleeper and ambush.section.rival_after_s is not None:
                continue  # the others are to get on while it sleeps
            kind = self._rng.choice(self._weather.misfortunes)
            world.counts[kind] += 1
            await self._befall(kind)

    async def _befall(self, kind: str) -> None:
        cluster = self._cluster
        world = cluster.world
        name = self._rng.choice(cluster.server_names)
        server = cluster.find(name)
        match kind:
            case "crash server" if server is not None:
                cluster.kill(server.process, "fate")
            case "freeze server" if server is not None:
                world.note(server.process.name, "freezes")
                server.process.freeze()
                duration_s = draw_between(self._rng, 0.1, 12.0)
                world.spawn(self._later(duration_s, server.process.thaw, "thaws"))
            case "partition server" if server is not None:
                address = server.address
                cluster.network.partition(address)
                duration_s = draw_between(self._rng, 0.1, 8.0)
                world.spawn(self._later(duration_s, lambda: cluster.network.heal(address), "heals"))
            case "sever links" if server is not None:
                cluster.network.sever(server.address)
            case "forced takeover" if server is not None:
                world.spawn(self._force_takeover(name, self._rng.randrange(self._shards)))
            case "replica closed" if server is not None:
                world.spawn(self._close_replica(server))
            case "takeovers in a row":
                world.spawn(self._force_takeovers(self._rng.randrange(self._shards)))
            case "second controller":
                controller = cluster.start_controller()
                duration_s = draw_between(self._rng, 1.0, 15.0)
                world.spawn(self._later(duration_s, controller.process.kill, "ends"))
            case "crash controller":
                for controller in cluster.controllers:
                    if controller.process.alive:
                        cluster.kill(controller.process, "fate")
                world.spawn(
                    self._later(
                        draw_between(self._rng, 0.1, 4.0), self._ensure_controller, "restarts"
                    )
                )
            case "crash coordinator":
                cluster.kill(self._rng.choice(cluster.coordinators).process, "fate")
            case "collection comes and goes":
                world.spawn(self._churn())
            case "clock jump" if server is not None:
                server.machine.clock.jump(self._rng.choice((0.5, 30.0, 1e6)))

    async def _later(self, delay_s: float, work: object, what: str) -> None:
        await asyncio.sleep(delay_s)
        self._cluster.world.note("nemesis", what)
        work()  # type: ignore[operator]

    def _ensure_controller(self) -> None:
        if not any(controller.process.alive for controller in self._cluster.controllers):
            self._cluster.start_controller()

    def _behind_the_back_of(self, sleeper: Process, key: str) -> None:
        """Has another replica take over the shard that the sleeper is at."""
        ambush = self._weather.ambush
        after_s = None if ambush is None else ambush.section.rival_after_s
        if after_s is None:
            return
        rivals = [
            name
            for name, server in self._cluster.servers.items()
            if server.process.alive
            and server.process is not sleeper
            and self._role_of(server.process, key) is not Role.LEADER
        ]
        if rivals:
            delay_s = after_s[0] + (after_s[1] - after_s[0]) * self._rng.random()
            rival = self._force_takeover(self._rng.choice(rivals), _shard_of(key)[1])
            self._cluster.world.spawn(_after(delay_s, rival))

    def _role_of(self, process: Process, key: str) -> Role:
        """Returns what a process is to the shard that a key belongs to."""
        for server in self._cluster.servers.values():
            if server.process is process:
                hosted = server.host._hosted.get(_shard_of(key))  # type: ignore[call-overload]
                if hosted is None:
                    return Role.FOLLOWER
                if hosted.primary is not None and hosted.primary.serving:
                    return Role.LEADER
                if hosted.promoting is not None and hosted.promoting.locked():
                    return Role.CLAIMANT
        return Role.FOLLOWER

    async def _force_takeovers(self, shard: int) -> None:
        """Has every server take a shard over, each when the one before is about done.

        Who leads comes last: before it knows that it was deposed, telling it changes nothing.
        """
        servers = sorted(self._cluster.servers.items(), key=lambda _: self._rng.random())
        servers.sort(key=lambda entry: self._leads(entry[1], shard))
        for name, _ in servers:
            self._cluster.world.spawn(self._force_takeover(name, shard))
            await asyncio.sleep(0.1 + 0.15 * self._rng.random())

    async def _close_replica(self, server: SimulatedServer) -> None:
        """Closes a replica, as a controller does that has not heard yet of its collection."""
        held = [(report.collection, report.shard) for report in server.host.reports()]
        if held:
            place = self._rng.choice(held)
            self._cluster.world.note(server.process.name, f"is told to close shard {place[1]}")
            with contextlib.suppress(ShoalError):
                await self._cluster.world.remote_call(
                    server.process,
                    lambda: server.close_replica(place),
                    rng=self._rng,
                    timeout_s=20.0,
                    lost=Unavailable,
                )

    def _leads(self, server: SimulatedServer, shard: int) -> bool:
        return any(report.leads and report.shard == shard for report in server.host.reports())

    async def _force_takeover(self, name: str, shard: int) -> None:
        """Somebody else than the controller has a server take a shard over."""
        server = self._cluster.find(name)  # type: ignore[arg-type]
        if server is None:
            return
        held = {
            (report.collection, report.shard)
            for report in server.host.reports()
            if report.shard == shard
        }
        for place in sorted(held):
            self._cluster.world.note(server.process.name, f"is told to take over shard {shard}")
            try:
                await self._cluster.world.remote_call(
                    server.process,
                    lambda place=place: server.promote(place),  # type: ignore[misc]
                    rng=self._rng,
                    timeout_s=20.0,
                    lost=Unavailable,
                )
            except ShoalError:
                continue

    async def _churn(self) -> None:
        """Creates another collection, alters and drops it: the catalog moves under everybody."""
        number = self._cluster.world.counts["collection comes and goes"]
        name = f"other-{number}"
        schema = replace(self._schema, name=name)
        change = SchemaChange(name=name, add_attributes={EXTRA: AttributeType.INT})
        steps: list[tuple[str, Callable[[ControlLoop], Coroutine[Any, Any, Any]]]] = [
            (CREATED, lambda loop: loop.create_collection(schema, RequestName(name, 1))),
            (ALTERED, lambda loop: loop.alter_collection(change, RequestName(name, 2))),
            (ABSENT, lambda loop: loop.drop_collection(name, RequestName(name, 3))),
        ]
        for becomes, step in steps:
            alive = [one for one in self._cluster.controllers if one.process.alive]
            if not alive:
                return
            controller = self._rng.choice(alive)
            self.catalog.sent(name, becomes)
            try:
                await self._cluster.world.remote_call(
                    controller.process,
                    lambda step=step, loop=controller.loop: step(loop),  # type: ignore[misc]
                    rng=self._rng,
                    timeout_s=30.0,
                    lost=Unavailable,
                )
            except ShoalError as error:
                self._cluster.world.note("nemesis", f"collection {name}: {error.kind}")
            else:
                self.catalog.acknowledged(name, becomes)

    def calm(self) -> None:
        """Ends what is still going wrong."""
        cluster = self._cluster
        for server in cluster.servers.values():
            server.process.thaw()
            cluster.network.heal(server.address)
        cluster.weather(NO_FAULTS)
        cluster.world.delays = _NO_DELAYS
        cluster.world.reply_loss = 0.0
        cluster.world.stall = cluster.world.takeover_stall = 0.0
        cluster.world.ambush = None
        cluster.world.servers_apart = False
        alive = [one for one in cluster.controllers if one.process.alive]
        for controller in alive[1:]:
            controller.process.kill()
        self._ensure_controller()


async def _after(delay_s: float, work: Coroutine[Any, Any, None]) -> None:
    await asyncio.sleep(delay_s)
    await work


def _shard_of(key: str) -> tuple[str, int]:
    """Returns collection and shard of a key below `c/{collection}/s/{shard}/`."""
    _, collection, _, shard, *_ = key.split("/")
    return collection, int(shard)
