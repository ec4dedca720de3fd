"""What SDK and server must agree on about fast lanes besides frames, handshake and messages."""

from typing import Final

TOO_LARGE: Final = "too large"
"""Header of a reply without a body: the answer does not fit a frame, ask for it over gRPC."""
