"""Peers that are not ours: wrong secret, other version, garbage, silence, refusal to read."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal_cluster.domain.errors import (
    Conflict,
    Internal,
    InvalidRequest,
    Outcome,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from shoal_cluster.links import accepted
from shoal_cluster.links.address import LinkAddress, parse_address, tcp_endpoint, unix_path
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.messages import Reply, Request
from shoal_protos import handshake
from shoal_protos.frames import Frame, FrameDecoder, FrameType, encode_frame
from tests.unit.links.places import SECRET, Place, make_place

READ = Outcome.NOT_APPLIED


def never(request: Request) -> Reply:
    raise AssertionError("a stranger reached a handler")


def echo(request: Request) -> Reply:
    return Reply(request.header, request.body)


@contextlib.asynccontextmanager
async def raw(
    address: LinkAddress,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that speaks whatever the test writes."""
    path, endpoint = unix_path(address), tcp_endpoint(address)
    if path is not None:
        reader, writer = await asyncio.open_unix_connection(path)
    else:
        assert endpoint is not None
        reader, writer = await asyncio.open_connection(*endpoint)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def all_bytes(reader: asyncio.StreamReader) -> bytes:
    """Everything until the listener closes; a reset is a way to close."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65536):
            received += chunk
    return received


def frame_bytes(frame_type: FrameType, request_id: int = 0, header: object = None) -> bytes:
    return b"".join(encode_frame(frame_type, request_id, header))


async def authenticated(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Does the caller's part of the handshake by hand, and so pins it down."""
    writer.write(frame_bytes(FrameType.HELLO, 0, ["shoal-link", 1, b"n" * 32, "by hand"]))
    decoder = FrameDecoder()

    async def receive() -> Frame:
        while not (frames := decoder.feed(await reader.read(4096))):
            pass
        return frames[0]

    challenge = await receive()
    assert challenge.type is FrameType.HELLO
    assert isinstance(challenge.header, list)
    nonce = challenge.header[1]
    proof = handshake.proof(SECRET, "caller", "by hand", b"n" * 32, nonce)
    writer.write(frame_bytes(FrameType.HELLO, 0, proof))
    welcome = await receive()
    assert welcome.type is FrameType.WELCOME
    assert welcome.header == handshake.proof(SECRET, "listener", "by hand", b"n" * 32, nonce)


def test_a_caller_with_another_secret_is_unauthenticated(place: Place) -> None:
    async def main() -> None:
        async with place.listening({"never": never}) as (_, address):
            with pytest.raises(Unauthenticated, match="does not know the link secret"):
                await place.connect(address, secret=b"another secret, as long")
            link = await place.connect(address)
            await link.close()

    place.run(main())


def test_a_listener_that_cannot_prove_itself_is_unauthenticated(place: Place) -> None:
    """An impostor on the address knows the protocol, not the secret, and welcomes everybody."""

    class Impostor(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            self.decoder = FrameDecoder()
            self.replies = iter(
                [
                    frame_bytes(FrameType.HELLO, 0, [1, b"x" * 32]),
                    frame_bytes(FrameType.WELCOME, 0, b"y" * 32),
                ]
            )

        def data_received(self, data: bytes) -> None:
            for _ in self.decoder.feed(data):
                self.transport.write(next(self.replies))  # type: ignore[attr-defined]

    async def main() -> None:
        served = await place.network.serve(place.address, Impostor)
        with pytest.raises(Unauthenticated, match="the listener does not know the link secret"):
            await place.connect(served.address)
        served.stop()

    place.run(main())


def test_a_listener_of_another_version_is_named_too() -> None:
    caller = handshake.CallerHandshake(SECRET, name="n", nonce=b"a" * 32)
    with pytest.raises(handshake.HandshakeRefused, match="the caller speaks 1, the listener 2"):
        caller.receive(Frame(FrameType.HELLO, 0, [2, b"b" * 32], memoryview(b"")))


@pytest.mark.parametrize("header", [None, 7, {}, {"kind": "conflict", "outcome": "perhaps"}])
def test_an_error_that_cannot_be_read_is_still_an_error(memory: Place, header: object) -> None:
    class Refuser(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.write(frame_bytes(FrameType.ERROR, 0, header))  # type: ignore[attr-defined]

    async def main() -> None:
        await memory.network.serve(memory.address, Refuser)
        with pytest.raises(Internal):
            await memory.connect(memory.address)

    memory.run(main())


def test_the_secret_and_its_proof_cannot_be_replayed_or_reflected() -> None:
    caller = handshake.proof(SECRET, "caller", "n", b"a" * 32, b"b" * 32)
    assert caller != handshake.proof(SECRET, "listener", "n", b"a" * 32, b"b" * 32)
    assert caller != handshake.proof(SECRET, "caller", "n", b"a" * 32, b"c" * 32)
    assert caller != handshake.proof(SECRET, "caller", "m", b"a" * 32, b"b" * 32)
    assert SECRET not in caller


def test_a_short_secret_is_refused_on_both_sides(memory: Place) -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest, match="link secret has 5 bytes"):
            Listener({}, shared_secret(b"short"))
        with pytest.raises(InvalidRequest, match="link secret has 5 bytes"):
            await memory.connect(memory.address, secret=b"short")

    memory.run(main())


def test_another_protocol_version_is_named_on_both_sides(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with place.listening({"never": never}) as (_, address):
            hello = handshake.CallerHandshake.hello
            monkeypatch.setattr(
                handshake.CallerHandshake,
                "hello",
                lambda self: ["shoal-link", 9, *hello(self)[2:], "a field of version 9"],
            )
            with pytest.raises(Conflict) as caught:
                await place.connect(address)
            assert caught.value.message == (
                "link protocol versions differ: the caller speaks 9, the listener 1; "
                "upgrade the older side"
            )

    place.run(main())


def test_strangers_get_no_answer_to_calls_and_no_reason(sockets: Place) -> None:
    async def main() -> None:
        async with sockets.listening({"never": never}) as (_, address):
            for first in (
                frame_bytes(FrameType.REQUEST, 1, ["never", 1000, None]),
                frame_bytes(FrameType.PING, 1),
                frame_bytes(FrameType.HELLO, 0, ["shoal-link", 1, b"short nonce", "x"]),
                frame_bytes(FrameType.HELLO, 0, ["other", 7, b"n" * 32, "x"]),
                frame_bytes(FrameType.HELLO, 0, {"a": 1}),
                b"GET / HTTP/1.1\r\nHost: shoal\r\n\r\n",
            ):
                async with raw(address) as (reader, writer):
                    writer.write(first)
                    assert await all_bytes(reader) == b""
            # Without the right proof there is no WELCOME, only the refusal.
            async with raw(address) as (reader, writer):
                writer.write(frame_bytes(FrameType.HELLO, 0, ["shoal-link", 1, b"n" * 32, "x"]))
                await reader.readexactly(len(frame_bytes(FrameType.HELLO, 0, [1, b"n" * 32])))
                writer.write(frame_bytes(FrameType.HELLO, 0, b"p" * 32))
                (refusal,) = FrameDecoder().feed(await all_bytes(reader))
                assert refusal.type is FrameType.ERROR
            # Nor is anything served between the two HELLOs.
            async with raw(address) as (reader, writer):
                hello = frame_bytes(FrameType.HELLO, 0, ["shoal-link", 1, b"n" * 32, "x"])
                call = frame_bytes(FrameType.REQUEST, 1, ["never", 1000, None])
                writer.write(hello + call)
                (frame,) = FrameDecoder().feed(await all_bytes(reader))
                assert frame.type is FrameType.HELLO
            link = await sockets.connect(address)
            await link.close()

    sockets.run(main())


def test_a_stranger_is_closed_without_a_word_after_a_kilobyte(sockets: Place) -> None:
    """Each frame is short enough and in its place; only their sum is too much."""

    async def main() -> None:
        async with sockets.listening({}) as (_, address), raw(address) as (reader, writer):
            writer.write(frame_bytes(FrameType.HELLO, 0, ["shoal-link", 1, b"n" * 32, "x" * 64]))
            await reader.readexactly(len(frame_bytes(FrameType.HELLO, 0, [1, b"n" * 32])))
            writer.write(frame_bytes(FrameType.HELLO, 0, bytes(950)))
            assert await all_bytes(reader) == b""

    sockets.run(main())


def test_a_strangers_frame_over_a_kilobyte_is_not_awaited(sockets: Place) -> None:
    async def main() -> None:
        async with sockets.listening({}) as (_, address), raw(address) as (reader, writer):
            writer.write(struct.pack("<IBII", 1021, FrameType.HELLO, 0, 1000))
            assert await all_bytes(reader) == b""

    sockets.run(main())


def test_a_silent_stranger_is_closed_in_time(sockets: Place) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with sockets.listening({}, handshake_s=0.1) as (_, address):
            async with raw(address) as (reader, _writer):
                start = loop.time()
                assert await all_bytes(reader) == b""
                assert 0.05 < loop.time() - start < 2
            link = await sockets.connect(address)
            await asyncio.wait([link.closed], timeout=0.25)
            assert not link.closed.done()
            await link.close()

    sockets.run(main())


def test_links_are_bounded(sockets: Place) -> None:
    async def main() -> None:
        async with sockets.listening({"echo": echo}, connections_max=2) as (listener, address):
            links = [await sockets.connect(address) for _ in range(2)]
            with pytest.raises(Unavailable, match="cannot link to"):
                await sockets.connect(address)
            await links.pop().close()
            while listener.links_open == 2:
                await asyncio.sleep(0)
            links.append(await sockets.connect(address))
            for link in links:
                await link.close()

    sockets.run(main())


@pytest.mark.parametrize(
    "wrong",
    [
        frame_bytes(FrameType.REQUEST, 1, ["echo", -1, None]),
        frame_bytes(FrameType.REQUEST, 1, ["echo", 1000]),
        frame_bytes(FrameType.REQUEST, 1, 7),
        frame_bytes(FrameType.REPLY, 1),
        frame_bytes(FrameType.HELLO, 1),
        struct.pack("<IBII", 2**32 - 1, FrameType.REQUEST, 1, 10),
        struct.pack("<IBII", 64 * 1024 * 1024 - 3, FrameType.REQUEST, 1, 10),
        struct.pack("<IBII", 9 + 1, FrameType.REQUEST, 1, 1) + b"\xc1",
        2 * frame_bytes(FrameType.REQUEST, 1, ["wait", 1000, None]),
    ],
)
def test_a_peer_that_breaks_the_protocol_loses_its_link_only(memory: Place, wrong: bytes) -> None:
    async def main() -> None:
        async def wait(request: Request) -> Reply:
            await asyncio.Event().wait()
            raise AssertionError

        async with memory.listening({"echo": echo, "wait": wait}) as (listener, address):
            bystander = await memory.connect(address)
            link = await memory.connect(address)
            link._transport.write(wrong)  # type: ignore[union-attr]
            assert await link.closed == "the listener closed it"
            reply = await bystander.call("echo", "fine", timeout_s=5, on_lost=READ)
            assert reply.header == "fine"
            assert listener.links_open == 1
            await bystander.close()

    memory.run(main())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    garbage=st.lists(
        st.binary(max_size=64)
        | st.builds(
            lambda kind, request_id, header, body: (
                struct.pack("<IBII", 9 + len(header) + len(body), kind, request_id, len(header))
                + header
                + body
            ),
            st.integers(0, 10),
            st.integers(0, 3),
            st.binary(max_size=12),
            st.binary(max_size=12),
        ),
        max_size=6,
    ),
    known=st.booleans(),
)
def test_garbage_never_harms_the_listener(
    directory: Path, garbage: list[bytes], known: bool
) -> None:
    """Before and after authentication: the link may end, the listener and others go on."""
    place = make_place("unix-uvloop", directory)
    broken: list[dict] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: broken.append(context))
        async with place.listening({"echo": echo}) as (_, address):
            async with raw(address) as (reader, writer):
                if known:
                    await authenticated(reader, writer)
                for part in garbage:
                    writer.write(part)
                with contextlib.suppress(OSError):
                    writer.write_eof()
                await all_bytes(reader)
            link = await place.connect(address)
            assert (await link.call("echo", 1, timeout_s=5, on_lost=READ)).header == 1
            await link.close()

    place.run(main())
    assert broken == []


@settings(max_examples=60, deadline=None)
@given(garbage=st.binary(min_size=1, max_size=80), welcomed=st.booleans())
def test_garbage_from_a_listener_never_harms_the_caller(garbage: bytes, welcomed: bool) -> None:
    place = make_place("memory", Path("unused"))
    broken: list[dict] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: broken.append(context))
        if welcomed:
            async with place.listening({"say": lambda _: Reply()}) as (listener, address):
                link = await place.connect(address)
                (far,) = listener._links
                far._transport.write(garbage)
                far._transport.close()
                await link.closed
        else:

            class Garbler(asyncio.Protocol):
                def connection_made(self, transport: asyncio.BaseTransport) -> None:
                    transport.write(garbage)  # type: ignore[attr-defined]
                    transport.close()

            await place.network.serve(place.address, Garbler)
            with pytest.raises(Unavailable):
                await place.connect(place.address)

    place.run(main())
    assert broken == []


def test_a_peer_that_does_not_read_costs_bounded_memory(sockets: Place) -> None:
    """400 requests of 64 KiB, each answered with 1 MiB, from a caller that does not read.

    Few are served at first, few are taken in, and when the caller reads again none is lost.
    """

    async def main() -> None:
        served = 0

        def large(request: Request) -> Reply:
            nonlocal served
            served += 1
            return Reply(request.header, bytes(1024 * 1024))

        async with sockets.listening({"large": large}) as (listener, address):
            link = await sockets.connect(address)
            transport = link._transport
            assert transport is not None
            transport.pause_reading()
            calls = [
                asyncio.create_task(link.call("large", n, bytes(65536), timeout_s=15, on_lost=READ))
                for n in range(400)
            ]
            # The link is authenticated and healthy otherwise: another one is served meanwhile.
            other = await sockets.connect(address)
            for _ in range(20):
                await other.call("large", None, timeout_s=10, on_lost=READ)
            (far,) = (known for known in listener._links if known._paused)
            unsent = far._transport.get_write_buffer_size()
            # A Unix socket holds 0.2 MiB on the way, TCP over loopback some 10 MiB.
            assert served - 20 <= 20
            assert unsent <= 3 * 1024 * 1024
            assert sum(len(body) for _, _, body in far._held.values()) <= 512 * 1024
            transport.resume_reading()
            replies = await asyncio.gather(*calls)
            assert [reply.header for reply in replies] == list(range(400))
            await link.close()
            await other.close()

    sockets.run(main())


def test_handlers_that_already_run_for_a_peer_that_does_not_read_are_bounded_too(
    memory: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted, "UNSENT_BYTES_MAX", 8 * 1024 * 1024)

    async def main() -> None:
        released = asyncio.Event()

        async def answer(request: Request) -> Reply:
            await released.wait()
            size = 10 if request.header == "small" else 1024 * 1024
            return Reply(request.header, bytes(size))

        async with memory.listening({"answer": answer}) as (listener, address):
            link = await memory.connect(address)
            transport = link._transport
            assert transport is not None
            headers = ["large"] * 20 + ["small"] * 20
            calls = [
                asyncio.create_task(link.call("answer", header, timeout_s=10, on_lost=READ))
                for header in headers
            ]
            (far,) = listener._links
            while len(far._running) < 40:
                await asyncio.sleep(0)
            transport.pause_reading()
            released.set()
            while far._running:
                await asyncio.sleep(0)
            assert far._transport.get_write_buffer_size() <= 9 * 1024 * 1024
            transport.resume_reading()
            results = await asyncio.gather(*calls, return_exceptions=True)
            refused = [result for result in results if isinstance(result, Overloaded)]
            assert 11 <= len(refused) <= 13
            assert {error.outcome for error in refused} == {Outcome.MAYBE_APPLIED}
            assert all(not isinstance(result, Exception) for result in results[20:])
            await link.close()

    memory.run(main())


def test_requests_held_for_a_slow_reader_are_dropped_when_their_time_is_over(
    memory: Place,
) -> None:
    async def main() -> None:
        served: list[object] = []

        def large(request: Request) -> Reply:
            served.append(request.header)
            return Reply(None, bytes(2 * 1024 * 1024))

        async with memory.linked({"large": large}) as link:
            transport = link._transport
            assert transport is not None
            transport.pause_reading()
            first = asyncio.create_task(link.call("large", 1, timeout_s=10, on_lost=READ))
            late = asyncio.create_task(link.call("large", 2, timeout_s=0.05, on_lost=READ))
            await asyncio.sleep(0)
            # A call and its CANCEL in one chunk.
            transport.write(
                frame_bytes(FrameType.REQUEST, 99, ["large", 9000, 3])
                + frame_bytes(FrameType.CANCEL, 99)
            )
            with pytest.raises(Unavailable):
                await late
            # The listener's deadline is up to a millisecond later than the caller's.
            await asyncio.sleep(0.01)
            transport.resume_reading()
            await first
            assert (await link.call("large", 4, timeout_s=10, on_lost=READ)).header is None
            assert served == [1, 4]

    memory.run(main())


def test_an_address_in_use_is_a_conflict_and_stays_with_its_owner(place: Place) -> None:
    async def main() -> None:
        async with place.listening({"echo": echo}) as (_, address):
            second = Listener({}, shared_secret(SECRET), network=place.network)
            with pytest.raises(Conflict, match="the address is in use"):
                await second.listen(address)
            link = await place.connect(address)
            assert (await link.call("echo", 1, timeout_s=5, on_lost=READ)).header == 1
            await link.close()

    place.run(main())


def test_a_socket_file_left_by_a_killed_process_is_taken_over(directory: Path) -> None:
    place = make_place("unix-uvloop", directory)
    path = directory / "a.sock"

    async def main() -> None:
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(path))
        left.close()
        async with place.listening({"echo": echo}) as (_, address):
            assert path.stat().st_mode & 0o777 == 0o600
            link = await place.connect(address)
            await link.close()
        assert not path.exists()

    place.run(main())


def test_a_file_that_is_no_socket_is_not_replaced(directory: Path) -> None:
    place = make_place("unix-uvloop", directory)
    (directory / "a.sock").write_text("precious")

    async def main() -> None:
        with pytest.raises(Conflict):
            await Listener({}, shared_secret(SECRET)).listen(place.address)

    place.run(main())
    assert (directory / "a.sock").read_text() == "precious"


def test_an_address_that_cannot_be_listened_at_is_refused(directory: Path) -> None:
    place = make_place("unix-uvloop", directory)

    async def main() -> None:
        for text in (f"unix:{directory}/absent/a.sock", "tcp:203.0.113.7:1", "memory:a"):
            with pytest.raises(InvalidRequest) as caught:
                await Listener({}, shared_secret(SECRET)).listen(parse_address(text))
            assert caught.value.field == "link_address"

    place.run(main())
