"""What every link keeps to: Unix and TCP sockets on uvloop and asyncio, and the memory network."""

import asyncio
from collections.abc import Callable

import pytest
import structlog

from shoal_cluster.domain.errors import (
    Indeterminate,
    Internal,
    InvalidRequest,
    NotPrimary,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
    to_wire,
)
from shoal_cluster.links.messages import ReceivedReply, Reply, Request
from tests.unit.links.places import Place

READ, WRITE = Outcome.NOT_APPLIED, Outcome.MAYBE_APPLIED


def echo(request: Request) -> Reply:
    return Reply(request.header, request.body)


class Gate:
    """A handler that tells when it started, waits to be let on, and tells how it ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.released = asyncio.Event()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self, request: Request) -> Reply:
        self.started.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.ended.set_result("cancelled")
            raise
        self.ended.set_result("answered")
        return Reply(request.header)


def test_echo_returns_headers_and_bodies_of_all_sizes(place: Place) -> None:
    async def main() -> None:
        async with place.linked({"echo": echo}) as link:
            for size in (0, 1, 100, 16_000, 16_500, 70_000, 300_000, 8 * 1024 * 1024):
                body = bytes(range(256)) * (size // 256) + bytes(size % 256)
                reply = await link.call("echo", {"n": size}, body, timeout_s=10, on_lost=READ)
                assert reply.header == {"n": size}
                assert reply.body == body

    place.run(main())


def test_body_in_parts_arrives_as_one(place: Place) -> None:
    async def main() -> None:
        async with place.linked({"echo": echo}) as link:
            parts = [b"ab", bytearray(b"cd"), memoryview(b"efg"), b"", bytes(100_000)]
            reply = await link.call("echo", None, parts, timeout_s=10, on_lost=READ)
            assert reply.header is None
            assert reply.body == b"abcdefg" + bytes(100_000)

    place.run(main())


def test_a_thousand_concurrent_calls_get_their_own_replies(place: Place) -> None:
    async def answer(request: Request) -> Reply:
        await asyncio.sleep(0)
        return Reply(request.header, request.body)

    async def main() -> None:
        async with place.linked({"answer": answer}) as link:
            replies = await asyncio.gather(
                *(
                    link.call("answer", n, n.to_bytes(4, "big") * 768, timeout_s=15, on_lost=READ)
                    for n in range(1000)
                )
            )
            assert [reply.header for reply in replies] == list(range(1000))
            assert all(reply.body[-4:] == n.to_bytes(4, "big") for n, reply in enumerate(replies))
            assert link.in_flight == 0

    place.run(main())


def test_a_slow_call_does_not_hold_back_a_later_one(place: Place) -> None:
    async def main() -> None:
        gate = Gate()
        async with place.linked({"gate": gate, "echo": echo}) as link:
            slow = asyncio.create_task(link.call("gate", "slow", timeout_s=10, on_lost=READ))
            await gate.started.wait()
            quick = await link.call("echo", "quick", timeout_s=10, on_lost=READ)
            assert quick.header == "quick"
            assert not slow.done()
            gate.released.set()
            assert (await slow).header == "slow"

    place.run(main())


def test_errors_arrive_with_all_fields(place: Place) -> None:
    sent = NotPrimary(
        "shard 3 is led elsewhere",
        field="shard",
        limit="1 primary",
        retry_after_ms=7,
        outcome=Outcome.MAYBE_APPLIED,
    )

    def at_once(request: Request) -> Reply:
        raise sent

    async def later(request: Request) -> Reply:
        await asyncio.sleep(0)
        raise sent

    async def main() -> None:
        async with place.linked({"at_once": at_once, "later": later}) as link:
            for method in ("at_once", "later"):
                with pytest.raises(NotPrimary) as caught:
                    await link.call(method, None, timeout_s=10, on_lost=READ)
                assert to_wire(caught.value) == to_wire(sent)

    place.run(main())


async def _async_bug(request: Request) -> Reply:
    raise ZeroDivisionError("bug")


def _wrong_type(request: Request) -> Reply:
    return "no reply"  # type: ignore[return-value]


async def _async_wrong_type(request: Request) -> Reply:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize(
    "bug",
    [
        lambda request: 1 / 0,
        _async_bug,
        _wrong_type,
        _async_wrong_type,
        lambda request: Reply(object()),
        lambda request: Reply({"n": 2**70}),
    ],
)
def test_a_bug_is_logged_once_and_the_link_goes_on(memory: Place, bug: Callable) -> None:
    async def main() -> None:
        async with memory.linked({"bug": bug, "echo": echo}) as link:
            with structlog.testing.capture_logs() as logs:
                with pytest.raises(Internal) as caught:
                    await link.call("bug", None, timeout_s=10, on_lost=READ)
                (event,) = (log for log in logs if log["event"] == "handler_failed")
            assert event["incident"] in caught.value.message
            assert isinstance(event["exc_info"], BaseException)
            assert caught.value.outcome is Outcome.MAYBE_APPLIED
            assert (await link.call("echo", 1, timeout_s=10, on_lost=READ)).header == 1

    memory.run(main())


def test_an_unknown_method_is_refused_with_the_known_ones(place: Place) -> None:
    async def main() -> None:
        async with place.linked({"echo": echo, "also": echo}) as link:
            with pytest.raises(InvalidRequest, match="no method 'nope' here, only also, echo"):
                await link.call("nope", None, timeout_s=10, on_lost=WRITE)

    place.run(main())


@pytest.mark.parametrize(
    ("on_lost", "error"), [(READ, Unavailable), (WRITE, Indeterminate)], ids=["read", "write"]
)
def test_a_timeout_means_what_the_caller_said_and_cancels_the_handler(
    place: Place, on_lost: Outcome, error: type[ShoalError]
) -> None:
    async def main() -> None:
        gate = Gate()
        async with place.linked({"gate": gate, "echo": echo}) as link:
            with pytest.raises(error, match="no reply to 'gate'") as caught:
                # Long enough for the handler to start on a busy machine.
                await link.call("gate", None, timeout_s=0.3, on_lost=on_lost)
            assert caught.value.outcome is on_lost
            assert await gate.ended == "cancelled"
            assert (await link.call("echo", 1, timeout_s=10, on_lost=READ)).header == 1

    place.run(main())


class StoppedClock:
    """A clock by which no deadline ever passes."""

    def monotonic_s(self) -> float:
        return 7.0

    def wall_ms(self) -> int:
        return 0

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("nothing sleeps here")


def test_each_side_ends_a_late_call_without_the_other(memory: Place) -> None:
    """With one side's clock stopped, the other's deadline alone must cancel the handler."""

    async def main() -> None:
        gate = Gate()
        async with memory.linked({"gate": gate}, clock=StoppedClock()) as link:
            with pytest.raises(Unavailable):
                await link.call("gate", None, timeout_s=0.05, on_lost=READ)
            assert await gate.ended == "cancelled"
        gate = Gate()
        async with memory.listening({"gate": gate}) as (_, address):
            link = await memory.connect(address, clock=StoppedClock())
            with pytest.raises(Unavailable, match="cancelled while it was served"):
                await link.call("gate", None, timeout_s=0.05, on_lost=READ)
            await link.close()

    memory.run(main())


def test_deadlines_fire_each_in_its_time(memory: Place) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def forever(request: Request) -> Reply:
            await asyncio.Event().wait()
            raise AssertionError

        async with memory.linked({"forever": forever}) as link:

            async def seconds(timeout_s: float) -> float:
                start = loop.time()
                with pytest.raises(Unavailable):
                    await link.call("forever", None, timeout_s=timeout_s, on_lost=READ)
                return loop.time() - start

            # The earliest last, so that the one timer of the link must be moved forward.
            took = await asyncio.gather(*map(seconds, (0.3, 0.2, 0.1)))
            assert took == pytest.approx([0.3, 0.2, 0.1], abs=0.002)

    memory.run(main())


def test_the_remaining_time_travels_with_the_request(place: Place) -> None:
    async def main() -> None:
        def left(request: Request) -> Reply:
            return Reply(request.deadline_monotonic_s - place.clock.monotonic_s())

        async with place.linked({"left": left}) as link:
            left_s = (await link.call("left", None, timeout_s=5, on_lost=READ)).header
            assert isinstance(left_s, float)
            assert 3 < left_s < 5.01

    place.run(main())


def test_a_cancelled_call_cancels_the_handler(place: Place) -> None:
    async def main() -> None:
        gate = Gate()
        async with place.linked({"gate": gate, "echo": echo}) as link:
            # Its deadline, which would cancel the handler too, is after the end of this test.
            call = asyncio.create_task(link.call("gate", None, timeout_s=60, on_lost=WRITE))
            await gate.started.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await gate.ended == "cancelled"
            assert link.in_flight == 0
            assert (await link.call("echo", 1, timeout_s=10, on_lost=READ)).header == 1

    place.run(main())


@pytest.mark.parametrize(
    ("on_lost", "error"), [(READ, Unavailable), (WRITE, Indeterminate)], ids=["read", "write"]
)
def test_a_handler_cancelled_by_its_own_side_means_what_a_lost_call_means(
    memory: Place, on_lost: Outcome, error: type[ShoalError]
) -> None:
    async def cancels_itself(request: Request) -> Reply:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        raise AssertionError

    async def main() -> None:
        async with memory.linked({"m": cancels_itself}) as link:
            with pytest.raises(error, match="'m' was cancelled while it was served") as caught:
                await link.call("m", None, timeout_s=10, on_lost=on_lost)
            assert caught.value.outcome is on_lost

    memory.run(main())


def test_handlers_run_as_far_as_possible_without_a_task(place: Place) -> None:
    async def main() -> None:
        test_task = asyncio.current_task()
        seen: list[object] = []

        def at_once(request: Request) -> Reply:
            seen.append(asyncio.current_task())
            return Reply("at once")

        def batched(request: Request) -> asyncio.Future[Reply]:
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, Reply("batched"))
            return future

        async with place.linked({"at_once": at_once, "batched": batched}) as link:
            for method, header in (("at_once", "at once"), ("batched", "batched")):
                reply = await link.call(method, None, timeout_s=10, on_lost=READ)
                assert reply.header == header
            assert seen == [None]
            assert asyncio.all_tasks() == {test_task}

    place.run(main())


def test_a_received_reply_can_be_forwarded(memory: Place) -> None:
    async def main() -> None:
        async with memory.linked({"echo": echo}) as behind:

            async def forward(request: Request) -> ReceivedReply:
                return await behind.call(
                    "echo", request.header, request.body, timeout_s=5, on_lost=READ
                )

            front = Place(
                network=memory.network,
                address=type(memory.address)("memory:front"),
                loop_factory=memory.loop_factory,
                clock=memory.clock,
            )
            async with front.linked({"forward": forward}) as link:
                reply = await link.call("forward", [1], b"body", timeout_s=5, on_lost=READ)
                assert reply == ([1], b"body")

    memory.run(main())


def test_calls_in_flight_are_bounded_on_both_sides(place: Place) -> None:
    async def main() -> None:
        released = asyncio.Event()
        starts = 0

        async def held(request: Request) -> Reply:
            nonlocal starts
            starts += 1
            await released.wait()
            return Reply()

        async with place.listening({"held": held}, in_flight_max=3) as (_, address):
            link = await place.connect(address, in_flight_max=5)
            calls = [
                asyncio.create_task(link.call("held", n, timeout_s=10, on_lost=WRITE))
                for n in range(6)
            ]
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            with pytest.raises(Overloaded) as caught:
                await calls[5]
            assert caught.value.limit == "5 calls"
            assert caught.value.outcome is Outcome.NOT_APPLIED
            for n in (3, 4):
                with pytest.raises(Overloaded, match="3 calls of this link are being served"):
                    await calls[n]
            released.set()
            await asyncio.gather(*calls[:3])
            assert starts == 3
            await link.close()

    place.run(main())


def test_requests_and_replies_over_the_frame_limit_are_refused_and_the_link_goes_on(
    place: Place,
) -> None:
    too_large = bytes(64 * 1024 * 1024)

    async def main() -> None:
        async with place.linked({"echo": echo, "large": lambda _: Reply(None, too_large)}) as link:
            with pytest.raises(InvalidRequest, match="request of 'echo' does not fit a frame") as e:
                await link.call("echo", None, too_large, timeout_s=10, on_lost=WRITE)
            assert (e.value.outcome, e.value.limit) == (Outcome.NOT_APPLIED, "67108864 bytes")
            with pytest.raises(InvalidRequest, match="reply of 'large' does not fit") as e:
                await link.call("large", None, timeout_s=10, on_lost=READ)
            assert e.value.outcome is Outcome.MAYBE_APPLIED
            assert (await link.call("echo", 1, timeout_s=10, on_lost=READ)).header == 1
            assert link.in_flight == 0

    place.run(main())


def test_a_header_that_cannot_be_packed_is_the_callers_bug_and_leaves_nothing_behind(
    memory: Place,
) -> None:
    async def main() -> None:
        async with memory.linked({"echo": echo}) as link:
            with pytest.raises(TypeError):
                await link.call("echo", object(), timeout_s=10, on_lost=READ)
            assert link.in_flight == 0
            assert (await link.call("echo", 1, timeout_s=10, on_lost=READ)).header == 1

    memory.run(main())


def test_ping_measures_the_round_trip(place: Place) -> None:
    async def main() -> None:
        async with place.linked({}) as link:
            assert 0 <= await link.ping(timeout_s=5) < 5
            assert link.in_flight == 0

    place.run(main())


def test_request_ids_start_over_and_skip_calls_in_flight(memory: Place) -> None:
    async def main() -> None:
        gate = Gate()
        async with memory.linked({"gate": gate, "echo": echo}) as link:
            first = asyncio.create_task(link.call("gate", "first", timeout_s=10, on_lost=READ))
            await gate.started.wait()
            link._last_id = 2**32 - 2
            for n in range(4):
                assert (await link.call("echo", n, timeout_s=10, on_lost=READ)).header == n
            assert link._last_id == 4
            gate.released.set()
            assert (await first).header == "first"

    memory.run(main())


def test_the_listener_knows_its_peer_by_name(place: Place) -> None:
    async def main() -> None:
        def peer(request: Request) -> Reply:
            return Reply(request.peer)

        async with place.listening({"peer": peer}) as (_, address):
            link = await place.connect(address, name="coordinator-1")
            name = (await link.call("peer", None, timeout_s=5, on_lost=READ)).header
            assert str(name).startswith("coordinator-1 at ")
            await link.close()

    place.run(main())
