"""Merges what shards give page by page into one order, without asking for more than is needed.

Invariant Q-4: an entry is released only when no shard can still give one that comes before it.
"""

import bisect
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.limits import GATHERED_BYTES_MAX, SHARD_PAGE_BYTES_MAX
from shoal_cluster.domain.point import Tail, Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedPage:
    """A shard's next rows, parallel. order: what they are sorted by, ascending, ending in the id.

    places: what a shard is told to continue behind each. more: the shard has rows behind these;
    then the page is not empty.
    """

    order: Sequence[Any]
    places: Sequence[Any]
    ids: Sequence[bytes]
    seqs: Sequence[int]
    tails: Sequence[Tail] | None
    vectors: Vectors | None
    more: bool


Released = tuple[Any, SortedPage, int]
"""(order, page, position in the page)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenRows:
    """Rows picked from several pages, parallel; tails and vectors None if the pages have none."""

    places: Sequence[Any]
    ids: Sequence[bytes]
    seqs: Sequence[int]
    tails: Sequence[Tail] | None
    vectors: Vectors | None


def rows_of(entries: Sequence[Released]) -> TakenRows:
    """Returns the rows of the entries, in their order."""
    tails = vectors = None
    if entries and entries[0][1].tails is not None:
        tails = [page.tails[i] for _, page, i in entries if page.tails is not None]
    if entries and entries[0][1].vectors is not None:
        vectors = np.stack([page.vectors[i] for _, page, i in entries if page.vectors is not None])
    return TakenRows(
        places=[page.places[i] for _, page, i in entries],
        ids=[page.ids[i] for _, page, i in entries],
        seqs=[page.seqs[i] for _, page, i in entries],
        tails=tails,
        vectors=vectors,
    )


Ask = Callable[[Sequence[tuple[ShardNumber, SortedPage | None]]], Awaitable[Sequence[SortedPage]]]
"""Returns the next page of each shard, given the one before it (None at first)."""


@dataclass(slots=True)
class _Buffer:
    page: SortedPage | None = None
    taken: int = 0

    @property
    def wants_more(self) -> bool:
        return self.page is None or (self.page.more and self.taken == len(self.page.order))


def page_bytes(shards: int) -> int:
    """Returns how large one shard's page may be, so that those of all shards stay bounded."""
    return min(SHARD_PAGE_BYTES_MAX, GATHERED_BYTES_MAX // shards)


async def merged(shards: Sequence[ShardNumber], ask: Ask) -> AsyncGenerator[list[Released], None]:
    """Yields the next entries of all shards together, in order, list by list.

    An entry that two shards give (a point on its way to another partition) comes once. A shard is
    asked again only when all it gave has been released: the one that ends first stops the others.
    """
    buffers = {shard: _Buffer() for shard in shards}
    last: Any = None
    while True:
        asked = [shard for shard, buffer in buffers.items() if buffer.wants_more]
        if asked:
            pages = await ask([(shard, buffers[shard].page) for shard in asked])
            for shard, page in zip(asked, pages, strict=True):
                assert page.order or not page.more, "an empty page ends a shard"
                buffers[shard] = _Buffer(page)
        open_ends = [b.page.order[-1] for b in buffers.values() if b.page and b.page.more]
        horizon = min(open_ends, default=None)
        entries: list[Released] = []
        for buffer in buffers.values():
            entries += _taken(buffer, horizon)
        # Only by order: pages are not comparable, and equal orders are the same point.
        entries.sort(key=lambda entry: entry[0])
        released = []
        for entry in entries:
            if entry[0] != last:
                released.append(entry)
                last = entry[0]
        if released:
            yield released
        if horizon is None:
            return


def _taken(buffer: _Buffer, horizon: Any) -> list[Released]:
    """Takes the entries up to the horizon, all when there is none."""
    page = buffer.page
    assert page is not None, "every shard was asked"
    begin = buffer.taken
    end = len(page.order) if horizon is None else bisect.bisect_right(page.order, horizon)
    buffer.taken = max(begin, end)
    return [(page.order[i], page, i) for i in range(begin, buffer.taken)]
