"""What handlers take and return, and what callers get.

These are tuples, not the frozen dataclasses of the house: each call builds four of them, and a
tuple costs 0.3 µs where a frozen dataclass with as many fields costs 0.8.
"""

import contextlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from shoal_cluster.domain.errors import Internal, Outcome, ShoalError, from_wire
from shoal_protos.frames import Body


class Request(NamedTuple):
    """One call as its handler sees it.

    header: as unpacked; the handler checks its shape. body: read-only, not aligned, valid for
    ever, but a view of up to 256 KiB of received bytes: copy what is kept for long.
    deadline_monotonic_s: by the listener's clock. peer: the name the caller gave and from where.
    """

    method: str
    header: object
    body: memoryview
    deadline_monotonic_s: float
    peer: str


class Reply(NamedTuple):
    """What a handler answers. Body buffers must not change until they are sent."""

    header: object = None
    body: Body = b""


class ReceivedReply(NamedTuple):
    """What a call returns; a handler may return it as it is, to forward it."""

    header: object
    body: memoryview


Answer = Reply | ReceivedReply

LaterAnswer = Awaitable[Answer | bytes]
"""Bytes: only where the listener says what reply they make (`Listener`, reply_of)."""

Handler = Callable[[Request], Answer | LaterAnswer]
"""Serves one method.

A plain function that returns an Answer costs no task; one that returns a Future (of a batch or an
executor) costs none either; a coroutine function gets a task. The awaitable is cancelled when the
caller cancels, its deadline passes or its link breaks: work that must finish is shielded by the
handler, and who resolves a future checks `done()` first. ShoalErrors travel to the caller; anything
else is logged and becomes Internal.
"""


def received_error(header: object) -> ShoalError:
    """Rebuilds the error that a peer sent; what cannot be read becomes Internal, MAYBE_APPLIED."""
    if isinstance(header, dict):
        # ValueError: an outcome this version does not know.
        with contextlib.suppress(ValueError):
            return from_wire(header)
    return Internal(
        f"the listener sent an error that cannot be read: {header!r:.200}",
        outcome=Outcome.MAYBE_APPLIED,
    )
