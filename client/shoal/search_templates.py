"""Serialised searches, for later ones that differ in their vectors only."""

from collections.abc import Sequence
from typing import Any

from shoal.vectors import Vectors
from shoal_protos.v1 import search_pb2, types_pb2

SEARCH_TEMPLATES_MAX = 64


class SearchTemplates:
    """Those of one client.

    Building and serialising a request takes longer than joining bytes around another vector. Safe
    to use from several threads: an entry is replaced whole.
    """

    def __init__(self) -> None:
        self._parts: dict[Any, tuple[Any, types_pb2.SessionToken | None, bytes, bytes]] = {}

    def request(
        self, options: Any, token: types_pb2.SessionToken | None, queries: Vectors
    ) -> bytes | None:
        """Returns the request with these vectors; None when none like it was sent before.

        options: all else that was asked for, and the vectors' shape.
        """
        try:
            known = self._parts.get(options)
        except TypeError:  # what cannot be hashed is no valid option: let the checks name it
            return None
        # Of equal values only those of the same types are the same request: 1 is no True.
        if known is None or known[1] is not token or known[0] != _types(options):
            return None
        return b"".join((known[2], queries.data, known[3]))

    def remember(
        self,
        options: Any,
        token: types_pb2.SessionToken | None,
        message: search_pb2.SearchRequest,
    ) -> None:
        raw = message.SerializeToString()
        # Fields are serialised in the order of their numbers: collection, vectors, the rest.
        before = search_pb2.SearchRequest(collection=message.collection).ByteSize()
        size = len(message.vectors)
        start = before + 1 + (size.bit_length() + 6) // 7
        if raw[start : start + size] != message.vectors:
            return
        if len(self._parts) >= SEARCH_TEMPLATES_MAX:
            self._parts.clear()
        self._parts[options] = (_types(options), token, raw[:start], raw[start + size :])


def _types(options: Sequence[Any]) -> list[type]:
    return list(map(type, options))
