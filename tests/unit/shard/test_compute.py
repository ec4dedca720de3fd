"""Work in threads: results and errors come back to the loop, and cancelling costs nobody else."""

import asyncio
import threading

import pytest

from shoal_cluster.shard.compute import ThreadCompute


def test_results_and_errors_come_back() -> None:
    async def main() -> None:
        compute = ThreadCompute(2)
        assert await asyncio.gather(*(compute.run(lambda n=n: n * n) for n in range(50))) == [
            n * n for n in range(50)
        ]
        with pytest.raises(ZeroDivisionError):
            await compute.run(lambda: 1 // 0)
        assert await compute.run(threading.get_ident) != threading.get_ident()
        compute.close()

    asyncio.run(main())


def test_a_cancelled_caller_leaves_the_threads_working() -> None:
    async def main() -> None:
        compute = ThreadCompute(1)
        held, started = threading.Event(), threading.Event()

        def hold() -> None:
            started.set()
            held.wait(10)

        first = asyncio.ensure_future(compute.run(hold))
        ran: list[int] = []
        second = asyncio.ensure_future(compute.run(lambda: ran.append(1)))
        await asyncio.to_thread(started.wait, 10)
        first.cancel()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        held.set()
        assert await compute.run(lambda: "on") == "on"
        assert ran == []
        compute.close()

    asyncio.run(main())
