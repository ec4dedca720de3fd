"""The pool: one link and one connect per address, backoff, draining, loss, bounds."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from shoal_cluster.domain.errors import Outcome, Overloaded, Unavailable
from shoal_cluster.links.address import LinkAddress, parse_address
from shoal_cluster.links.connection import Link, connect
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.memory import MemoryNetwork
from shoal_cluster.links.messages import Reply, Request
from shoal_cluster.links.pool import BACKOFF_S_MAX, BACKOFF_S_MIN, LinkPool
from tests.unit.links.places import SECRET, Place

READ, WRITE = Outcome.NOT_APPLIED, Outcome.MAYBE_APPLIED
A, B, C = (parse_address(f"memory:{name}") for name in "abc")


@dataclass
class ManualClock:
    """A clock that the test moves."""

    now_s: float = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return 0

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


@dataclass
class Connects:
    """Connects through a memory network, counts, and can be held up."""

    network: MemoryNetwork
    made: list[LinkAddress] = field(default_factory=list)
    hold: asyncio.Event | None = None

    async def __call__(self, address: LinkAddress) -> Link:
        self.made.append(address)
        if self.hold is not None:
            await self.hold.wait()
        return await connect(address, SECRET, network=self.network)


def echo(request: Request) -> Reply:
    return Reply(request.header, request.body)


def with_pool(
    place: Place,
    check: Callable[[LinkPool, Connects, ManualClock, Listener], Awaitable[None]],
    *,
    addresses_max: int = 10,
) -> None:
    """Runs the check with a pool and a listener that echoes at `memory:a`."""

    async def main() -> None:
        assert isinstance(place.network, MemoryNetwork)
        connects, clock = Connects(place.network), ManualClock()
        pool = LinkPool(connects, clock=clock, addresses_max=addresses_max)
        async with place.listening({"echo": echo}) as (listener, _):
            await check(pool, connects, clock, listener)
            await pool.close_all()

    place.run(main())


def test_callers_share_one_connect_and_one_link(memory: Place) -> None:
    async def check(
        pool: LinkPool, connects: Connects, clock: ManualClock, listener: Listener
    ) -> None:
        calls = [pool.call(A, "echo", n, b"b", timeout_s=5, on_lost=READ) for n in range(20)]
        replies = await asyncio.gather(*calls)
        assert [reply.header for reply in replies] == list(range(20))
        await pool.call(A, "echo", 1, timeout_s=5, on_lost=READ)
        assert connects.made == [A]
        assert pool.connected() == [A]

    with_pool(memory, check)


def test_a_caller_that_gives_up_does_not_end_the_connect_of_others(memory: Place) -> None:
    async def check(
        pool: LinkPool, connects: Connects, clock: ManualClock, listener: Listener
    ) -> None:
        connects.hold = asyncio.Event()
        hasty = asyncio.create_task(pool.call(A, "echo", 1, timeout_s=0.01, on_lost=WRITE))
        cancelled = asyncio.create_task(pool.call(A, "echo", 2, timeout_s=5, on_lost=WRITE))
        patient = asyncio.create_task(pool.call(A, "echo", 3, timeout_s=5, on_lost=WRITE))
        with pytest.raises(Unavailable, match="before the deadline") as caught:
            await hasty
        assert caught.value.outcome is Outcome.NOT_APPLIED
        cancelled.cancel()
        await asyncio.wait([cancelled])
        connects.hold.set()
        assert (await patient).header == 3
        assert connects.made == [A]

    with_pool(memory, check)


def test_failed_connects_back_off_up_to_a_bound_and_callers_fail_at_once(memory: Place) -> None:
    async def check(
        pool: LinkPool, connects: Connects, clock: ManualClock, listener: Listener
    ) -> None:
        waits: list[int] = []
        for attempt in range(1, 12):
            with pytest.raises(Unavailable, match="nobody listens there"):
                await pool.call(B, "echo", 1, timeout_s=5, on_lost=WRITE)
            for _ in range(3):
                with pytest.raises(Unavailable, match="nobody listens there") as caught:
                    await pool.call(B, "echo", 1, timeout_s=5, on_lost=WRITE)
            assert len(connects.made) == attempt
            assert caught.value.retry_after_ms is not None
            waits.append(caught.value.retry_after_ms)
            clock.now_s += caught.value.retry_after_ms / 1000
        assert waits[0] - 1 <= BACKOFF_S_MIN * 1000 <= waits[0]
        assert all(later >= earlier for earlier, later in itertools.pairwise(waits))
        assert waits[-1] - 1 <= BACKOFF_S_MAX * 1000 <= waits[-1]

    with_pool(memory, check)


def test_success_ends_the_backoff_and_a_lost_link_is_replaced_on_the_next_call(
    memory: Place,
) -> None:
    async def check(
        pool: LinkPool, connects: Connects, clock: ManualClock, listener: Listener
    ) -> None:
        lost: asyncio.Queue[tuple[LinkAddress, str]] = asyncio.Queue()
        pool.when_lost(lambda address, reason: lost.put_nowait((address, reason)))
        await pool.call(A, "echo", 1, timeout_s=5, on_lost=READ)
        connects.network.sever(A)
        assert await lost.get() == (A, "the listener closed it")
        assert pool.connected() == []
        assert (await pool.call(A, "echo", 2, timeout_s=5, on_lost=READ)).header == 2
        assert connects.made == [A, A]

    with_pool(memory, check)


def test_new_calls_leave_a_draining_link_and_old_ones_end_on_it(memory: Place) -> None:
    async def check(
        pool: LinkPool, connects: Connects, clock: ManualClock, listener: Listener
    ) -> None:
        started, released = asyncio.Event(), asyncio.Event()

        async def gate(request: Request) -> Reply:
            started.set()
            await released.wait()
            return Reply("old")

        first = Listener({"gate": gate}, shared_secret(SECRET), network=connects.network)
        await first.listen(B)
        old = asyncio.create_task(pool.call(B, "gate", None, timeout_s=5, on_lost=WRITE))
        await started.wait()
        link = await pool.link(B, timeout_s=5)
        closing = asyncio.create_task(first.close(drain_s=5))
        while not link.draining:
            await asyncio.sleep(0)
        successor = Listener(
            {"gate": lambda _: Reply("new")}, shared_secret(SECRET), network=connects.network
        )
        await successor.listen(B)
        new = await pool.call(B, "gate", None, timeout_s=5, on_lost=WRITE)
        assert new.header == "new"
        released.set()
        assert (await old).header == "old"
        await closing
        assert pool.connected() == [B]
        await successor.close(drain_s=0)

    with_pool(memory, check)


def test_addresses_are_bounded_and_the_unreachable_are_forgotten_first(memory: Place) -> None:
    async def check(
        pool: LinkPool, connects: Connects, clock: ManualClock, listener: Listener
    ) -> None:
        other = Listener({"echo": echo}, shared_secret(SECRET), network=connects.network)
        await other.listen(C)
        with pytest.raises(Unavailable):
            await pool.call(B, "echo", 1, timeout_s=5, on_lost=READ)
        await pool.call(A, "echo", 1, timeout_s=5, on_lost=READ)
        await pool.call(C, "echo", 1, timeout_s=5, on_lost=READ)
        assert pool.connected() == [A, C]
        with pytest.raises(Overloaded) as caught:
            await pool.call(B, "echo", 1, timeout_s=5, on_lost=READ)
        assert caught.value.limit == "2 addresses"
        await other.close(drain_s=0)

    with_pool(memory, check, addresses_max=2)


def test_a_closed_pool_closes_its_links_and_connects_no_more(memory: Place) -> None:
    async def check(
        pool: LinkPool, connects: Connects, clock: ManualClock, listener: Listener
    ) -> None:
        lost: list[str] = []
        pool.when_lost(lambda address, reason: lost.append(reason))
        link = await pool.link(A, timeout_s=5)
        connects.hold = asyncio.Event()
        waiting = asyncio.create_task(pool.call(B, "echo", 1, timeout_s=5, on_lost=READ))
        while connects.made != [A, B]:
            await asyncio.sleep(0)
        await pool.close_all()
        assert link.closed.done()
        with pytest.raises(Unavailable, match="the pool was closed"):
            await waiting
        with pytest.raises(Unavailable, match="the pool is closed"):
            await pool.link(A, timeout_s=5)
        assert lost == []

    with_pool(memory, check)
