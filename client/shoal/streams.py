"""A range search under way: what has arrived, and how to go on when its stream is lost. No I/O."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Self

from shoal.results import Hit, SearchResult
from shoal.session import Sessions, SessionToken, token_from_proto
from shoal_protos.v1 import search_pb2


class RangeStream:
    """The request of one range search, kept such that sending it again goes on where it stands."""

    def __init__(
        self, request: search_pb2.SearchRangeRequest, sessions: Sessions, *, sends_token: bool
    ) -> None:
        self.request = request
        self._sessions = sessions
        self._sends_token = sends_token

    def received(self, message: search_pb2.SearchRangeResponse) -> bool:
        """Notes a message; returns whether it is the last."""
        collection = self.request.collection
        self._sessions.observe(collection, message.as_of)
        self.request.cursor = message.cursor
        token = self._sessions.message(collection)
        if self._sends_token and token is not None:
            self.request.session.CopyFrom(token)
        return not message.cursor


class RangeSummary:
    """What a range search says beside its hits, true as far as it has been read.

    truncated: more points lie within the bound than `limit`; known at the end. explain: the
    `Explain` message of shoal.v1 if it was asked for, at the end.
    """

    def __init__(self) -> None:
        self._last = search_pb2.SearchRangeResponse()

    @property
    def truncated(self) -> bool:
        return self._last.truncated

    @property
    def as_of(self) -> SessionToken:
        return token_from_proto(self._last.as_of)

    @property
    def staleness_ms(self) -> int:
        return self._last.staleness_ms

    @property
    def explain(self) -> search_pb2.Explain | None:
        return self._last.explain if self._last.HasField("explain") else None

    def _hits_of(self, message: search_pb2.SearchRangeResponse) -> list[Hit]:
        self._last = message
        return SearchResult(message.hits, message).hits


class RangeHits(RangeSummary):
    """Iterates over the hits of a range search, nearest first; asks the server when first read."""

    def __init__(self, messages: Iterator[search_pb2.SearchRangeResponse]) -> None:
        super().__init__()
        self._messages = messages
        self._hits: Iterator[Hit] = iter(())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Hit:
        while True:
            for hit in self._hits:
                return hit
            self._hits = iter(self._hits_of(next(self._messages)))


class AsyncRangeHits(RangeSummary):
    """Iterates over the hits of a range search, nearest first; asks the server when first read."""

    def __init__(self, messages: AsyncGenerator[search_pb2.SearchRangeResponse, None]) -> None:
        super().__init__()
        self._messages = messages
        self._hits: Iterator[Hit] = iter(())

    def __aiter__(self) -> AsyncIterator[Hit]:
        return self

    async def __anext__(self) -> Hit:
        while True:
            for hit in self._hits:
                return hit
            self._hits = iter(self._hits_of(await anext(self._messages)))

    async def aclose(self) -> None:
        """Ends the search early."""
        await self._messages.aclose()
