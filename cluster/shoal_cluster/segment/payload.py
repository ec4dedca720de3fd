"""The `payload` file: each row's tail (domain/point.py), in compressed blocks.

A block holds consecutive rows, so one row costs one decompression of at most BLOCK_BYTES_MIN plus
one tail. A few blocks stay decompressed, because the hits of a scroll or an export are neighbours.
"""

import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, cast

import numpy as np
import numpy.typing as npt
import zstandard

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.limits import KIB, MIB, PAYLOAD_BYTES_MAX
from shoal_cluster.segment.format import (
    HEADER_BYTES,
    PAYLOAD,
    FileWriter,
    MappedFile,
    aligned,
    encode_header,
)

MAGIC: Final = b"SHOALPAY"

BLOCK_ROWS_MAX: Final = 64
BLOCK_BYTES_MIN: Final = 16 * KIB
"""A block closes at 64 rows or 16 KiB, whichever comes first. Measured on Debian descriptions: 16
KiB shrink to 0.38 and open in 28 µs, 32 KiB to 0.36 in 55 µs, 4 KiB to 0.45 in 15 µs."""

BLOCK_BYTES_MAX: Final = BLOCK_BYTES_MIN + 2 * PAYLOAD_BYTES_MAX + 64 * MIB
"""Refuses to decompress more, whatever a damaged frame promises. A tail is a payload and at most 64
attributes of 256 keywords of 1 KiB each."""

CACHE_BYTES: Final = 512 * KIB
"""About 30 blocks a segment; with 200 opened segments 100 MiB at the very most."""

COMPRESSION_LEVEL: Final = 3
"""zstd's default: 300 MB/s, a build is not slowed by it."""

_this_thread = threading.local()


def write_payload(writer: FileWriter, tails: Sequence[bytes]) -> None:
    """Writes the whole file. tails: in row order. Memory: one block and the block index."""
    compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True)
    first_rows, offsets = [0], [HEADER_BYTES]
    # The header comes first and so cannot know where the index starts: a trailer tells.
    writer.write(encode_header(MAGIC, [len(tails)]))
    block: list[bytes] = []
    block_bytes = 0
    for row, tail in enumerate(tails):
        block.append(tail)
        block_bytes += len(tail)
        if len(block) < BLOCK_ROWS_MAX and block_bytes < BLOCK_BYTES_MIN and row + 1 < len(tails):
            continue
        writer.write(compressor.compress(_encode_block(block)))
        first_rows.append(row + 1)
        offsets.append(writer.size_bytes)
        block, block_bytes = [], 0
    writer.write_array(np.asarray(offsets, dtype=np.uint64))
    writer.write_array(np.asarray(first_rows, dtype=np.uint32))
    writer.align()
    writer.write(struct.pack("<QQ", len(offsets) - 1, offsets[-1]))


def _encode_block(tails: Sequence[bytes]) -> bytes:
    ends = np.cumsum([len(tail) for tail in tails], dtype=np.uint32)
    return struct.pack("<I", len(tails)) + ends.tobytes() + b"".join(tails)


_TRAILER_BYTES: Final = 16


class PayloadFile:
    """Reads tails from the mapped file; safe on any number of threads."""

    def __init__(self, file: MappedFile) -> None:
        self.rows = file.numbers(MAGIC)[0]
        size_bytes = file.contents.nbytes
        trailer_at = size_bytes - _TRAILER_BYTES
        if trailer_at < HEADER_BYTES:
            raise Corrupt(f"segment file {PAYLOAD} has {size_bytes} bytes, no block index")
        blocks, blocks_end = struct.unpack_from("<QQ", file.contents, trailer_at)
        offsets_at = aligned(blocks_end)
        first_rows_at = aligned(offsets_at + (blocks + 1) * 8)
        if aligned(first_rows_at + (blocks + 1) * 4) != trailer_at:
            raise Corrupt(f"segment file {PAYLOAD} has {size_bytes} bytes, its index disagrees")
        self._offsets = cast(npt.NDArray[np.uint64], file.array(np.uint64, blocks + 1, offsets_at))
        self._first_rows = cast(
            npt.NDArray[np.uint32], file.array(np.uint32, blocks + 1, first_rows_at)
        )
        if int(self._first_rows[-1]) != self.rows or int(self._offsets[-1]) != blocks_end:
            raise Corrupt(f"segment file {PAYLOAD} has an index of other rows than {self.rows}")
        self._contents = file.contents
        self.mapped_bytes = size_bytes
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._cached_bytes = 0

    def tail(self, row: int) -> bytes:
        """Returns the tail of one row, 0 ≤ row < rows.

        Raises: Corrupt when the row's block does not decompress.
        """
        block = int(self._first_rows.searchsorted(np.uint32(row), side="right")) - 1
        return self._tail_in(self._block(block), row - int(self._first_rows[block]))

    def tails(self, rows: npt.NDArray[np.integer]) -> list[bytes]:
        """Returns the tails of many rows, in their order; each block is decompressed once.

        Raises: Corrupt when a block does not decompress.
        """
        blocks = self._first_rows.searchsorted(rows.astype(np.uint32), side="right") - 1
        places = (rows - self._first_rows[blocks]).tolist()
        found: list[bytes] = [b""] * len(places)
        contents, opened = b"", -1
        for i in np.argsort(blocks, kind="stable").tolist():
            if blocks[i] != opened:
                opened = int(blocks[i])
                contents = self._block(opened)
            found[i] = self._tail_in(contents, places[i])
        return found

    @property
    def cached_bytes(self) -> int:
        return self._cached_bytes

    def _tail_in(self, block: bytes, place: int) -> bytes:
        (count,) = struct.unpack_from("<I", block)
        start = 0 if place == 0 else struct.unpack_from("<I", block, 4 * place)[0]
        (end,) = struct.unpack_from("<I", block, 4 * place + 4)
        base = 4 + 4 * count
        return block[base + start : base + end]

    def _block(self, number: int) -> bytes:
        with self._lock:
            held = self._blocks.get(number)
            if held is not None:
                self._blocks.move_to_end(number)
                return held
        block = self._decompressed(number)  # outside the lock: it is the slow part
        with self._lock:
            if number not in self._blocks and len(block) <= CACHE_BYTES:
                self._blocks[number] = block
                self._cached_bytes += len(block)
                while self._cached_bytes > CACHE_BYTES:
                    self._cached_bytes -= len(self._blocks.popitem(last=False)[1])
        return block

    def _decompressed(self, number: int) -> bytes:
        frame = self._contents[int(self._offsets[number]) : int(self._offsets[number + 1])]
        rows = int(self._first_rows[number + 1]) - int(self._first_rows[number])
        try:
            if zstandard.frame_content_size(frame) > BLOCK_BYTES_MAX:
                raise Corrupt(f"segment file {PAYLOAD} block {number} promises too many bytes")
            block: bytes = _decompressor().decompress(frame)
        except zstandard.ZstdError as error:
            raise Corrupt(f"segment file {PAYLOAD} block {number}: {error}") from error
        if len(block) < 4 + 4 * rows or struct.unpack_from("<I", block)[0] != rows:
            raise Corrupt(f"segment file {PAYLOAD} block {number} does not hold {rows} rows")
        return block


def _decompressor() -> zstandard.ZstdDecompressor:
    """Returns this thread's own, because one must not be used by two threads at once."""
    if not hasattr(_this_thread, "decompressor"):
        _this_thread.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _this_thread.decompressor
    return decompressor
