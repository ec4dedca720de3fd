"""Compares the files of a segment with what the manifest says of them."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.manifest.manifest import FileEntry

READ_BYTES: Final = 1024 * 1024


def verify_files(paths: Mapping[str, Path], entries: Iterable[FileEntry]) -> None:
    """Reads every file and checks size and sha256. About 1 GB/s.

    paths: file name (`vectors`, …) to local file. entries: the manifest's FileEntry of each.

    Raises: Corrupt naming the key of the first file that is missing, cut short or altered.
    """
    for entry in entries:
        path = paths.get(entry.name)
        if path is None:
            raise Corrupt(f"segment file {entry.key} is missing")
        digest = hashlib.sha256()
        size_bytes = 0
        try:
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    digest.update(chunk)
                    size_bytes += len(chunk)
        except OSError as error:
            raise Corrupt(f"segment file {entry.key} cannot be read: {error}") from error
        if size_bytes != entry.size_bytes:
            raise Corrupt(
                f"segment file {entry.key} has {size_bytes} bytes, "
                f"the manifest says {entry.size_bytes}"
            )
        if digest.hexdigest() != entry.sha256:
            raise Corrupt(
                f"segment file {entry.key} has sha256 {digest.hexdigest()}, "
                f"the manifest says {entry.sha256}"
            )
