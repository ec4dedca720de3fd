"""What happens to calls when a link closes, drains, breaks or freezes; on every kind of link."""

import asyncio

import pytest

from shoal_cluster.domain.errors import (
    Indeterminate,
    Outcome,
    ShoalError,
    Unavailable,
)
from shoal_cluster.links.messages import Reply, Request
from tests.unit.links.places import Place
from tests.unit.links.test_contract import Gate, echo

READ, WRITE = Outcome.NOT_APPLIED, Outcome.MAYBE_APPLIED


def test_a_closed_link_refuses_calls_as_not_applied_and_says_why(place: Place) -> None:
    async def main() -> None:
        async with place.linked({"echo": echo}) as link:
            await link.close()
            assert await link.closed == "it was closed by this side"
            with pytest.raises(Unavailable, match="was not sent") as caught:
                await link.call("echo", None, timeout_s=10, on_lost=WRITE)
            assert caught.value.outcome is Outcome.NOT_APPLIED
            with pytest.raises(Unavailable):
                await link.ping(timeout_s=1)
            await link.close()

    place.run(main())


@pytest.mark.parametrize(
    ("on_lost", "error"), [(READ, Unavailable), (WRITE, Indeterminate)], ids=["read", "write"]
)
def test_a_lost_link_fails_its_calls_as_the_caller_said_and_cancels_their_handlers(
    place: Place, on_lost: Outcome, error: type[ShoalError]
) -> None:
    async def main() -> None:
        gate = Gate()
        async with place.linked({"gate": gate}) as link:
            call = asyncio.create_task(link.call("gate", None, timeout_s=10, on_lost=on_lost))
            await gate.started.wait()
            link.abort("missed 3 heartbeats")
            with pytest.raises(error, match="missed 3 heartbeats") as caught:
                await call
            assert caught.value.outcome is on_lost
            assert await gate.ended == "cancelled"
            assert await link.closed == "missed 3 heartbeats"

    place.run(main())


def test_a_draining_listener_finishes_what_runs_and_refuses_the_rest(place: Place) -> None:
    async def main() -> None:
        gate = Gate()
        async with place.listening({"gate": gate, "echo": echo}) as (listener, address):
            link = await place.connect(address)
            call = asyncio.create_task(link.call("gate", "kept", timeout_s=10, on_lost=WRITE))
            await gate.started.wait()
            closing = asyncio.create_task(listener.close(drain_s=10))
            refusals: list[Unavailable] = []
            while not (link.draining and refusals):
                # Served if it still crosses the start of `close`; refused by the listener until
                # its notice arrives, then by the link.
                try:
                    await link.call("echo", None, timeout_s=10, on_lost=WRITE)
                except Unavailable as error:
                    refusals.append(error)
            assert {error.outcome for error in refusals} == {Outcome.NOT_APPLIED}
            assert all("shutting down" in error.message for error in refusals)
            # A caller that has not seen the notice is refused as well.
            link.draining = False
            with pytest.raises(Unavailable, match="was not started") as caught:
                await link.call("echo", None, timeout_s=10, on_lost=WRITE)
            assert caught.value.outcome is Outcome.NOT_APPLIED
            assert not call.done()
            gate.released.set()
            assert (await call).header == "kept"
            await closing
            assert await link.closed == "the listener closed it"
            assert listener.links_open == 0
            with pytest.raises(Unavailable):
                await place.connect(address)

    place.run(main())


def test_handlers_that_outlast_the_drain_are_cancelled_and_their_callers_told(
    place: Place,
) -> None:
    async def main() -> None:
        gate = Gate()
        async with place.listening({"gate": gate}) as (listener, address):
            link = await place.connect(address)
            call = asyncio.create_task(link.call("gate", None, timeout_s=10, on_lost=WRITE))
            await gate.started.wait()
            await listener.close(drain_s=0.01)
            with pytest.raises(Indeterminate, match="cancelled while it was served"):
                await call
            assert await gate.ended == "cancelled"
            await listener.close(drain_s=0)

    place.run(main())


def test_a_call_never_written_is_not_applied_even_for_a_write(memory: Place) -> None:
    """The listener's side is frozen, the link's buffer fills, and later calls wait to be sent."""

    async def main() -> None:
        async with memory.linked({"echo": echo}) as link:
            memory.network.freeze(memory.address)
            written = asyncio.create_task(
                link.call("echo", 0, bytes(2 * 1024 * 1024), timeout_s=0.15, on_lost=WRITE)
            )
            await asyncio.sleep(0)
            waiting = [
                asyncio.create_task(link.call("echo", n, timeout_s=0.05, on_lost=WRITE))
                for n in range(3)
            ]
            patient = asyncio.create_task(link.call("echo", "later", timeout_s=10, on_lost=WRITE))
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(result) for result in results] == [Unavailable] * 3
            assert "reads too slowly" in str(results[0])
            with pytest.raises(Indeterminate):
                await written
            memory.network.thaw(memory.address)
            assert (await patient).header == "later"
            assert link.in_flight == 0

    memory.run(main())


def test_waiting_calls_fail_as_not_applied_when_the_link_is_lost(memory: Place) -> None:
    async def main() -> None:
        async with memory.linked({"echo": echo}) as link:
            memory.network.freeze(memory.address)
            written = asyncio.create_task(
                link.call("echo", 0, bytes(2 * 1024 * 1024), timeout_s=10, on_lost=WRITE)
            )
            await asyncio.sleep(0)
            waiting = asyncio.create_task(link.call("echo", 1, timeout_s=10, on_lost=WRITE))
            await asyncio.sleep(0)
            memory.network.sever(memory.address)
            with pytest.raises(Indeterminate):
                await written
            with pytest.raises(Unavailable) as caught:
                await waiting
            assert caught.value.outcome is Outcome.NOT_APPLIED

    memory.run(main())


def test_large_calls_that_wait_for_each_other_are_all_served_in_order(place: Place) -> None:
    async def main() -> None:
        served: list[object] = []

        def note(request: Request) -> Reply:
            served.append(request.header)
            return Reply()

        async with place.linked({"note": note}) as link:
            body = bytes(700_000)
            calls = [link.call("note", n, body, timeout_s=15, on_lost=WRITE) for n in range(40)]
            await asyncio.gather(*calls)
            assert served == list(range(40))

    place.run(main())


def test_a_frozen_peer_does_not_answer_pings(memory: Place) -> None:
    async def main() -> None:
        async with memory.linked({}) as link:
            memory.network.freeze(memory.address)
            with pytest.raises(Unavailable, match="no reply to 'ping'"):
                await link.ping(timeout_s=0.05)
            assert link.in_flight == 0
            memory.network.thaw(memory.address)

    memory.run(main())
