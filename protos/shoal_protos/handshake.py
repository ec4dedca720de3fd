"""The link's handshake as the caller sees it, without input or output. Shared by SDK and servers.

    caller    HELLO [magic, version, nonce, name]
    listener  HELLO [version, nonce]                 or ERROR conflict: other version
    caller    HELLO proof("caller")
    listener  WELCOME proof("listener")              or ERROR unauthenticated

A proof is HMAC-SHA256 over the role and everything both sides said, so it cannot be replayed
(nonces of both sides), reflected (roles differ) or combined with another name. The listener proves
itself only to a caller that already has, so a stranger learns nothing but the version.
"""

import hashlib
import hmac
from typing import Any, Final

from shoal_protos.frames import PROTOCOL_VERSION, Frame, FrameError, FrameType

MAGIC: Final = "shoal-link"
NONCE_BYTES: Final = 32
PEER_NAME_LENGTH_MAX: Final = 64
HANDSHAKE_BYTES_MAX: Final = 1024
"""Of what a peer sends before it is authenticated; both messages of a caller take under 400."""


class HandshakeRefused(Exception):
    """One side does not accept the other.

    error: a map as ERROR frames carry it: kind ("conflict", "unauthenticated"), message, outcome
    and field; or whatever the listener sent in its place.
    """

    def __init__(self, error: Any) -> None:
        super().__init__(error)
        self.error = error


def refusal(kind: str, message: str, field: str | None = None) -> HandshakeRefused:
    """Returns what to raise; in the handshake nothing was ever applied."""
    return HandshakeRefused(
        {"kind": kind, "message": message, "outcome": "not_applied", "field": field}
    )


def other_version(caller: int, listener: int) -> HandshakeRefused:
    return refusal(
        "conflict",
        f"link protocol versions differ: the caller speaks {caller}, the listener {listener}; "
        "upgrade the older side",
        "protocol_version",
    )


def proof(secret: bytes, role: str, name: str, caller_nonce: bytes, nonce: bytes) -> bytes:
    """Returns the 32 bytes that show knowledge of the secret, for one role in one handshake."""
    parts = (MAGIC, str(PROTOCOL_VERSION), role, name)
    said = b"".join(len(part.encode()).to_bytes(2, "little") + part.encode() for part in parts)
    return hmac.digest(secret, said + caller_nonce + nonce, hashlib.sha256)


class CallerHandshake:
    """The side that connects: send `hello`, then what `receive` returns, until `done`.

    name: who calls, which the listener may choose the secret by; 64 characters of it are sent.
    nonce: NONCE_BYTES random ones.
    """

    def __init__(self, secret: bytes, *, name: str, nonce: bytes) -> None:
        self.done = False
        self._secret = secret
        self._name = name[:PEER_NAME_LENGTH_MAX]
        self._nonce = nonce
        self._listener_nonce: bytes | None = None

    def hello(self) -> list[object]:
        return [MAGIC, PROTOCOL_VERSION, self._nonce, self._name]

    def receive(self, frame: Frame) -> bytes | None:
        """Returns the header of the HELLO to send next, or None.

        Raises: HandshakeRefused by either side; FrameError if the bytes make no sense.
        """
        header = frame.header
        if frame.type is FrameType.ERROR:
            raise HandshakeRefused(header)
        if frame.type is FrameType.HELLO and self._listener_nonce is None:
            match header:
                case [int(version), bytes(nonce)] if len(nonce) == NONCE_BYTES:
                    if version != PROTOCOL_VERSION:
                        raise other_version(PROTOCOL_VERSION, version)
                    self._listener_nonce = nonce
                    return proof(self._secret, "caller", self._name, self._nonce, nonce)
        if frame.type is FrameType.WELCOME and self._listener_nonce is not None:
            expected = proof(
                self._secret, "listener", self._name, self._nonce, self._listener_nonce
            )
            if not isinstance(header, bytes) or not hmac.compare_digest(header, expected):
                raise refusal("unauthenticated", "the listener does not know the link secret")
            self.done = True
            return None
        raise FrameError(f"the listener sent {frame.type.name} out of order in the handshake")
