"""The memory network beyond the links' contract: order, repeatability, faults by address."""

import asyncio
import random

import pytest

from shoal_cluster.domain.errors import Indeterminate, Outcome, Unavailable
from shoal_cluster.links.address import parse_address
from shoal_cluster.links.connection import connect
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.memory import MemoryNetwork
from shoal_cluster.links.messages import Reply, Request
from tests.unit.links.places import SECRET, LoopClock, Place, VirtualTimeLoop, run_on

A, B = parse_address("memory:a"), parse_address("memory:b")


def served_with(seed: int) -> list[object]:
    """Returns the order in which two listeners serve the calls of two links, with random delays."""
    served: list[object] = []

    def note(request: Request) -> Reply:
        served.append(request.header)
        return Reply(request.header)

    async def main() -> None:
        drawn = random.Random(seed)
        network = MemoryNetwork(delay_s=lambda: drawn.uniform(0, 0.004))
        links = []
        for address in (A, B):
            listener = Listener(
                {"note": note}, shared_secret(SECRET), network=network, clock=LoopClock()
            )
            await listener.listen(address)
            links.append(await connect(address, SECRET, network=network, clock=LoopClock()))

        async def call(n: int) -> object:
            link = links[n % 2]
            return (await link.call("note", n, timeout_s=5, on_lost=Outcome.NOT_APPLIED)).header

        for start in range(0, 40, 4):
            assert await asyncio.gather(*map(call, range(start, start + 4))) == list(
                range(start, start + 4)
            )
        for link in links:
            await link.close()

    run_on(VirtualTimeLoop, main())
    return served


def test_the_order_depends_on_the_seed_alone() -> None:
    runs = [served_with(seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert sorted(runs[0]) == list(range(40))
    assert [n for n in runs[0] if n % 2] == sorted(n for n in runs[0] if n % 2)


def test_faults_hit_one_address_only(memory: Place) -> None:
    network = memory.network
    assert isinstance(network, MemoryNetwork)

    async def main() -> None:
        async def hang(request: Request) -> Reply:
            await asyncio.Event().wait()
            raise AssertionError

        links = []
        listeners = []
        for address in (A, B):
            listener = Listener({"hang": hang}, shared_secret(SECRET), network=network)
            await listener.listen(address)
            listeners.append(listener)
            links.append(await connect(address, SECRET, network=network))
        call = asyncio.create_task(
            links[0].call("hang", None, timeout_s=5, on_lost=Outcome.MAYBE_APPLIED)
        )
        assert await links[0].ping(timeout_s=1) < 1
        network.sever(A)
        with pytest.raises(Indeterminate):
            await call
        network.freeze(A)
        with pytest.raises(Unavailable, match="no link to memory:a within"):
            await connect(A, SECRET, network=network, timeout_s=0.05)
        network.thaw(A)
        again = await connect(A, SECRET, network=network)
        assert not links[1].closed.done()
        for link in (again, links[1]):
            assert await link.ping(timeout_s=1) < 1
            await link.close()
        for listener in listeners:
            await listener.close(drain_s=0)

    memory.run(main())
