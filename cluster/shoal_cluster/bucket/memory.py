"""The in-memory store: for tests and simulations. Nothing in it outlives the process."""

import asyncio
from pathlib import Path

from shoal_cluster.bucket.keys import check_key, check_prefix
from shoal_cluster.bucket.store import ObjectEntry, PutOutcome


class MemoryStore:
    """Store over a dict. Two stores given the same dict are two handles to one bucket.

    Every operation gives way to other tasks once and then takes effect at one instant, so a run is
    as deterministic as its event loop.
    """

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects: dict[str, bytes] = {} if objects is None else objects

    async def create(self, key: str, body: bytes) -> PutOutcome:
        check_key(key)
        await asyncio.sleep(0)
        if key in self.objects:
            return PutOutcome.UNRESOLVED
        self.objects[key] = bytes(body)
        return PutOutcome.CREATED

    async def create_file(self, key: str, path: Path) -> PutOutcome:
        return await self.create(key, path.read_bytes())

    async def get(self, key: str) -> bytes | None:
        check_key(key)
        await asyncio.sleep(0)
        return self.objects.get(key)

    async def get_range(self, key: str, start: int, length: int) -> bytes | None:
        body = await self.get(key)
        return None if body is None else body[start : start + length]

    async def list(self, prefix: str) -> list[ObjectEntry]:
        check_prefix(prefix)
        await asyncio.sleep(0)
        return [
            ObjectEntry(key, len(body))
            for key, body in self.objects.items()
            if key.startswith(prefix)
        ]

    async def delete(self, key: str) -> None:
        check_key(key)
        await asyncio.sleep(0)
        self.objects.pop(key, None)

    async def make_durable(self, prefix: str) -> None:
        check_prefix(prefix)
        await asyncio.sleep(0)

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    async def close(self) -> None:
        return None
