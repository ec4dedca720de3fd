"""The port to the bucket: the only durable state there is.

What the protocol requires of an implementation (docs/design/protocol.md):
R1 create is put-if-absent, atomic over all endpoints, of whole objects.
R2 a get or list that starts after a create returned sees it; a get of a missing key is not cached.
R3 objects never change once created.
"""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class PutOutcome(enum.Enum):
    CREATED = "created"
    """Stored by this very call, durably."""
    UNRESOLVED = "unresolved"
    """Exists, conflict, timeout, reset, 5xx: all alike. Only reading the key back tells more."""


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    key: str
    size_bytes: int


class Store(Protocol):
    """Keys are relative, '/'-separated, without empty, '.' or '..' parts.

    Every method raises Unavailable when the store cannot answer (after its own bounded retries) and
    never for a missing object. `create` and `create_file` never raise for an ambiguous put: they
    return UNRESOLVED, and bucket/create.py resolves it.
    """

    async def create(self, key: str, body: bytes) -> PutOutcome:
        """Puts the object if the key is absent; one attempt, no retry inside."""
        ...

    async def create_file(self, key: str, path: Path) -> PutOutcome:
        """Like create, with the contents of a local file, not read into memory at once."""
        ...

    async def get(self, key: str) -> bytes | None:
        """Returns the whole object, or None when the key is absent."""
        ...

    async def get_range(self, key: str, start: int, length: int) -> bytes | None:
        """Returns `length` bytes from `start` (fewer at the end), or None when absent."""
        ...

    async def list(self, prefix: str) -> list[ObjectEntry]:
        """Returns every object under `prefix` (which ends in '/' or is ''), in no order."""
        ...

    async def delete(self, key: str) -> None:
        """Removes the object; an absent key is no error. Only garbage collection calls this."""
        ...

    async def make_durable(self, prefix: str) -> None:
        """Makes sure that what a reader can see under `prefix` survives a power cut.

        Called before serving what was replayed (docs/design/protocol.md 1.4 step 6). Does nothing
        where an object that can be read is durable already, as in every object store.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Returns a file that may be memory-mapped in place, or None when bytes must be fetched."""
        ...

    async def close(self) -> None: ...
