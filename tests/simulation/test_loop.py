"""Virtual time, and what it means to be killed or frozen."""

import asyncio
from typing import Any

import pytest

from tests.simulation.loop import Process, SimulatedLoop, Stuck, run


def this_loop() -> SimulatedLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulatedLoop)
    return loop


async def tick(ticks: list[Any]) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            await asyncio.sleep(1)
            ticks.append(round(loop.time()))
    finally:
        ticks.append("ended")


def test_time_jumps_to_the_next_timer() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run(main(), limit_s=4000) == pytest.approx(3600, abs=0.01)


def test_frozen_process_goes_on_where_it_was() -> None:
    async def main() -> list[Any]:
        ticks: list[Any] = []
        process = Process(this_loop(), "p")
        process.spawn(tick(ticks))
        await asyncio.sleep(2.5)
        process.freeze()
        await asyncio.sleep(5)
        assert ticks == [1, 2]
        process.thaw()
        await asyncio.sleep(1.2)
        return list(ticks)

    assert run(main(), limit_s=100) == [1, 2, 8, 9]


def test_killed_process_runs_not_one_line_more() -> None:
    async def main() -> list[Any]:
        ticks: list[Any] = []
        process = Process(this_loop(), "p")
        process.spawn(tick(ticks))
        await asyncio.sleep(1.5)
        process.kill()
        await asyncio.sleep(5)
        return list(ticks)

    assert run(main(), limit_s=100) == [1]


def test_what_a_process_starts_belongs_to_it() -> None:
    async def main() -> list[Any]:
        ticks: list[Any] = []

        async def parent() -> None:
            await asyncio.gather(tick(ticks), tick(ticks))

        process = Process(this_loop(), "p")
        process.spawn(parent())
        await asyncio.sleep(1.5)
        process.kill()
        await asyncio.sleep(5)
        return list(ticks)

    assert run(main(), limit_s=100) == [1, 1]


def test_deadlock_is_noticed() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck, match="deadlock"):
        run(main(), limit_s=100)


def test_busy_loop_is_noticed() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match="busy loop"):
        run(main(), limit_s=100)


def test_waiting_for_ever_is_noticed() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(1)

    with pytest.raises(Stuck, match="virtual seconds"):
        run(main(), limit_s=100)


def test_bug_that_ends_a_task_is_noted() -> None:
    async def main() -> list[str]:
        async def bug() -> None:
            raise KeyError("oops")

        process = Process(this_loop(), "p")
        process.spawn(bug())
        await asyncio.sleep(1)
        return process.bugs

    assert "KeyError" in run(main(), limit_s=100)[0]
