"""What a session has seen: positions in the shards' orders, merged from every reply.

A client sends its token with each read, so that it reads its own writes and never goes back.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal_protos.v1 import types_pb2


class Position(NamedTuple):
    """A position in one shard's total order; compares by epoch, then seq."""

    epoch: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionToken:
    """Positions by shard number, of one collection."""

    collection_id: str = ""
    positions: Mapping[int, Position] = field(default_factory=dict)


def token_from_proto(message: types_pb2.SessionToken) -> SessionToken:
    return SessionToken(
        collection_id=message.collection_id,
        positions={p.shard: Position(p.epoch, p.seq) for p in message.positions},
    )


def token_to_proto(token: SessionToken) -> types_pb2.SessionToken:
    return types_pb2.SessionToken(
        collection_id=token.collection_id,
        positions=[
            types_pb2.ShardPosition(shard=shard, epoch=position.epoch, seq=position.seq)
            for shard, position in sorted(token.positions.items())
        ],
    )


def merge_tokens(seen: SessionToken, reply: SessionToken) -> SessionToken:
    """Returns the larger position of each shard.

    A reply about another collection id replaces what was seen: the name was created anew, and
    positions of the former collection mean nothing in it. Returns `seen` itself when nothing moved.
    """
    if not reply.positions:
        return seen
    if reply.collection_id != seen.collection_id:
        return reply
    ahead = {
        shard: position
        for shard, position in reply.positions.items()
        if shard not in seen.positions or position > seen.positions[shard]
    }
    if not ahead:
        return seen
    return SessionToken(collection_id=seen.collection_id, positions={**seen.positions, **ahead})


class Sessions:
    """The tokens of one client, by collection name. Safe to use from several threads.

    Invariant: positions of one collection id never go back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[str, SessionToken] = {}
        self._messages: dict[str, types_pb2.SessionToken] = {}

    def token(self, collection: str) -> SessionToken:
        with self._lock:
            return self._tokens.get(collection, SessionToken())

    def message(self, collection: str) -> types_pb2.SessionToken | None:
        """Returns the token to send, or None when nothing was seen yet."""
        with self._lock:
            return self._messages.get(collection)

    def observe(self, collection: str, message: types_pb2.SessionToken) -> None:
        """Merges the token of a reply."""
        with self._lock:
            # Between writes every reply says the same; comparing messages is much cheaper.
            if message == self._messages.get(collection):
                return
        reply = token_from_proto(message)
        with self._lock:
            seen = self._tokens.get(collection, SessionToken())
            merged = merge_tokens(seen, reply)
            if merged is not seen:
                self._tokens[collection] = merged
                self._messages[collection] = token_to_proto(merged)

    def forget(self, collection: str) -> None:
        """Drops what was seen of a collection that is no more."""
        with self._lock:
            self._tokens.pop(collection, None)
            self._messages.pop(collection, None)
