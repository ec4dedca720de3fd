"""The listener's half of the handshake, without input or output.

The caller's half, and what both say, is in shoal_protos/handshake.py, which the SDK shares.
"""

import hmac
from collections.abc import Callable
from typing import Final

from shoal_cluster.domain.errors import InvalidRequest
from shoal_protos.frames import PROTOCOL_VERSION, Frame, FrameError, FrameType
from shoal_protos.handshake import (
    MAGIC,
    NONCE_BYTES,
    PEER_NAME_LENGTH_MAX,
    other_version,
    proof,
    refusal,
)

SECRET_BYTES_MIN: Final = 16
"""128 bits: a shorter secret could be searched offline by who reads one handshake."""

SecretOf = Callable[[str], bytes | None]
"""Returns the secret that a caller of this name must know; None: the name is not welcome (any
more)."""


def check_secret(secret: bytes) -> None:
    """Raises InvalidRequest (NOT_APPLIED) for a secret that is too short to protect anything."""
    if len(secret) < SECRET_BYTES_MIN:
        raise InvalidRequest(
            f"link secret has {len(secret)} bytes; use random ones",
            field="link_secret",
            limit=f"at least {SECRET_BYTES_MIN} bytes",
        )


def shared_secret(secret: bytes) -> SecretOf:
    """Returns the rule of links between actors: one secret, whatever the name.

    Raises: InvalidRequest (NOT_APPLIED) if it is too short.
    """
    check_secret(secret)
    return lambda name: secret


class ListenerHandshake:
    """The side that was connected to: send what `receive` returns, until `done`."""

    def __init__(self, secret_of: SecretOf, *, nonce: bytes) -> None:
        self.done = False
        self.peer_name = ""
        self._secret_of = secret_of
        self._secret = b""
        self._nonce = nonce
        self._caller_nonce: bytes | None = None

    def receive(self, frame: Frame) -> tuple[FrameType, object]:
        """Returns type and header of the frame to send next.

        Raises: HandshakeRefused, to be sent before closing; FrameError, to be closed without a
        word, because the peer does not even speak this protocol.
        """
        header = frame.header
        if frame.type is not FrameType.HELLO:
            raise FrameError(f"the caller sent {frame.type.name} before it was authenticated")
        if self._caller_nonce is None:
            match header:
                case [str(magic), int(version), *_] if magic == MAGIC:
                    if version != PROTOCOL_VERSION:
                        raise other_version(version, PROTOCOL_VERSION)
            match header:
                case [str(magic), int(), bytes(nonce), str(name)] if (
                    magic == MAGIC
                    and len(nonce) == NONCE_BYTES
                    and len(name) <= PEER_NAME_LENGTH_MAX
                ):
                    secret = self._secret_of(name)
                    if secret is None:
                        raise refusal("unauthenticated", "the ticket is unknown or has expired")
                    self._secret = secret
                    self._caller_nonce, self.peer_name = nonce, name
                    return FrameType.HELLO, [PROTOCOL_VERSION, self._nonce]
            raise FrameError("the caller's first HELLO is malformed")
        if not isinstance(header, bytes) or not hmac.compare_digest(header, self._proof("caller")):
            raise refusal(
                "unauthenticated", "the caller does not know the link secret of this listener"
            )
        self.done = True
        return FrameType.WELCOME, self._proof("listener")

    def _proof(self, role: str) -> bytes:
        assert self._caller_nonce is not None
        return proof(self._secret, role, self.peer_name, self._caller_nonce, self._nonce)
