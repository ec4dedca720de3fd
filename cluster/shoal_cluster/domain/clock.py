"""Time, injected. Only this file may ask the operating system what time it is.

No safety property of Shoal depends on a clock: `monotonic_s` serves timeouts and staleness figures,
`wall_ms` serves timestamps that people read, and how long ago a file of this machine was written.
"""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Returns seconds that never go back, comparable only within this process."""
        ...

    def wall_ms(self) -> int:
        """Returns milliseconds since 1970-01-01 UTC, for people; never compared across machines."""
        ...

    async def sleep(self, duration_s: float) -> None: ...


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
