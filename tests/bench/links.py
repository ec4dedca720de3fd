"""Measures a 3 KiB call over links, against a raw echo of as many bytes in the same run.

    python -m tests.bench.links [--seconds 1.0] [--json build/bench-links.json]

Servers are processes of their own, all on uvloop. The raw echo is the least Python can do: an
asyncio protocol that sends back what it receives, and a caller that counts bytes. On a busy machine
only the ratios mean something. Rounds of the two alternate, so both meet the same disturbance.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from shoal_cluster.domain.errors import Outcome
from shoal_cluster.links.address import LinkAddress, parse_address, tcp_endpoint, unix_path
from shoal_cluster.links.connection import Link, connect
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.messages import Reply, Request

SECRET = b"a secret for the bench, 32 bytes"
BODY = bytes(3072)
FAN_OUT = 4
ROUNDS = 5

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    transport: str
    shape: str
    p50_us: float
    p99_us: float
    calls_per_s: float
    raw_p50_us: float
    raw_p99_us: float
    p50_ratio: float
    """Link p50 over raw echo p50; for the fan-out, over one raw echo to each at once."""


# -- the serving process


class RawEcho(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)  # type: ignore[attr-defined]


def echo(request: Request) -> Reply:
    return Reply(None, request.body)


async def echo_in_task(request: Request) -> Reply:
    return Reply(None, request.body)


async def serve(address: LinkAddress) -> None:
    """Serves links at the address, and the raw echo beside it, until killed."""
    loop = asyncio.get_running_loop()
    path = unix_path(address)
    # `server` is kept to the end: one that nobody holds is closed when it is collected.
    if path is not None:
        server = await loop.create_unix_server(RawEcho, path + ".raw")
        raw = f"unix:{path}.raw"
    else:
        server = await loop.create_server(RawEcho, "127.0.0.1", 0)
        raw = f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
    listener = Listener({"echo": echo, "echo_in_task": echo_in_task}, shared_secret(SECRET))
    print(await listener.listen(address), raw, flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def serving(addresses: list[str]) -> Iterator[list[tuple[LinkAddress, LinkAddress]]]:
    """Yields link and raw address of one serving process per address."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.links", "--serve", address],
            stdout=subprocess.PIPE,
            text=True,
        )
        for address in addresses
    ]
    try:
        pairs = []
        for process in processes:
            assert process.stdout is not None
            link, raw = process.stdout.readline().split()
            pairs.append((parse_address(link), parse_address(raw)))
        yield pairs
    finally:
        for process in processes:
            process.kill()
            process.wait(10)


# -- the calling process


class RawCaller(asyncio.Protocol):
    """Replies come in the order of the requests and have their size."""

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    async def call(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        self.transport.write(BODY)  # type: ignore[attr-defined]
        await future

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        while self.received >= len(BODY):
            self.received -= len(BODY)
            self.waiting.popleft().set_result(None)


async def open_raw(address: LinkAddress) -> RawCaller:
    loop = asyncio.get_running_loop()
    path, endpoint = unix_path(address), tcp_endpoint(address)
    if path is not None:
        return (await loop.create_unix_connection(RawCaller, path))[1]
    assert endpoint is not None
    return (await loop.create_connection(RawCaller, *endpoint))[1]


def link_call(link: Link, method: str = "echo") -> Call:
    async def call() -> object:
        return await link.call(method, None, BODY, timeout_s=10, on_lost=Outcome.NOT_APPLIED)

    return call


def at_once(calls: list[Call]) -> Call:
    async def call() -> object:
        return await asyncio.gather(*(one() for one in calls))

    return call


async def timed(call: Call, concurrency: int, seconds: float) -> tuple[list[float], float]:
    """Returns seconds of each call and calls per second, by that many tasks at once."""
    latencies: list[float] = []
    start = time.perf_counter()
    end = start + seconds

    async def loop() -> None:
        while (before := time.perf_counter()) < end:
            await call()
            latencies.append(time.perf_counter() - before)

    await asyncio.gather(*(loop() for _ in range(concurrency)))
    return latencies, len(latencies) / (time.perf_counter() - start)


def percentile_us(latencies: list[float], share: float) -> float:
    return sorted(latencies)[min(int(len(latencies) * share), len(latencies) - 1)] * 1e6


async def compare(
    transport: str, shape: str, call: Call, raw: Call, concurrency: int, seconds: float
) -> Figure:
    link_s: list[float] = []
    raw_s: list[float] = []
    rates: list[float] = []
    for _ in range(ROUNDS):
        raw_s += (await timed(raw, concurrency, seconds / ROUNDS))[0]
        latencies, rate = await timed(call, concurrency, seconds / ROUNDS)
        link_s += latencies
        rates.append(rate)
    p50, raw_p50 = percentile_us(link_s, 0.5), percentile_us(raw_s, 0.5)
    return Figure(
        transport=transport,
        shape=shape,
        p50_us=round(p50, 1),
        p99_us=round(percentile_us(link_s, 0.99), 1),
        calls_per_s=round(sorted(rates)[ROUNDS // 2]),
        raw_p50_us=round(raw_p50, 1),
        raw_p99_us=round(percentile_us(raw_s, 0.99), 1),
        p50_ratio=round(p50 / raw_p50, 2),
    )


async def measure(
    transport: str, pairs: list[tuple[LinkAddress, LinkAddress]], seconds: float
) -> list[Figure]:
    links = [await connect(address, SECRET) for address, _ in pairs]
    raws = [await open_raw(address) for _, address in pairs]
    one, raw_one = link_call(links[0]), raws[0].call
    figures = [
        await compare(transport, "1 at once", one, raw_one, 1, seconds),
        await compare(
            transport, "1, handler a task", link_call(links[0], "echo_in_task"), raw_one, 1, seconds
        ),
        await compare(transport, "32 at once", one, raw_one, 32, seconds),
        await compare(
            transport,
            f"fan-out to {FAN_OUT}",
            at_once([link_call(link) for link in links]),
            at_once([raw.call for raw in raws]),
            1,
            seconds,
        ),
    ]
    for link in links:
        await link.close()
    for raw in raws:
        raw.transport.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--serve", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure and side")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(parse_address(options.serve)))
        return
    figures: list[Figure] = []
    print(f"{len(BODY)} bytes there and back, µs; load average {os.getloadavg()[0]:.1f}")
    print(
        f"{'':6}{'':19}{'p50':>8}{'p99':>9}{'calls/s':>9}{'raw p50':>9}{'raw p99':>9}{'ratio':>7}"
    )
    with tempfile.TemporaryDirectory(prefix="shoal-") as directory:
        for transport in ("unix", "tcp"):
            addresses = [
                f"unix:{directory}/{n}.sock" if transport == "unix" else "tcp:127.0.0.1:0"
                for n in range(FAN_OUT)
            ]
            with serving(addresses) as pairs:
                for figure in uvloop.run(measure(transport, pairs, options.seconds)):
                    figures.append(figure)
                    print(
                        f"{figure.transport:6}{figure.shape:19}{figure.p50_us:8.1f}"
                        f"{figure.p99_us:9.1f}{figure.calls_per_s:9.0f}{figure.raw_p50_us:9.1f}"
                        f"{figure.raw_p99_us:9.1f}{figure.p50_ratio:7.2f}"
                    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1))


if __name__ == "__main__":
    main()
