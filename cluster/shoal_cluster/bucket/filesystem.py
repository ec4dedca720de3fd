"""The system calls of a durable put, behind a port that a power-cut simulator can record.

Reads are not here: after a simulated power cut the surviving state is laid out in a real directory.
"""

import os
from pathlib import Path
from typing import Protocol

TEMPORARY_PREFIX = ".tmp-"
"""`.tmp-{pid}-{process start}-{store}-{n}`, in the root: who wrote it, and is that one alive."""


class FileSystem(Protocol):
    """Every method is one step that a crash may follow; every method raises OSError."""

    def open_temporary(self, path: Path) -> int:
        """Creates a file that must not exist and returns its descriptor."""
        ...

    def write(self, descriptor: int, piece: memoryview) -> int:
        """Appends; returns how many bytes were taken, which may be fewer than given."""
        ...

    def fsync(self, descriptor: int) -> None: ...

    def close(self, descriptor: int) -> None: ...

    def link(self, source: Path, target: Path) -> None:
        """Gives the file a second name; FileExistsError when the name is taken."""
        ...

    def unlink(self, path: Path) -> None: ...

    def make_directory(self, path: Path) -> None:
        """Makes one directory; FileExistsError when there is something of that name."""
        ...

    def remove_directory(self, path: Path) -> None:
        """Removes a directory, which must be empty."""
        ...

    def fsync_directory(self, path: Path) -> None: ...


class PosixFileSystem:
    """The operating system. All calls let other Python threads run while they wait."""

    def open_temporary(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, piece: memoryview) -> int:
        return os.write(descriptor, piece)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        os.mkdir(path, 0o755)

    def remove_directory(self, path: Path) -> None:
        os.rmdir(path)

    def fsync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def process_start(pid: int) -> str | None:
    """Returns a text that tells this life of a process number from others; None when it is dead.

    Linux: start time in ticks since boot, field 22 of /proc/PID/stat. Elsewhere "0" for all living.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            # The second field is the program's name in parentheses and may hold anything.
            return file.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "0"
    return "0"
