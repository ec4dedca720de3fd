"""Reads files and objects piece by piece, at a bounded rate, to compare their checksums."""

import functools
import hashlib
from collections.abc import Generator
from pathlib import Path

import structlog

from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.limits import MIB
from shoal_cluster.manifest.manifest import FileEntry
from shoal_cluster.shard.compute import Compute
from shoal_cluster.shard.segment_files import FETCH_PIECE_BYTES

_log = structlog.get_logger()

READS_MAX = 2
"""A transfer may be damaged where the object is not: only the second bad reading counts."""

_PIECE_BYTES = 1 * MIB

Digest = tuple[int, str]
"""Size and sha256 (lower-case hex)."""


class PacedReader:
    """bytes_per_s: in the long run, by all who read through this reader together."""

    def __init__(self, clock: Clock, compute: Compute, *, bytes_per_s: float) -> None:
        self._clock = clock
        self._compute = compute
        self._bytes_per_s = bytes_per_s
        self._free_s = float("-inf")
        self.read_bytes = 0

    async def pace(self, size_bytes: int) -> None:
        """Waits as long as so many bytes, just read, take at this rate."""
        self.read_bytes += size_bytes
        now_s = self._clock.monotonic_s()
        self._free_s = max(self._free_s, now_s) + size_bytes / self._bytes_per_s
        await self._clock.sleep(self._free_s - now_s)

    async def digest_of_file(self, path: Path) -> Digest | None:
        """Returns the digest of a file, None when it is not there."""
        digest = hashlib.sha256()
        size_bytes = 0
        pieces = _pieces(path)
        try:
            advance = functools.partial(_hash_next, pieces, digest)
            while piece_bytes := await self._compute.run(advance):
                size_bytes += piece_bytes
                await self.pace(piece_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            # A medium error: as bad as a wrong byte, and no less final.
            _log.error("file_unreadable", path=str(path), reason=str(error))
            return size_bytes, f"unreadable ({error.strerror})"
        finally:
            pieces.close()
        return size_bytes, digest.hexdigest()

    async def digest_of_object(self, store: Store, file: FileEntry) -> Digest | None:
        """Returns the digest of a stored object, None when it is absent; see `differs`.

        Of an object that is longer than listed no more than one byte too many is read.

        Raises: Unavailable when the bucket does not answer.
        """
        digest = hashlib.sha256()
        size_bytes = 0
        while (left := file.size_bytes + 1 - size_bytes) > 0:
            length = min(FETCH_PIECE_BYTES, left)
            piece = await store.get_range(file.key, size_bytes, length)
            if piece is None:
                return None
            size_bytes += len(piece)
            await self._compute.run(functools.partial(digest.update, piece))
            await self.pace(len(piece))
            if len(piece) < length:
                break
        return size_bytes, digest.hexdigest()


def differs(file: FileEntry, found: Digest | None) -> str:
    """Says how an object differs from its manifest entry, "" when it does not."""
    if found is None:
        return f"object {file.key} is gone"
    size_bytes, sha256 = found
    if found == (file.size_bytes, file.sha256):
        return ""
    return (
        f"object {file.key} has {size_bytes} bytes with sha256 {sha256}; "
        f"the manifest lists {file.size_bytes} with {file.sha256}"
    )


def _pieces(path: Path) -> Generator[bytes]:
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _hash_next(pieces: Generator[bytes], digest: "hashlib._Hash") -> int:
    """Returns how many bytes were hashed, 0 at the end."""
    piece = next(pieces, b"")
    digest.update(piece)
    return len(piece)
