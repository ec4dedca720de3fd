"""Tickets with which clients open fast lanes: docs/design/fast-lane.md.

Nothing is kept per ticket: its secret follows from its text and a key of this process.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.ids import IdGenerator

LIFETIME_MS: Final = 60_000
"""For opening lanes only; a client asks again before it opens one later than that."""

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Ticket:
    """name: what the caller calls itself in the handshake. secret: what it must know."""

    name: str
    secret: bytes


class Tickets:
    """Issues and checks the tickets of one coordinator."""

    def __init__(self, clock: Clock, ids: IdGenerator) -> None:
        self._clock = clock
        self._ids = ids
        self._key = bytes.fromhex(ids.hex(_KEY_BYTES))

    def issue(self) -> Ticket:
        expiry_ms = int(self._clock.monotonic_s() * 1000) + LIFETIME_MS
        name = f"{expiry_ms:x}.{self._ids.hex(_NONCE_BYTES)}"
        return Ticket(name, self._secret(name))

    def secret_of(self, name: str) -> bytes | None:
        """Returns the secret of a ticket of ours; None when it is no ticket, or has expired.

        A made-up name gets a secret too, which nobody can know.
        """
        expiry, _, nonce = name.partition(".")
        try:
            expiry_ms = int(expiry, 16)
        except ValueError:
            return None
        if not nonce or expiry_ms < self._clock.monotonic_s() * 1000:
            return None
        return self._secret(name)

    def _secret(self, name: str) -> bytes:
        return hmac.digest(self._key, name.encode(), hashlib.sha256)
