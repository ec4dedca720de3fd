"""The files of a segment: names, headers, alignment, writing with a checksum, mapping.

Layouts are in segment/README.md byte by byte. Every file but `meta` starts with the same 64-byte
header, so that the arrays behind it are aligned to a cache line.
"""

import hashlib
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.errors import Conflict, Corrupt, Unavailable

FORMAT_VERSION: Final = 1
VECTORS_MAGIC: Final = b"SHOALVEC"
ALIGNMENT: Final = 64
"""One cache line, and what AVX-512 loads want."""

VECTORS: Final = "vectors"
CODES: Final = "codes"
IDS: Final = "ids"
PAYLOAD: Final = "payload"
ATTRIBUTES: Final = "attributes"
META: Final = "meta"
REQUIRED_FILES: Final = (VECTORS, IDS, PAYLOAD, ATTRIBUTES, META)
"""`codes` is present unless the family is flat."""

WRITE_BYTES: Final = 4 * 1024 * 1024
"""Bytes handed to the disk at once, so that a mapped source is not copied whole."""

_HEADER: Final = struct.Struct("<8sII6Q")
_NUMBERS: Final = 6
HEADER_BYTES: Final = _HEADER.size


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltFile:
    """One finished file of a segment on the local disk; sha256 in hexadecimal."""

    name: str
    path: Path
    size_bytes: int
    sha256: str


class FileWriter:
    """Writes one file of a segment and hashes it on the way.

    Not fsynced: the store that uploads it makes it durable. Raises Unavailable when the disk
    refuses (nothing of the segment counts until a manifest names it).
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._name = name
        self._path = directory / name
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("xb")
        except OSError as error:
            raise self._refused(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def write(self, part: bytes | memoryview) -> None:
        """Appends bytes."""
        assert self._file is not None, "the writer is used inside its `with` block"
        view = memoryview(part).cast("B")
        try:
            for start in range(0, view.nbytes, WRITE_BYTES):
                chunk = view[start : start + WRITE_BYTES]
                self._file.write(chunk)
                self._digest.update(chunk)
        except OSError as error:
            raise self._refused(error) from error
        self._size_bytes += view.nbytes

    def write_array(self, array: npt.NDArray[np.generic]) -> None:
        """Appends a C-contiguous array's little-endian bytes at the next aligned offset."""
        self.align()
        if array.size:
            self.write(array.data)

    def align(self) -> None:
        """Appends zeros up to a multiple of ALIGNMENT."""
        self.write(bytes(-self._size_bytes % ALIGNMENT))

    def finish(self) -> BuiltFile:
        """Closes the file and returns what was written."""
        assert self._file is not None, "the writer is used inside its `with` block"
        try:
            self._file.close()
        except OSError as error:
            raise self._refused(error) from error
        return BuiltFile(
            name=self._name,
            path=self._path,
            size_bytes=self._size_bytes,
            sha256=self._digest.hexdigest(),
        )

    def _refused(self, error: OSError) -> Unavailable:
        return Unavailable(f"segment file {self._path} cannot be written: {error}")


def encode_header(magic: bytes, numbers: Sequence[int]) -> bytes:
    """Returns a 64-byte header: magic, format version, and up to six numbers of the file's own."""
    padded = [*numbers, *[0] * (_NUMBERS - len(numbers))]
    return _HEADER.pack(magic, FORMAT_VERSION, 0, *padded)


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedFile:
    """A whole file as read-only memory, with the key or path that messages name it by."""

    name: str
    contents: memoryview
    mapping: mmap.mmap

    def numbers(self, magic: bytes) -> tuple[int, ...]:
        """Returns the six numbers of the header.

        Raises: Corrupt when the file is another kind or shorter than a header; Conflict when a
        newer Shoal wrote it.
        """
        if self.contents.nbytes < HEADER_BYTES:
            raise Corrupt(f"segment file {self.name} has {self.contents.nbytes} bytes, no header")
        found, version, _, *numbers = _HEADER.unpack_from(self.contents)
        if found == magic and version > FORMAT_VERSION:
            raise Conflict(
                f"segment file {self.name} has format {version}, this server reads up to "
                f"{FORMAT_VERSION}; upgrade the server"
            )
        if found != magic or version != FORMAT_VERSION:
            raise Corrupt(
                f"segment file {self.name} starts with {found!r} version {version}, "
                f"not {magic!r} version {FORMAT_VERSION}"
            )
        return tuple(numbers)

    def array(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[np.generic]:
        """Returns a read-only view of `count` values, without copying.

        Raises: Corrupt when the file ends before them.
        """
        end = offset + count * np.dtype(dtype).itemsize
        if end > self.contents.nbytes:
            raise Corrupt(
                f"segment file {self.name} has {self.contents.nbytes} bytes, "
                f"its header promises {end}"
            )
        return np.frombuffer(self.contents, dtype=dtype, count=count, offset=offset)


def map_file(name: str, path: Path) -> MappedFile:
    """Maps a file; it stays mapped as long as anything made from it is alive.

    Raises: Corrupt when the file is missing or empty.
    """
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise Corrupt(f"segment file {name} cannot be mapped from {path}: {error}") from error
    return MappedFile(name=name, contents=memoryview(mapping), mapping=mapping)


def aligned(offset: int) -> int:
    """Returns the next multiple of ALIGNMENT at or after `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
