"""The bucket as simulated processes see it: slow, faulty, and watched.

An operation travels to the bucket and its answer back; both take time, and neither belongs to the
process that asked: a put of a process that dies still lands. Faults are those of bucket/faults.py.
`Watch` remembers every object ever created, also those that were collected since, so that at the
end the whole order of each shard is known.
"""

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from shoal_cluster.bucket.faults import FaultStore
from shoal_cluster.bucket.store import ObjectEntry, PutOutcome
from tests.simulation.ambush import Ambush, Site
from tests.simulation.loop import Process
from tests.simulation.world import World

T = TypeVar("T")

CHAIN_FRAMES_MAX = 40
STALL_S_MAX = 15.0
_PACKAGE = "/shoal_cluster/"


class WatchedObjects(dict[str, bytes]):
    """The bucket's contents.

    first: of every key ever created, the body it was created with. order: how many objects had been
    created before it, by which "durable by then" is told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, bytes] = {}
        self.order: dict[str, int] = {}

    def __setitem__(self, key: str, body: bytes) -> None:
        super().__setitem__(key, body)
        if key not in self.first:
            self.order[key] = len(self.order) + 1
            self.first[key] = body


def await_chain(frame: FrameType | None) -> tuple[Site, ...]:
    """Returns where the running task waits inside the cluster's code, innermost first."""
    chain: list[Site] = []
    for _ in range(CHAIN_FRAMES_MAX):
        if frame is None:
            break
        name = frame.f_code.co_filename
        at = name.find(_PACKAGE)
        if at >= 0:
            chain.append((name[at + len(_PACKAGE) :], frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    return tuple(chain)


class CrashPlan:
    """Kills the process that makes one chosen store call, before or after the call took effect.

    chain: the await chain to wait for; occurrence: which of its calls, from 0.
    """

    def __init__(self, chain: tuple[Site, ...], occurrence: int, *, after: bool) -> None:
        self.chain = chain
        self.after = after
        self.struck = False
        self._left = occurrence

    @staticmethod
    def parse(text: str) -> "CrashPlan":
        """Reads what `show` wrote."""
        side, occurrence, sites = text.split("@")
        chain = []
        for site in sites.split("|"):
            file, function, line = site.split(":")
            chain.append((file, function, int(line)))
        return CrashPlan(tuple(chain), int(occurrence), after=side == "after")

    def show(self) -> str:
        """Returns the plan, before it struck, as one word of a command line."""
        sites = "|".join(f"{file}:{function}:{line}" for file, function, line in self.chain)
        return f"{'after' if self.after else 'before'}@{self._left}@{sites}"

    def strikes(self, chain: tuple[Site, ...], *, after: bool) -> bool:
        if self.struck or chain != self.chain or after != self.after:
            return False
        self._left -= 1
        self.struck = self._left < 0
        return self.struck


class StoreCalls:
    """Every store call of all processes of a world: counts them, and crashes where it is told.

    seen: await chain to number of calls. hit: chains that a process was killed at.
    """

    def __init__(self, world: World, plan: CrashPlan | None = None) -> None:
        self.seen: dict[tuple[Site, ...], int] = {}
        self.hit: set[tuple[tuple[Site, ...], bool]] = set()
        self.plan = plan
        self._world = world

    def count(self, chain: tuple[Site, ...]) -> None:
        self.seen[chain] = self.seen.get(chain, 0) + 1

    def crash_if_due(self, process: Process, chain: tuple[Site, ...], *, after: bool) -> bool:
        """Kills the process if this is the chosen call; says whether it did."""
        if self.plan is None or not process.alive:
            return False
        if not self.plan.strikes(chain, after=after):
            return False
        self.hit.add((chain, after))
        at = f"{chain[0][0]}:{chain[0][1]}" if chain else "?"
        self._world.note(process.name, f"crash point {'after' if after else 'before'} {at}")
        self._world.counts["crashes at crash points"] += 1
        process.kill()
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asleep:
    """How long a call waits before it takes effect and after. frozen: its whole process does."""

    before_s: float = 0.0
    after_s: float = 0.0
    frozen: bool = False


_AWAKE = _Asleep()


class SimulatedStore:
    """One process's handle to the bucket (bucket/store.py Store)."""

    def __init__(
        self,
        world: World,
        process: Process,
        faults: FaultStore,
        calls: StoreCalls,
        rng: random.Random,
    ) -> None:
        self.faults = faults
        self._world = world
        self._process = process
        self._calls = calls
        self._rng = rng
        process.on_kill(self._land_later)

    async def create(self, key: str, body: bytes) -> PutOutcome:
        chain = await_chain(sys._getframe(1))
        return await self._operate("create", key, chain, lambda: self.faults.create(key, body))

    async def create_file(self, key: str, path: Path) -> PutOutcome:
        chain = await_chain(sys._getframe(1))
        body = path.read_bytes()  # now: a caller that gives up removes the file
        return await self._operate("create_file", key, chain, lambda: self.faults.create(key, body))

    async def get(self, key: str) -> bytes | None:
        chain = await_chain(sys._getframe(1))
        return await self._operate("get", key, chain, lambda: self.faults.get(key))

    async def get_range(self, key: str, start: int, length: int) -> bytes | None:
        chain = await_chain(sys._getframe(1))
        return await self._operate(
            "get_range", key, chain, lambda: self.faults.get_range(key, start, length)
        )

    async def list(self, prefix: str) -> list[ObjectEntry]:
        chain = await_chain(sys._getframe(1))
        return await self._operate("list", prefix, chain, lambda: self.faults.list(prefix))

    async def delete(self, key: str) -> None:
        chain = await_chain(sys._getframe(1))
        await self._operate("delete", key, chain, lambda: self.faults.delete(key))

    async def make_durable(self, prefix: str) -> None:
        chain = await_chain(sys._getframe(1))
        await self._operate("make_durable", prefix, chain, lambda: self.faults.make_durable(prefix))

    def local_path(self, key: str) -> Path | None:
        return None

    async def close(self) -> None:
        return None

    async def _operate(
        self,
        method: str,
        key: str,
        chain: tuple[Site, ...],
        operation: Callable[[], Awaitable[T]],
    ) -> T:
        world, process = self._world, self._process
        self._calls.count(chain)
        world.counts["store calls"] += 1
        answer: asyncio.Future[T] = world.loop.create_future()
        if self._calls.crash_if_due(process, chain, after=False):
            return await answer  # never: the process is dead
        asleep = self._draw_stall(key, chain)
        world.spawn(self._carry(method, key, chain, operation, answer, asleep))
        return await answer

    def _draw_stall(self, key: str, chain: tuple[Site, ...]) -> _Asleep:
        """Sometimes stops the process here, as SIGSTOP does; the call leaves before or after."""
        world, process = self._world, self._process
        if world.ambush is not None and world.ambush.catches(process, key, chain):
            return self._fall_asleep(world.ambush, key, chain)
        taking_over = any(site[0] == "shard/takeover.py" for site in chain)
        if self._rng.random() >= (world.takeover_stall if taking_over else world.stall):
            return _AWAKE
        stall_s = STALL_S_MAX * self._rng.random()
        world.note(process.name, f"stalls for {stall_s:.3f} s at {chain[0][1] if chain else '?'}")
        world.counts["stalls"] += 1
        process.freeze()
        world.spawn(self._thaw(stall_s))
        return _Asleep(before_s=stall_s * (self._rng.random() < 0.5), frozen=True)

    def _fall_asleep(self, ambush: Ambush, key: str, chain: tuple[Site, ...]) -> _Asleep:
        """Stops the process, or only this call, in the section that the ambush is laid for."""
        world, process = self._world, self._process
        sleep_s, before, frozen = ambush.draw_sleep()
        how = "sleeps" if frozen else "waits"
        world.note(
            process.name, f"{how} for {sleep_s:.3f} s at {chain[0][1]}, {ambush.section.name}"
        )
        world.counts["ambushes"] += 1
        if frozen:
            process.freeze()
        ambush.sleeper = process
        world.spawn(self._wake_up(ambush, sleep_s, frozen=frozen))
        ambush.on_sleep(process, key)
        if before:
            return _Asleep(before_s=sleep_s, frozen=frozen)
        return _Asleep(after_s=0.0 if frozen else sleep_s, frozen=frozen)

    async def _wake_up(self, ambush: Ambush, delay_s: float, *, frozen: bool) -> None:
        await asyncio.sleep(delay_s)
        ambush.sleeper = None
        if frozen:
            self._process.thaw()

    async def _thaw(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._process.thaw()

    async def _carry(
        self,
        method: str,
        key: str,
        chain: tuple[Site, ...],
        operation: Callable[[], Awaitable[Any]],
        answer: "asyncio.Future[Any]",
        asleep: _Asleep,
    ) -> None:
        """Takes the operation to the bucket and the answer back, whatever becomes of the caller."""
        world = self._world
        await asyncio.sleep(asleep.before_s + world.delays.draw(self._rng))
        if asleep.before_s and asleep.frozen and not self._process.alive:
            return  # it died before it came to send the call
        try:
            result, error = await operation(), None
        except Exception as raised:  # noqa: BLE001  carried to the caller as it is
            result, error = None, raised
        if method in ("create", "create_file", "delete"):
            outcome = type(error).__name__ if error else getattr(result, "value", "done")
            world.note(self._process.name, f"{method} {key}: {outcome}")
        self._calls.crash_if_due(self._process, chain, after=True)
        await asyncio.sleep(asleep.after_s + world.delays.draw(self._rng))
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    def _land_later(self) -> None:
        """What was under way when the process died reaches the bucket some time after."""
        self._world.spawn(self._settle(self._rng.random() * 10.0))

    async def _settle(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await self.faults.settle()
