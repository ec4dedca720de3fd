"""Frames, the unit of transfer on a link: encoded and decoded without any input or output.

Shared by the SDK and the servers. A frame is, little-endian and without padding:

    offset  size  field
    0       4     length of everything after this field: 9 + header + body
    4       1     type
    5       4     request id
    9       4     header length
    13      …     header: one msgpack value; no bytes at all mean None
    13 + h  …     body: raw bytes, to the end of the frame
"""

import enum
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgpack

PROTOCOL_VERSION: Final = 1
"""Exchanged in HELLO. Any change of the layout above or of a header's shape raises it."""

FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
"""Equals domain.limits.FRAME_BYTES_MAX of the servers: twice the largest gRPC request."""

HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
"""A filter may list 10,000 values of 1 KiB; msgpack can grow eightfold as Python objects."""

REQUEST_ID_MAX: Final = 2**32 - 1

_PREFIX: Final = struct.Struct("<IBII")
PREFIX_BYTES: Final = _PREFIX.size
_LENGTH_BYTES: Final = 4
_FIXED_BYTES: Final = PREFIX_BYTES - _LENGTH_BYTES

# Measured round trips on uvloop, joined against in two buffers: 22.4 / 22.6 µs with a body of
# 3,072 bytes, 27.7 / 27.0 with 16,000, 65 / 57 with 128,000.
_JOIN_BYTES_MAX: Final = 4 * 1024

Buffer = bytes | bytearray | memoryview
Body = Buffer | Sequence[Buffer]
"""Buffers must stay unchanged until the peer has answered: they are sent without a copy."""


class FrameType(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    REPLY = 4
    ERROR = 5
    CANCEL = 6
    PING = 7
    PONG = 8
    NOTIFY = 9


_TYPES: Final[dict[int, FrameType]] = {int(member): member for member in FrameType}


class FrameError(ValueError):
    """The bytes are no frame of this protocol, or a frame would break one of its bounds."""


class Frame(NamedTuple):
    """One decoded frame. A tuple, because building one is on the path of every request.

    body: read-only, not aligned, and a view of what was received with it (up to 256 KiB more):
    whoever keeps a small body for long should copy it.
    """

    type: FrameType
    request_id: int
    header: object
    body: memoryview


# One packer for the process: it keeps its buffer, so packing costs 0.3 µs and not 0.8. `pack` is
# one C call without callbacks, which makes it safe to share among threads; a failed call resets it.
_pack = msgpack.Packer(autoreset=True).pack
_unpack = msgpack.unpackb
_new_tuple = tuple.__new__
_EMPTY: Final = memoryview(b"")
_BUFFERS: Final = (bytes, bytearray, memoryview)


def encode_frame(
    frame_type: FrameType, request_id: int, header: object = None, body: Body = b""
) -> list[Buffer]:
    """Returns the buffers whose concatenation is the frame; small frames come as one buffer.

    header: anything msgpack can pack. Large body parts are not copied.
    Raises: FrameError if the frame or its header is too large; TypeError, ValueError or
    OverflowError if the header cannot be packed.
    """
    packed: bytes = b"" if header is None else _pack(header)
    parts: list[Buffer]
    if type(body) is bytes:
        parts = [body]
        size = len(body)
    elif isinstance(body, _BUFFERS):
        parts = [_flat(body)]
        size = len(parts[0])
    else:
        parts = [_flat(part) for part in body]
        size = sum(map(len, parts))
    size += PREFIX_BYTES + len(packed)
    if size > FRAME_BYTES_MAX or len(packed) > HEADER_BYTES_MAX:
        raise _malformed(frame_type, size, len(packed), FRAME_BYTES_MAX)
    prefix = _PREFIX.pack(size - _LENGTH_BYTES, frame_type, request_id, len(packed))
    if size <= _JOIN_BYTES_MAX:
        return [b"".join((prefix, packed, *parts))]
    return [prefix + packed, *parts]


def _flat(part: Buffer) -> Buffer:
    """Returns the part as one dimension of bytes, so that its length is its size in bytes."""
    if isinstance(part, memoryview) and (part.itemsize != 1 or part.ndim != 1):
        # A view with a zero in its shape cannot be cast.
        return part.cast("B") if part.nbytes else b""
    return part


def _malformed(type_number: int, size: int, header_size: int, frame_bytes_max: int) -> FrameError:
    """Returns the error that says which bound a frame's prefix breaks."""
    if type_number not in _TYPES:
        return FrameError(f"frame type {type_number} is unknown")
    if size > frame_bytes_max:
        return FrameError(f"frame of {size} bytes is over the limit of {frame_bytes_max} bytes")
    if header_size > HEADER_BYTES_MAX:
        return FrameError(
            f"frame header of {header_size} bytes is over the limit of {HEADER_BYTES_MAX} bytes"
        )
    return FrameError(f"frame of {size} bytes cannot hold a header of {header_size} bytes")


class FrameDecoder:
    """Turns a stream of bytes, cut anywhere, into frames.

    A frame that lies within one chunk is not copied; one that spans chunks is copied once. Memory
    grows with what was received, never with what a peer announced. After a FrameError every
    further `feed` raises it again: the stream has lost its frame boundaries.
    """

    def __init__(self, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._partial = bytearray()
        self._error: FrameError | None = None

    @property
    def buffered_bytes(self) -> int:
        """Bytes received of a frame that is not complete yet."""
        return len(self._partial)

    def feed(self, chunk: Buffer) -> list[Frame]:
        """Returns the frames completed by the chunk, in order; the chunk must not change later.

        Raises: FrameError on the first malformed frame; frames before it in the chunk are lost.
        """
        if self._error is not None:
            raise self._error
        frames: list[Frame] = []
        try:
            start = self._complete_partial(chunk, frames) if self._partial else 0
            end = self._decode(chunk, start, frames)
        except FrameError as error:
            self._error = error
            self._partial = bytearray()
            raise
        if end < len(chunk):
            self._partial += memoryview(chunk)[end:]
        return frames

    def _decode(self, buffer: Buffer, start: int, frames: list[Frame]) -> int:
        """Appends the complete frames of buffer[start:]; returns where the first other begins.

        One flat loop: it runs on both sides of every call, and Python calls are what it costs.
        """
        end = len(buffer)
        while end - start >= PREFIX_BYTES:
            length, type_number, request_id, header_size = _PREFIX.unpack_from(buffer, start)
            frame_type = _TYPES.get(type_number)
            size = _LENGTH_BYTES + length
            body_start = start + PREFIX_BYTES + header_size
            frame_end = start + size
            if (
                frame_type is None
                or size > self.frame_bytes_max
                or header_size > HEADER_BYTES_MAX
                or body_start > frame_end
            ):
                raise _malformed(type_number, size, header_size, self.frame_bytes_max)
            if frame_end > end:
                break
            header: object = None
            if header_size:
                try:
                    # Integer keys are allowed: session tokens are keyed by shard number.
                    header = _unpack(
                        buffer[start + PREFIX_BYTES : body_start], strict_map_key=False
                    )
                # msgpack's own errors are ValueErrors; TypeError is an unhashable map key.
                except (ValueError, TypeError, OverflowError, RecursionError) as error:
                    raise FrameError(f"frame header is not one msgpack value: {error}") from error
            body = _EMPTY
            if body_start < frame_end:
                body = memoryview(buffer)[body_start:frame_end].toreadonly()
            # What Frame(...) does, without the Python call that a NamedTuple's constructor is.
            frames.append(_new_tuple(Frame, (frame_type, request_id, header, body)))
            start = frame_end
        return start

    def _complete_partial(self, chunk: Buffer, frames: list[Frame]) -> int:
        """Moves bytes of the chunk to the incomplete frame; returns how many were taken."""
        partial = self._partial
        taken = 0
        # Twice: the prefix, then the rest, whose size the prefix tells.
        for _ in range(2):
            count = min(self._missing_bytes(), len(chunk) - taken)
            partial += memoryview(chunk)[taken : taken + count]
            taken += count
            if self._decode(partial, 0, frames):
                self._partial = bytearray()
                break
        return taken

    def _missing_bytes(self) -> int:
        """Returns how many bytes the incomplete frame, or at first its prefix, still lacks."""
        if len(self._partial) < PREFIX_BYTES:
            return PREFIX_BYTES - len(self._partial)
        length: int = _PREFIX.unpack_from(self._partial)[0]
        return _LENGTH_BYTES + length - len(self._partial)
