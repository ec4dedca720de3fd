"""Stores that break a requirement, as real ones and real gateways have done."""

import asyncio

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import ObjectEntry, PutOutcome


class OverwritingStore(MemoryStore):
    """Accepts the precondition and ignores it, like some S3 gateways: breaks R1."""

    async def create(self, key: str, body: bytes) -> PutOutcome:
        await super().create(key, body)
        self.objects[key] = body
        return PutOutcome.CREATED


class CheckThenPutStore(MemoryStore):
    """Checks the precondition, then puts, with no lock around both: breaks R1 under a race only."""

    async def create(self, key: str, body: bytes) -> PutOutcome:
        if await self.get(key) is not None:
            return PutOutcome.UNRESOLVED
        await asyncio.sleep(0)
        self.objects[key] = body
        return PutOutcome.CREATED


class CachedAbsenceStore(MemoryStore):
    """Remembers every 404 it gave, like a cache in front of the bucket: breaks R2."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        super().__init__(objects)
        self._absent: set[str] = set()

    async def get(self, key: str) -> bytes | None:
        body = None if key in self._absent else await super().get(key)
        if body is None:
            self._absent.add(key)
        return body


class LateListingStore(MemoryStore):
    """Lists what was there at the previous listing: breaks R2."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        super().__init__(objects)
        self._previous: list[ObjectEntry] = []

    async def list(self, prefix: str) -> list[ObjectEntry]:
        previous, self._previous = self._previous, await super().list(prefix)
        return previous


class UndeletingStore(MemoryStore):
    """Accepts deletes and does nothing."""

    async def delete(self, key: str) -> None:
        return None
