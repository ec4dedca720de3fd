"""The `ids` file: which point a row is, at which sequence number, and the row of a point.

Invariant S-2: ids are unique within a segment. Lookup is a binary search over sorted 64-bit hashes,
then a comparison of the id's bytes; no Python object is held per row.
"""

import copy
from collections.abc import Sequence
from typing import Final, cast

import numpy as np
import numpy.typing as npt
import xxhash

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.point import row_hashes
from shoal_cluster.segment.format import (
    HEADER_BYTES,
    IDS,
    FileWriter,
    MappedFile,
    aligned,
    encode_header,
)

MAGIC: Final = b"SHOALIDS"
ABSENT: Final = -1

ID_BYTES_MAX: Final = 2**32 - 1
"""Offsets are u32: 16 million ids of the longest allowed length."""


def write_ids(
    writer: FileWriter,
    ids: Sequence[bytes],
    seqs: npt.NDArray[np.uint64],
    contents: npt.NDArray[np.uint64],
) -> None:
    """Writes the whole file. ids: unique, in row order. contents: their `content_hash`."""
    count = len(ids)
    assert len(set(ids)) == count, "S-2: ids are unique within a segment"
    offsets = np.zeros(count + 1, dtype=np.uint64)
    np.cumsum([len(one) for one in ids], out=offsets[1:])
    assert int(offsets[-1]) <= ID_BYTES_MAX, f"{int(offsets[-1])} id bytes in one segment"
    hashes = np.fromiter(
        (xxhash.xxh3_64_intdigest(one) for one in ids), dtype=np.uint64, count=count
    )
    order = np.argsort(hashes, kind="stable").astype(np.uint32)
    writer.write(encode_header(MAGIC, [count, int(offsets[-1])]))
    writer.write_array(offsets.astype(np.uint32))
    writer.write_array(seqs)
    writer.write_array(contents)
    writer.write_array(hashes[order])
    writer.write_array(order)
    writer.align()
    writer.write(b"".join(ids))


class IdTable:
    """Reads the mapped file; safe on any number of threads.

    seq_base: added to the sequence numbers in the file (manifest/manifest.py SegmentEntry).
    """

    def __init__(self, file: MappedFile, seq_base: int = 0) -> None:
        count, id_bytes, *_ = file.numbers(MAGIC)
        offset = HEADER_BYTES
        arrays = []
        for dtype, length in (
            (np.uint32, count + 1),
            (np.uint64, count),
            (np.uint64, count),
            (np.uint64, count),
            (np.uint32, count),
        ):
            arrays.append(file.array(dtype, length, offset))
            offset = aligned(offset + arrays[-1].nbytes)
        self.rows = count
        self._offsets = cast(npt.NDArray[np.uint32], arrays[0])
        self._stored_seqs = cast(npt.NDArray[np.uint64], arrays[1])
        self.contents = cast(npt.NDArray[np.uint64], arrays[2])
        self._seq_base = np.uint64(seq_base)
        self._hashes = cast(npt.NDArray[np.uint64], arrays[3])
        self._sorted_rows = cast(npt.NDArray[np.uint32], arrays[4])
        if offset + id_bytes != file.contents.nbytes:
            raise Corrupt(
                f"segment file {IDS} has {file.contents.nbytes} bytes, "
                f"its header promises {offset + id_bytes}"
            )
        self._bytes = file.contents[offset:]
        self.mapped_bytes = file.contents.nbytes

    def rebased(self, seq_base: int) -> "IdTable":
        """Returns the same table with another `seq_base`; nothing is copied."""
        other = copy.copy(self)
        other._seq_base = np.uint64(seq_base)
        return other

    def seqs_of(self, rows: npt.NDArray[np.integer] | slice) -> npt.NDArray[np.uint64]:
        """Returns the sequence numbers of rows."""
        found: npt.NDArray[np.uint64] = self._stored_seqs[rows] + self._seq_base
        return found

    def seq_of(self, row: int) -> int:
        """Returns the sequence number of a row."""
        return int(self._stored_seqs[row]) + int(self._seq_base)

    def hashes_of(self, rows: npt.NDArray[np.integer] | slice) -> npt.NDArray[np.uint64]:
        """Returns the hashes of rows (domain/point.py `row_hash`)."""
        return row_hashes(self.contents[rows], self.seqs_of(rows))

    def rows_also_in(self, other: "IdTable") -> npt.NDArray[np.int64]:
        """Returns the rows whose ids may be in `other`: their hashes are. 0.2 µs a row."""
        inside = np.minimum(other._hashes.searchsorted(self._hashes), other.rows - 1)
        places = np.flatnonzero(other._hashes[inside] == self._hashes)
        found: npt.NDArray[np.int64] = self._sorted_rows[places].astype(np.int64)
        return found

    def id_of(self, row: int) -> bytes:
        """Returns the id of a row, 0 ≤ row < rows."""
        return bytes(self._bytes[int(self._offsets[row]) : int(self._offsets[row + 1])])

    def ids_of(self, rows: npt.NDArray[np.integer]) -> list[bytes]:
        """Returns the ids of many rows, in their order."""
        starts = self._offsets[rows].tolist()
        ends = self._offsets[rows + 1].tolist()
        contents = self._bytes
        return [bytes(contents[start:end]) for start, end in zip(starts, ends, strict=True)]

    def lookup_one(self, id_bytes: bytes) -> int:
        """Returns the row of a point, or ABSENT. About 3 µs."""
        wanted = np.uint64(xxhash.xxh3_64_intdigest(id_bytes))
        return self._matching_row(id_bytes, wanted, int(self._hashes.searchsorted(wanted)))

    def lookup(self, ids: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Returns the row of each point, ABSENT where the segment has none."""
        found = np.full(len(ids), ABSENT, dtype=np.int64)
        wanted = np.fromiter(
            (xxhash.xxh3_64_intdigest(one) for one in ids), dtype=np.uint64, count=len(ids)
        )
        places = self._hashes.searchsorted(wanted)
        # Most ids of a batch are in other segments: only equal hashes are looked at in Python.
        inside = np.minimum(places, self.rows - 1)
        likely = np.flatnonzero(self._hashes[inside] == wanted)
        rows = self._sorted_rows[places[likely]]
        for i, row, held in zip(likely.tolist(), rows.tolist(), self.ids_of(rows), strict=True):
            if held == ids[i]:
                found[i] = row
            else:
                found[i] = self._matching_row(ids[i], wanted[i], int(places[i]))
        return found

    def _matching_row(self, id_bytes: bytes, wanted: np.uint64, place: int) -> int:
        """Returns the row that has both hash and bytes; equal hashes stand side by side."""
        while place < self.rows and self._hashes[place] == wanted:
            row = int(self._sorted_rows[place])
            if self._bytes[int(self._offsets[row]) : int(self._offsets[row + 1])] == id_bytes:
                return row
            place += 1
        return ABSENT
