"""A whole cluster in one world: shard servers, controllers, coordinators, and what restarts them.

Ray's part (placing, restarting, control calls) is played by `Cluster`: a dead process is started
again after a while, under the same name and empty; a control call takes time, may lose its answer,
and never outlives its deadline.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from shoal_cluster.actors.routes import LinkCaller, TopologyBoard
from shoal_cluster.bucket.faults import FaultPlan
from shoal_cluster.control.catalog import Owner
from shoal_cluster.control.controller import ControlLoop
from shoal_cluster.control.reconcile import (
    CloseReplica,
    Command,
    OpenReplica,
    Promote,
    SetFollowers,
)
from shoal_cluster.domain.errors import NotFound, Outcome, ShoalError, Unavailable
from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.observation import ServerReport
from shoal_cluster.domain.shard_caller import ShardCaller
from shoal_cluster.domain.topology import Topology
from shoal_cluster.ingest.execute import Writer
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.pool import LinkPool
from shoal_cluster.query.execute import Searcher
from tests.simulation.audit import Audit, AuditedCaller
from tests.simulation.bucket import StoreCalls
from tests.simulation.loop import Process
from tests.simulation.network import SimulatedNetwork
from tests.simulation.server import (
    CLUSTER_UUID,
    REPORT,
    Machine,
    SimulatedServer,
    draw_between,
)
from tests.simulation.world import World

T = TypeVar("T")

REPORT_TIMEOUT_S = 1.0
CONTROL_TIMEOUT_S = 30.0
RESTART_S_MIN, RESTART_S_MAX = 0.2, 6.0
"""Between the death of a process and its next life: Ray's worker start, or a node's."""

OWNER = Owner(incarnation="simulated", address="simulated:0", since_ms=0, host="h")


class Cluster:
    """servers, coordinators, controllers: the present life of each name."""

    def __init__(
        self,
        world: World,
        *,
        servers: int,
        coordinators: int,
        plan: FaultPlan,
        calls: StoreCalls,
        audit: Audit,
    ) -> None:
        self.world = world
        self.objects = audit.objects
        self.network = SimulatedNetwork(world)
        self.server_names = [ServerId(f"s{number}") for number in range(servers)]
        self.servers: dict[ServerId, SimulatedServer] = {}
        self.coordinators: list[SimulatedCoordinator] = []
        self.controllers: list[SimulatedController] = []
        self.restarting = True
        self._plan = plan
        self._calls = calls
        self._audit = audit
        self._lives = 0
        self._rng = world.rng("cluster")
        for name in self.server_names:
            self.start_server(name)
        for _ in range(coordinators):
            self.start_coordinator()

    def machine(self, name: str) -> Machine:
        """Returns a process of its own, alive."""
        self._lives += 1
        name = f"{name}.{self._lives}"
        self.world.note(name, "starts")
        return Machine(self.world, self.network, self.objects, self._calls, self._plan, name)

    def weather(self, plan: FaultPlan) -> None:
        """Changes the bucket's faults, for processes there are and to come."""
        self._plan = plan
        machines = [server.machine for server in self.servers.values()]
        machines += [controller.machine for controller in self.controllers]
        for machine in machines:
            machine.store.faults.plan = plan

    def start_server(self, name: ServerId) -> SimulatedServer:
        server = SimulatedServer(self.machine(name), name)
        self.servers[name] = server
        server.process.on_kill(lambda: self._died(name))
        server.process.spawn(server.start())
        return server

    def start_coordinator(self) -> None:
        coordinator = SimulatedCoordinator(self.machine("coordinator"), self._audit)
        place = len(self.coordinators)
        self.coordinators.append(coordinator)
        coordinator.process.on_kill(lambda: self._coordinator_died(place))

    def start_controller(self) -> "SimulatedController":
        controller = SimulatedController(self, self.machine("controller"))
        self.controllers.append(controller)
        controller.start()
        return controller

    def kill(self, process: Process, why: str) -> None:
        """Kills a process now, as a crash of its machine does."""
        self.world.note(process.name, f"killed: {why}")
        process.kill()

    def _died(self, name: ServerId) -> None:
        delay_s = draw_between(self._rng, RESTART_S_MIN, RESTART_S_MAX)
        self.world.spawn(self._after(delay_s, lambda: self.start_server(name)))

    def _coordinator_died(self, place: int) -> None:
        def restart() -> None:
            coordinator = SimulatedCoordinator(self.machine("coordinator"), self._audit)
            self.coordinators[place] = coordinator
            coordinator.process.on_kill(lambda: self._coordinator_died(place))

        self.world.spawn(self._after(draw_between(self._rng, 0.2, 3.0), restart))

    async def _after(self, delay_s: float, work: Any) -> None:
        await asyncio.sleep(delay_s)
        if self.restarting:
            work()

    def find(self, name: ServerId) -> SimulatedServer | None:
        """Returns the server's present life, None while there is none."""
        server = self.servers[name]
        return server if server.process.alive else None


class SimulatedServers:
    """The Servers port of one controller: links for reports, Ray calls for commands."""

    def __init__(self, cluster: Cluster, machine: Machine, pool: LinkPool) -> None:
        self._cluster = cluster
        self._machine = machine
        self._pool = pool
        self._addresses: dict[ServerId, LinkAddress] = {}
        self._describing: dict[ServerId, asyncio.Task[None]] = {}
        self._nodes = {name: str(name) for name in cluster.server_names}

    def placed(self) -> Mapping[ServerId, str]:
        return self._nodes

    async def report(self, server: ServerId) -> ServerReport:
        address = self._addresses.get(server)
        if address is None:
            self._describe(server)
            raise NotFound(f"server {server} has not said where it listens")
        try:
            reply = await self._pool.call(
                address, REPORT, None, timeout_s=REPORT_TIMEOUT_S, on_lost=Outcome.NOT_APPLIED
            )
        except Unavailable as error:
            self._describe(server)
            if address not in self._pool.connected():
                raise NotFound(f"server {server}: {error.message}") from error
            raise
        return ServerReport.from_wire(reply.header)  # type: ignore[arg-type]

    async def carry_out(self, command: Command) -> None:
        server = self._cluster.find(command.server)
        if server is None:
            raise Unavailable(f"server {command.server} is dead")
        work: Callable[[], Coroutine[Any, Any, Any]]
        match command:
            case OpenReplica():
                work = functools.partial(
                    server.open_replica, command.schema.to_wire(), command.shard
                )
            case CloseReplica():
                work = functools.partial(server.close_replica, (command.collection, command.shard))
            case Promote():
                work = functools.partial(server.promote, (command.collection, command.shard))
            case SetFollowers():
                work = functools.partial(
                    server.set_followers, (command.collection, command.shard), command.addresses
                )
        await self._ray_call(server, work)

    async def _ray_call(self, server: SimulatedServer, work: Any) -> Any:
        return await self._machine.world.remote_call(
            server.process,
            work,
            rng=self._machine.rng,
            timeout_s=CONTROL_TIMEOUT_S,
            lost=Unavailable,
        )

    def _describe(self, server: ServerId) -> None:
        running = self._describing.get(server)
        if running is None or running.done():
            self._describing[server] = asyncio.ensure_future(self._run_describe(server))

    async def _run_describe(self, server: ServerId) -> None:
        life = self._cluster.find(server)

        async def describe() -> LinkAddress:
            assert life is not None
            return life.address

        if life is not None and life.address != "":
            try:
                self._addresses[server] = await self._ray_call(life, describe)
            except ShoalError:
                return


class SimulatedController:
    """One life of a controller. More than one may run: they duel, which must cost time only."""

    def __init__(self, cluster: Cluster, machine: Machine) -> None:
        self.machine = machine
        self.process = machine.process
        self._cluster = cluster
        pool = machine.pool()
        self.loop = ControlLoop(
            store=machine.store,
            clock=machine.clock,
            ids=machine.ids,
            servers=SimulatedServers(cluster, machine, pool),
            audience=self,
            cluster_uuid=CLUSTER_UUID,
            owner=OWNER,
        )
        pool.when_lost(lambda address, reason: self.loop.wake())

    def start(self) -> None:
        self.process.spawn(self._run())
        self.process.spawn(self._inform())

    def publish(self, topology: Topology) -> None:
        """The Audience port: `_inform` tells the coordinators, again and again as Ray's would."""

    async def _run(self) -> None:
        while True:
            try:
                await self.loop.claim()
                break
            except ShoalError:
                await self.machine.clock.sleep(0.5)
        await self.loop.run()

    async def _inform(self) -> None:
        """Tells every coordinator the topology it does not know yet."""
        sent: dict[str, Topology] = {}
        while True:
            await self.machine.clock.sleep(0.1)
            topology = self.loop.topology
            for coordinator in list(self._cluster.coordinators):
                name = coordinator.machine.name
                if topology.version == 0 or sent.get(name) is topology:
                    continue
                if await self._tell(coordinator, topology):
                    sent[name] = topology

    async def _tell(self, coordinator: "SimulatedCoordinator", topology: Topology) -> bool:
        async def post() -> None:
            coordinator.board.post(Topology.from_wire(topology.to_wire()))

        try:
            await self.machine.world.remote_call(
                coordinator.process,
                post,
                rng=self.machine.rng,
                timeout_s=5.0,
                lost=Unavailable,
            )
        except ShoalError:
            return False
        return True


class SimulatedCoordinator:
    """One life of a coordinator: real searcher and writer over real links."""

    def __init__(self, machine: Machine, audit: Audit) -> None:
        self.machine = machine
        self.process = machine.process
        self.board = TopologyBoard(CLUSTER_UUID)
        self.caller: ShardCaller = AuditedCaller(LinkCaller(machine.pool(), self.board), audit)
        self.searcher = Searcher(caller=self.caller, topology=self.board, clock=machine.clock)
        self.writer = Writer(caller=self.caller, topology=self.board, clock=machine.clock)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        return await work
