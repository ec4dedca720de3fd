"""Names of things, one type each, so that a shard number is never mistaken for a slot."""

import secrets
from typing import NewType, Protocol
from uuid import UUID

CollectionId = NewType("CollectionId", str)
"""32 hex digits, chosen once when the collection is created; names may be reused, ids never."""

PointId = NewType("PointId", str)
"""Chosen by the user, 1 to 256 bytes of UTF-8."""

SegmentId = NewType("SegmentId", str)
"""`{epoch:020}-{n:06}-{8 hex}`: carries the epoch that created it and is never reused."""

ServerId = NewType("ServerId", str)
ClientId = NewType("ClientId", str)

ShardNumber = NewType("ShardNumber", int)
Slot = NewType("Slot", int)
NO_SLOT = Slot(0)
"""Before the first slot."""
Epoch = NewType("Epoch", int)
Seq = NewType("Seq", int)
ManifestVersion = NewType("ManifestVersion", int)


class IdGenerator(Protocol):
    """Source of unique ids; the simulation passes a seeded one."""

    def put_id(self) -> bytes:
        """Returns 16 random bytes that name one PUT body for ever."""
        ...

    def hex(self, size_bytes: int) -> str:
        """Returns `2 * size_bytes` random hex digits."""
        ...


class SystemIdGenerator:
    """Ids from the operating system's random source."""

    def put_id(self) -> bytes:
        return secrets.token_bytes(16)

    def hex(self, size_bytes: int) -> str:
        return secrets.token_hex(size_bytes)


def cluster_uuid_text(raw: bytes) -> str:
    """Returns the usual dashed form of a 16-byte cluster uuid."""
    return str(UUID(bytes=raw))
