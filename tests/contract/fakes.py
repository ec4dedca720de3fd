"""Virtual time and seeded ids, for tests that must not wait nor vary."""

import asyncio
import random


class VirtualClock:
    """Time that passes only by sleeping, and then at once."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return round(1000 * self.now_s)

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        await asyncio.sleep(0)


class SeededIds:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def put_id(self) -> bytes:
        return self._rng.randbytes(16)

    def hex(self, size_bytes: int) -> str:
        return self._rng.randbytes(size_bytes).hex()
