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

# A kernel takes 3 KiB in one buffer faster than in three, and copying 16 KiB costs about 1 µs,
# which is what the event loop pays for each further buffer of a vectored write.
_JOIN_BYTES_MAX: Final = 16 * 1024

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
_EMPTY: Final = memoryview(b"")


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
        body_size = len(body)
    elif isinstance(body, bytearray | memoryview):
        parts = [_flat(body)]
        body_size = len(parts[0])
    else:
        parts = [_flat(part) for part in body]  # type: ignore[arg-type]
        body_size = sum(map(len, parts))
    length = _FIXED_BYTES + len(packed) + body_size
    _check_sizes(length, len(packed), FRAME_BYTES_MAX)
    prefix = _PREFIX.pack(length, frame_type, request_id, len(packed))
    if length <= _JOIN_BYTES_MAX:
        return [b"".join((prefix, packed, *parts))]
    return [prefix + packed, *parts]


def _flat(part: Buffer) -> Buffer:
    """Returns the part as one dimension of bytes, so that its length is its size in bytes."""
    if isinstance(part, memoryview) and (part.itemsize != 1 or part.ndim != 1):
        # A view with a zero in its shape cannot be cast.
        return part.cast("B") if part.nbytes else b""
    return part


def _check_sizes(length: int, header_size: int, frame_bytes_max: int) -> None:
    size = _LENGTH_BYTES + length
    if size > frame_bytes_max:
        raise FrameError(f"frame of {size} bytes is over the limit of {frame_bytes_max} bytes")
    if header_size > HEADER_BYTES_MAX:
        raise FrameError(
            f"frame header of {header_size} bytes is over the limit of {HEADER_BYTES_MAX} bytes"
        )
    if length < _FIXED_BYTES + header_size:
        raise FrameError(f"frame of length {length} cannot hold a header of {header_size} bytes")


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
        try:
            return self._decode(chunk)
        except FrameError as error:
            self._error = error
            self._partial = bytearray()
            raise

    def _decode(self, chunk: Buffer) -> list[Frame]:
        frames: list[Frame] = []
        offset = self._complete_partial(chunk, frames) if self._partial else 0
        size = len(chunk)
        while size - offset >= PREFIX_BYTES:
            length = self._frame_length(chunk, offset)
            end = offset + _LENGTH_BYTES + length
            if end > size:
                break
            frames.append(_frame(chunk, offset, end))
            offset = end
        if offset < size:
            self._partial += memoryview(chunk)[offset:]
        return frames

    def _complete_partial(self, chunk: Buffer, frames: list[Frame]) -> int:
        """Moves bytes of the chunk to the incomplete frame; returns how many were taken."""
        partial = self._partial
        view = memoryview(chunk)
        taken = 0
        if len(partial) < PREFIX_BYTES:
            taken = min(PREFIX_BYTES - len(partial), len(view))
            partial += view[:taken]
            if len(partial) < PREFIX_BYTES:
                return taken
        frame_size = _LENGTH_BYTES + self._frame_length(partial, 0)
        missing = min(frame_size - len(partial), len(view) - taken)
        partial += view[taken : taken + missing]
        if len(partial) == frame_size:
            frames.append(_frame(partial, 0, frame_size))
            self._partial = bytearray()
        return taken + missing

    def _frame_length(self, buffer: Buffer, offset: int) -> int:
        length: int
        length, type_number, _, header_size = _PREFIX.unpack_from(buffer, offset)
        if type_number not in _TYPES:
            raise FrameError(f"frame type {type_number} is unknown")
        _check_sizes(length, header_size, self.frame_bytes_max)
        return length


def _frame(buffer: Buffer, start: int, end: int) -> Frame:
    """Decodes the complete and size-checked frame at buffer[start:end]."""
    _, type_number, request_id, header_size = _PREFIX.unpack_from(buffer, start)
    body_start = start + PREFIX_BYTES + header_size
    header: object = None
    if header_size:
        try:
            # Integer keys are allowed: session tokens are keyed by shard number.
            header = _unpack(buffer[start + PREFIX_BYTES : body_start], strict_map_key=False)
        # msgpack's own errors are ValueErrors; TypeError is an unhashable map key.
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FrameError(f"frame header is not one msgpack value: {error}") from error
    body = memoryview(buffer)[body_start:end].toreadonly() if body_start < end else _EMPTY
    return Frame(_TYPES[type_number], request_id, header, body)
