"""What a call costs: Python function calls, receives per loop turn, timers."""

import asyncio
import sys
from collections import Counter
from types import FrameType

import pytest

from shoal_cluster.domain.errors import Outcome
from shoal_cluster.links.accepted import AcceptedLink
from shoal_cluster.links.connection import Link
from shoal_cluster.links.messages import Reply, Request
from tests.unit.links.places import Place, make_place

READ = Outcome.NOT_APPLIED
PYTHON_CALLS_MAX = 22
"""Of both sides together, in our packages: some 10 µs of the 25 µs that a call takes on uvloop."""


def echo(request: Request) -> Reply:
    return Reply(None, request.body)


@pytest.fixture
def place(directory: object) -> Place:
    return make_place("unix-uvloop", directory)  # type: ignore[arg-type]


async def call(link: Link) -> None:
    await link.call("echo", None, bytes(3072), timeout_s=5, on_lost=READ)


def test_a_call_makes_few_python_calls(place: Place) -> None:
    made: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("shoal_"):
            made[f"{module}.{frame.f_code.co_qualname}"] += 1

    async def main() -> None:
        async with place.linked({"echo": echo}) as link:
            await call(link)
            sys.setprofile(count)
            try:
                await call(link)
            finally:
                sys.setprofile(None)

    place.run(main())
    assert 0 < made.total() <= PYTHON_CALLS_MAX, made


def test_calls_of_one_loop_turn_travel_together(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop gathers the writes of a loop turn, so links need not."""
    receives: list[int] = []
    receive = AcceptedLink.data_received

    def counted(self: AcceptedLink, data: bytes) -> None:
        receives.append(len(data))
        receive(self, data)

    async def main() -> None:
        monkeypatch.setattr(AcceptedLink, "data_received", counted)
        async with place.linked({"echo": echo}) as link:
            await call(link)
            receives.clear()
            await asyncio.gather(*(call(link) for _ in range(32)))

    place.run(main())
    assert sum(receives) > 32 * 3072
    assert len(receives) <= 4


def test_calls_share_one_timer(place: Place) -> None:
    async def main() -> None:
        async with place.linked({"echo": echo}) as link:
            await call(link)
            loop = asyncio.get_running_loop()
            timer = link._deadlines._timer
            for _ in range(100):
                await call(link)
            assert link._deadlines._timer is timer
            assert timer is not None
            assert timer.when() > loop.time()

    place.run(main())
