"""FollowerFeed: what a primary keeps for followers that do not take it."""

import asyncio
from typing import Any

import pytest

from shoal_cluster.actors.feed import PUSH, WAKE, FollowerFeed
from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.domain.ids import CollectionId, ShardNumber, Slot
from shoal_cluster.domain.limits import PUSH_BYTES_MAX, PUSHES_MAX, WAL_RECORD_BYTES_MAX
from shoal_cluster.links.address import LinkAddress

FAST, STUCK = LinkAddress("tcp://fast"), LinkAddress("tcp://stuck")


class StuckPool:
    """Takes calls and answers those to STUCK only once `release` is set."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.calls: list[tuple[LinkAddress, str, int]] = []
        self.error: Unavailable | None = None

    async def call(
        self, address: LinkAddress, method: str, header: object, body: bytes, **_: Any
    ) -> None:
        self.calls.append((address, method, len(body)))
        if address == STUCK:
            await self.release.wait()
            if self.error is not None:
                raise self.error


def feed_of(pool: StuckPool) -> FollowerFeed:
    feed = FollowerFeed(pool, CollectionId("c" * 32), ShardNumber(0))  # type: ignore[arg-type]
    feed.addresses = (FAST, STUCK)
    return feed


async def pushed(feed: FollowerFeed, count: int, size_bytes: int) -> None:
    for number in range(count):
        feed.record(Slot(number + 1), b"x" * size_bytes)
        for _ in range(3):
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("size_bytes", "kept"), [(1, PUSHES_MAX), (WAL_RECORD_BYTES_MAX, 4), (10 << 20, 3)]
)
def test_a_stuck_follower_holds_so_many_records_and_so_many_bytes(size_bytes: int, kept: int):
    async def scenario() -> None:
        pool = StuckPool()
        feed = feed_of(pool)
        await pushed(feed, PUSHES_MAX + 5, size_bytes)
        to_stuck = [size for address, _, size in pool.calls if address == STUCK]
        assert len(to_stuck) == kept
        assert sum(to_stuck) <= PUSH_BYTES_MAX
        assert sum(address == FAST for address, _, _ in pool.calls) == PUSHES_MAX + 5
        pool.release.set()

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [None, Unavailable("gone")])
def test_pushes_go_on_once_the_follower_answered_or_was_given_up(error: Unavailable | None):
    async def scenario() -> None:
        pool = StuckPool()
        pool.error = error
        feed = feed_of(pool)
        await pushed(feed, 10, WAL_RECORD_BYTES_MAX)
        pool.release.set()
        await pushed(feed, 1, 0)
        pool.calls.clear()
        feed.record(Slot(11), b"x" * WAL_RECORD_BYTES_MAX)
        feed.manifest()
        await asyncio.sleep(0)
        assert [method for address, method, _ in pool.calls if address == STUCK] == [PUSH, WAKE]

    asyncio.run(scenario())
