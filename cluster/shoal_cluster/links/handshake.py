"""The link's handshake, without input or output: both sides prove that they know the secret.

    caller    HELLO [magic, version, nonce, name]
    listener  HELLO [version, nonce]                 or ERROR Conflict: other version
    caller    HELLO proof("caller")
    listener  WELCOME proof("listener")              or ERROR Unauthenticated

A proof is HMAC-SHA256 over the role and everything both sides said, so it cannot be replayed
(nonces of both sides), reflected (roles differ) or combined with another name. The listener proves
itself only to a caller that already has, so a stranger learns nothing but the version.
"""

import hashlib
import hmac
from typing import Final

from shoal_cluster.domain.errors import (
    Conflict,
    InvalidRequest,
    ShoalError,
    Unauthenticated,
)
from shoal_cluster.links.messages import received_error
from shoal_protos.frames import PROTOCOL_VERSION, Frame, FrameError, FrameType

MAGIC: Final = "shoal-link"
NONCE_BYTES: Final = 32
PEER_NAME_LENGTH_MAX: Final = 64
HANDSHAKE_BYTES_MAX: Final = 1024
"""Of what a peer sends before it is authenticated; both messages of a caller take under 400."""

SECRET_BYTES_MIN: Final = 16
"""128 bits: a shorter secret could be searched offline by who reads one handshake."""


def check_secret(secret: bytes) -> None:
    """Raises InvalidRequest (NOT_APPLIED) for a secret that is too short to protect anything."""
    if len(secret) < SECRET_BYTES_MIN:
        raise InvalidRequest(
            f"link secret has {len(secret)} bytes; use random ones",
            field="link_secret",
            limit=f"at least {SECRET_BYTES_MIN} bytes",
        )


def proof(secret: bytes, role: str, name: str, caller_nonce: bytes, nonce: bytes) -> bytes:
    """Returns the 32 bytes that show knowledge of the secret, for one role in one handshake."""
    parts = (MAGIC, str(PROTOCOL_VERSION), role, name)
    said = b"".join(len(part.encode()).to_bytes(2, "little") + part.encode() for part in parts)
    return hmac.digest(secret, said + caller_nonce + nonce, hashlib.sha256)


class CallerHandshake:
    """The side that connects: send `hello`, then what `receive` returns, until `done`."""

    def __init__(self, secret: bytes, *, name: str, nonce: bytes) -> None:
        check_secret(secret)
        self.done = False
        self._secret = secret
        self._name = name[:PEER_NAME_LENGTH_MAX]
        self._nonce = nonce
        self._listener_nonce: bytes | None = None

    def hello(self) -> list[object]:
        return [MAGIC, PROTOCOL_VERSION, self._nonce, self._name]

    def receive(self, frame: Frame) -> bytes | None:
        """Returns the header of the HELLO to send next, or None.

        Raises: what the listener refused with (Conflict, Unauthenticated, all NOT_APPLIED), and
        FrameError if its bytes make no sense.
        """
        header = frame.header
        if frame.type is FrameType.ERROR:
            raise received_error(header)
        if frame.type is FrameType.HELLO and self._listener_nonce is None:
            match header:
                case [int(version), bytes(nonce)] if len(nonce) == NONCE_BYTES:
                    if version != PROTOCOL_VERSION:
                        raise _other_version(PROTOCOL_VERSION, version)
                    self._listener_nonce = nonce
                    return proof(self._secret, "caller", self._name, self._nonce, nonce)
        if frame.type is FrameType.WELCOME and self._listener_nonce is not None:
            expected = proof(
                self._secret, "listener", self._name, self._nonce, self._listener_nonce
            )
            if not isinstance(header, bytes) or not hmac.compare_digest(header, expected):
                raise Unauthenticated("the listener does not know the link secret")
            self.done = True
            return None
        raise FrameError(f"the listener sent {frame.type.name} out of order in the handshake")


class ListenerHandshake:
    """The side that was connected to: send what `receive` returns, until `done`."""

    def __init__(self, secret: bytes, *, nonce: bytes) -> None:
        self.done = False
        self.peer_name = ""
        self._secret = secret
        self._nonce = nonce
        self._caller_nonce: bytes | None = None

    def receive(self, frame: Frame) -> tuple[FrameType, object]:
        """Returns type and header of the frame to send next.

        Raises: Conflict or Unauthenticated (NOT_APPLIED), to be sent before closing; FrameError,
        to be closed without a word, because the peer does not even speak this protocol.
        """
        header = frame.header
        if frame.type is not FrameType.HELLO:
            raise FrameError(f"the caller sent {frame.type.name} before it was authenticated")
        if self._caller_nonce is None:
            match header:
                case [str(magic), int(version), *_] if magic == MAGIC:
                    if version != PROTOCOL_VERSION:
                        raise _other_version(version, PROTOCOL_VERSION)
            match header:
                case [str(magic), int(), bytes(nonce), str(name)] if (
                    magic == MAGIC
                    and len(nonce) == NONCE_BYTES
                    and len(name) <= PEER_NAME_LENGTH_MAX
                ):
                    self._caller_nonce, self.peer_name = nonce, name
                    return FrameType.HELLO, [PROTOCOL_VERSION, self._nonce]
            raise FrameError("the caller's first HELLO is malformed")
        if not isinstance(header, bytes) or not hmac.compare_digest(header, self._proof("caller")):
            raise Unauthenticated("the caller does not know the link secret of this listener")
        self.done = True
        return FrameType.WELCOME, self._proof("listener")

    def _proof(self, role: str) -> bytes:
        assert self._caller_nonce is not None
        return proof(self._secret, role, self.peer_name, self._caller_nonce, self._nonce)


def _other_version(caller: int, listener: int) -> ShoalError:
    return Conflict(
        f"link protocol versions differ: the caller speaks {caller}, the listener {listener}; "
        "upgrade the older side",
        field="protocol_version",
    )
