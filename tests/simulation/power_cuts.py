"""Power cuts of a shard in a local directory: real store, log, manifests, segments, takeovers.

Two shard servers of one machine share the directory. One leads and takes writes; now and then it
dies between two system calls and the other takes over. At some system call the power goes: what is
on disk then is one of the states that a disk may be in, drawn at random (tests/unit/bucket/
power_cut.py). Whoever starts next must find what was acknowledged and what a strong read has shown.
Then the same again, on what was left.
"""

import asyncio
import hashlib
import random
import shutil
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shoal_cluster.bucket.filesystem import TEMPORARY_PREFIX
from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.domain.errors import Conflict, ShoalError, Unavailable
from shoal_cluster.domain.ids import CollectionId, ShardNumber, Slot
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.domain.point import NO_PROVENANCE, decode_tail, encode_tail
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.domain.session import Consistency
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.shard.building import LocalBuilds
from shoal_cluster.shard.calls import ReadLevel, ScrollCall, WriteCall, WriteKind
from shoal_cluster.shard.compute import InlineCompute
from shoal_cluster.shard.host import ShardHost
from shoal_cluster.shard.ports import ShardPorts
from shoal_cluster.shard.segment_files import SegmentFiles
from tests.simulation.loop import Process, SimulatedLoop, current_process, run
from tests.simulation.scaling import scaled_limits, scratch_directory
from tests.simulation.scenario import EventTap, Outcome, quiet_log
from tests.simulation.world import SeededIds, SimulatedClock
from tests.unit.bucket.power_cut import PowerCutFileSystem

T = TypeVar("T")

CUTS = 4
WRITES_MAX = 150
STARTS_MAX = 5
STEPS_BEFORE_CUT_MAX = 1500
"""System calls: a write is about five, a seal about fifty."""

POINTS = ("a", "b", "c", "d")
SCHEMA = CollectionSchema(
    id=CollectionId("p" * 32),
    name="points",
    dimension=2,
    metric=Metric.L2,
    attributes={"value": AttributeType.INT},
    shards=1,
)
SHARD = ShardNumber(0)
NAME = (SCHEMA.id, SHARD)
STRONG = ReadLevel(consistency=Consistency.STRONG)
PATIENCE_S = 20.0
"""Virtual: more than any write, read or takeover takes on a machine that has power."""


class _Stopped(BaseException):
    """The process is dead, or the machine has no power: not one more line of it runs."""


class Machine:
    """A directory, what is known to be on the disk of it, and when the power goes.

    off: done when the power has gone. dying: the process that dies, and after how many of its own
    system calls.
    """

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root = root
        self.off: asyncio.Future[None]
        self.filesystem = PowerCutFileSystem()
        self.dying: tuple[Process, int] | None = None
        self.deaths = 0
        self._rng = rng
        self._steps_left = 0
        root.mkdir()

    def start(self) -> None:
        """Switches the power on; call on the loop of this life."""
        self.off = asyncio.get_running_loop().create_future()
        self.dying = None
        self._steps_left = 1 + int(STEPS_BEFORE_CUT_MAX * self._rng.random())
        self.filesystem.after_step = self._step

    def lay_out(self) -> None:
        """Makes the directory what the power cut left."""
        left = self.filesystem.survivors(self.root, self._rng)
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, body in left.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        self.filesystem = PowerCutFileSystem()
        self.filesystem.start_from(left, self.root)

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left <= 0:
            if not self.off.done():
                self.off.set_result(None)
            raise _Stopped
        if self.dying is not None and current_process() is self.dying[0]:
            process, left = self.dying
            self.dying = (process, left - 1)
            if left <= 1:
                process.kill()
                self.deaths += 1
                raise _Stopped


class _AtOnce(Executor):
    """Runs system calls where they are asked for, so that a seed has one order of them."""

    def submit(  # type: ignore[override]
        self, call: Callable[..., T], /, *arguments: object
    ) -> "Future[T]":
        answer: Future[T] = Future()
        try:
            answer.set_result(call(*arguments))
        except Exception as error:  # noqa: BLE001  carried to the caller as it is
            answer.set_exception(error)
        except _Stopped:
            pass  # no answer, ever
        return answer


class _Store(LocalStore):
    """The real store, without threads."""

    def __init__(self, machine: Machine, ids: SeededIds, rng: random.Random) -> None:
        super().__init__(machine.root, filesystem=machine.filesystem, ids=ids)
        self._puts = self._reads = _AtOnce()  # type: ignore[assignment]
        self._rng = rng

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        await asyncio.sleep(0.001 * self._rng.random())
        return await super()._run(pool, call)


class _NobodyListens:
    """The Publisher port: followers learn of writes from the directory."""

    def record(self, slot: Slot, body: bytes) -> None:
        return None

    def manifest(self) -> None:
        return None


class _Server:
    """One life of a shard server on the machine."""

    def __init__(self, machine: Machine, scratch: Path, name: str, rng: random.Random) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        self.process = Process(loop, name)
        ids = SeededIds(rng)
        clock = SimulatedClock(loop, offset_s=0.0, rate=1.0)
        compute = InlineCompute()
        here = scratch / name
        here.mkdir()
        store = self.process.run(lambda: _Store(machine, ids, rng))
        self.ports = ShardPorts(
            store=store,
            clock=clock,
            ids=ids,
            compute=compute,
            search_workers=2,
            background=compute,
            files=SegmentFiles(store, here / "cache", compute),
            builds=LocalBuilds(store, here, clock, compute),
            cluster_uuid=bytes(16),
        )
        self.host = ShardHost(self.ports, lambda name: _NobodyListens())

    async def do(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs `work` as the process's own. Raises: what it does; _Gone when nothing comes back."""
        task = self.process.spawn(work())
        done, _ = await asyncio.wait([task], timeout=PATIENCE_S)
        if not done:
            raise _Gone
        return task.result()

    async def lead(self) -> None:
        """Opens the shard and takes it over."""

        async def take_over() -> None:
            await Manifests(self.ports.store, ShardKeys(*NAME), self.ports.clock).create_first()
            while True:
                self.host.open(SCHEMA, SHARD)
                try:
                    await self.host.promote(NAME)
                    return
                except (Unavailable, Conflict):
                    await asyncio.sleep(0.1)

        await self.do(take_over)

    async def write(self, request_no: int, point: str, value: int) -> None:
        call = WriteCall(
            collection=SCHEMA.id,
            shard=SHARD,
            client_id=self.process.name,
            request_no=request_no,
            kind=WriteKind.UPSERT,
            ids=[point.encode()],
            tails=[encode_tail(1.0, {"value": value}, b"", NO_PROVENANCE)],
            body=np.array([[value, 0]], dtype=np.float32).tobytes(),
        )
        (fate,) = await self.do(lambda: self.host.write((call,)))
        if isinstance(fate, ShoalError):
            raise fate

    async def read(self) -> dict[str, int]:
        call = ScrollCall(
            collection=SCHEMA.id, shard=SHARD, after=b"", limit=len(POINTS), level=STRONG
        )
        found, _ = await self.do(lambda: self.host.scroll(call))
        return {
            point.decode(): int(decode_tail(tail)[1]["value"])  # type: ignore[arg-type]
            for point, tail in zip(found.ids, found.tails, strict=True)
        }


class _Gone(Exception):
    """The process died, or the machine lost its power, while it was asked."""


class Ledger:
    """What one client, which asks for one thing at a time, was told.

    _sure: what was acknowledged or shown last, by point. _maybe: what was sent since, unanswered.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.operations = 0
        self._sure: dict[str, int | None] = dict.fromkeys(POINTS)
        self._maybe: dict[str, set[int]] = {point: set() for point in POINTS}

    def sent(self, point: str, value: int) -> None:
        self.operations += 1
        self._maybe[point].add(value)

    def acknowledged(self, point: str, value: int) -> None:
        self._sure[point] = value
        self._maybe[point].clear()

    def shown(self, rows: Mapping[str, int], when: str) -> None:
        """Compares a strong read with what was said before; from now on it is a promise too."""
        for point in POINTS:
            found = rows.get(point)
            if found != self._sure[point] and found not in self._maybe[point]:
                self.violations.append(
                    f"{when}: point {point} is {found}; {self._sure[point]} was acknowledged or "
                    f"shown, and since then {sorted(self._maybe[point])} may have been written"
                )
            self._sure[point] = found
            self._maybe[point].clear()


def cut_power(seed: int) -> Outcome:
    """Runs one seed."""
    rng = random.Random(f"{seed}/power cuts")
    ledger = Ledger()
    lines: list[str] = []
    with (
        scratch_directory() as scratch,
        scaled_limits(rng, rng, hurried=True),
        quiet_log() as logged,
    ):
        machine = Machine(scratch / "bucket", rng)
        for cut in range(CUTS):
            life = _Life(machine, scratch, ledger, logged, rng, cut)
            run(life.main(), limit_s=float("inf"))
            # Names of temporary files tell the number of this very process.
            lines += [
                f"{cut} {call} {'' if name.startswith(TEMPORARY_PREFIX) else name}"
                for call, name in machine.filesystem.trace
            ]
            if ledger.violations or logged.alarms:
                break
            machine.lay_out()
    violations = [*ledger.violations, *logged.alarms]
    return Outcome(
        seed=seed,
        violations=tuple(violations),
        digest=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        lines=tuple(lines),
        operations=ledger.operations,
        virtual_s=0.0,
        counts={"power cuts": CUTS, "deaths between system calls": machine.deaths},
    )


class _Life:
    """What happens from one power cut to the next."""

    def __init__(
        self,
        machine: Machine,
        scratch: Path,
        ledger: Ledger,
        logged: EventTap,
        rng: random.Random,
        number: int,
    ) -> None:
        self._machine = machine
        self._scratch = scratch
        self._ledger = ledger
        self._logged = logged
        self._rng = rng
        self._number = number
        self._lives = 0

    async def main(self) -> None:
        self._machine.start()
        work = asyncio.ensure_future(self._work())
        await asyncio.wait([work, self._machine.off], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        for process in asyncio.get_running_loop().processes:  # type: ignore[attr-defined]
            process.kill()
        work.cancel()

    async def _work(self) -> None:
        """Writes and reads until the power goes; the ledger notes what was told."""
        server = await self._start()
        for request_no in range(1, WRITES_MAX):
            if server is None:
                return
            point = self._rng.choice(POINTS)
            value = 1000 * self._number + request_no
            if self._rng.random() < 0.1:
                self._machine.dying = (server.process, 1 + int(10 * self._rng.random()))
            self._ledger.sent(point, value)
            try:
                await server.write(request_no, point, value)
            except (_Gone, ShoalError):
                server.process.kill()
                server = await self._start()
                continue
            self._ledger.acknowledged(point, value)

    async def _start(self) -> _Server | None:
        """Returns a server that leads, after it has shown everything; None when that is broken."""
        for _ in range(STARTS_MAX):
            self._lives += 1
            name = f"life-{self._number}-{self._lives}"
            server = _Server(self._machine, self._scratch, name, self._rng)
            try:
                await server.lead()
                self._ledger.shown(await server.read(), f"{name}, after a start")
                return server
            except (_Gone, ShoalError):
                server.process.kill()
            if self._logged.alarms:
                return None
        self._ledger.violations.append(f"life {self._number}: nobody can take the shard over")
        return None
