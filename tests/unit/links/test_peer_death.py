"""A real process, killed with SIGKILL or stopped: the link tells within milliseconds."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from shoal_cluster.domain.errors import Indeterminate, Outcome, Unavailable
from shoal_cluster.links.address import LinkAddress, parse_address
from shoal_cluster.links.connection import Link, connect
from shoal_cluster.links.pool import LinkPool
from tests.unit.links.echo_process import SECRET
from tests.unit.links.places import run_on

ROOT = Path(__file__).parents[3]
SOURCES = os.pathsep.join(str(ROOT / part) for part in ("cluster", "protos", "client"))


@contextlib.contextmanager
def listening_process(address: str) -> Iterator[tuple[subprocess.Popen[str], LinkAddress]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.links.echo_process", address],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": SOURCES},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, parse_address(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.fixture(params=["unix", "tcp"])
def text(request: pytest.FixtureRequest, directory: Path) -> str:
    return f"unix:{directory}/a.sock" if request.param == "unix" else "tcp:127.0.0.1:0"


def test_calls_fail_within_100_ms_of_a_sigkill(text: str) -> None:
    async def main(process: subprocess.Popen[str], address: LinkAddress) -> float:
        loop = asyncio.get_running_loop()
        link = await connect(address, SECRET)
        reads = [link.call("hang", n, timeout_s=20, on_lost=Outcome.NOT_APPLIED) for n in range(50)]
        writes = [
            link.call("hang", n, timeout_s=20, on_lost=Outcome.MAYBE_APPLIED) for n in range(50)
        ]
        calls = asyncio.gather(*reads, *writes, return_exceptions=True)
        assert await link.ping(timeout_s=5) < 5
        start = loop.time()
        process.send_signal(signal.SIGKILL)
        results = await calls
        took_s = loop.time() - start
        assert [type(result) for result in results] == [Unavailable] * 50 + [Indeterminate] * 50
        assert link.closed.done()
        await link.close()
        return took_s

    with listening_process(text) as (process, address):
        took_s = run_on(uvloop.new_event_loop, main(process, address))
    assert took_s < 0.1


def test_a_stopped_process_fails_pings_while_its_link_stays_open(text: str) -> None:
    """SIGSTOP closes nothing: only the heartbeat can tell. After SIGCONT the link still works."""

    async def main(process: subprocess.Popen[str], address: LinkAddress) -> None:
        link = await connect(address, SECRET)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(Unavailable, match="no reply to 'ping'"):
            await link.ping(timeout_s=0.1)
        assert not link.closed.done()
        process.send_signal(signal.SIGCONT)
        reply = await link.call("pid", None, timeout_s=5, on_lost=Outcome.NOT_APPLIED)
        assert reply.header == process.pid
        await link.close()

    with listening_process(text) as (process, address):
        run_on(uvloop.new_event_loop, main(process, address))


def test_a_pool_reaches_the_successor_of_a_killed_process(directory: Path) -> None:
    text = f"unix:{directory}/a.sock"

    async def pid(pool: LinkPool, address: LinkAddress) -> object:
        reply = await pool.call(address, "pid", None, timeout_s=5, on_lost=Outcome.NOT_APPLIED)
        return reply.header

    async def main() -> None:
        async def open_link(address: LinkAddress) -> Link:
            return await connect(address, SECRET)

        lost: asyncio.Queue[tuple[LinkAddress, str]] = asyncio.Queue()
        pool = LinkPool(open_link)
        pool.when_lost(lambda address, reason: lost.put_nowait((address, reason)))
        with listening_process(text) as (process, address):
            assert await pid(pool, address) == process.pid
            process.kill()
            assert await asyncio.wait_for(lost.get(), 5) == (address, "the listener closed it")
            with pytest.raises(Unavailable):
                await pid(pool, address)
        with listening_process(text) as (process, address):
            # At most the backoff after the one failure.
            deadline = asyncio.get_running_loop().time() + 5
            while True:
                try:
                    assert await pid(pool, address) == process.pid
                    break
                except Unavailable as error:
                    assert asyncio.get_running_loop().time() < deadline
                    assert error.retry_after_ms is not None
                    await asyncio.sleep(error.retry_after_ms / 1000)
        await pool.close_all()

    run_on(uvloop.new_event_loop, main())
