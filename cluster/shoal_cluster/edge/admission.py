"""Bounds what one coordinator works on at a time; what is above is refused, typed, at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from shoal_cluster.domain.errors import Overloaded
from shoal_cluster.domain.limits import MIB

REQUESTS_IN_FLIGHT_MAX = 1024
"""At 1,000 requests a second and core, a second of work: queueing longer helps nobody."""

REQUEST_BYTES_IN_FLIGHT_MAX = 256 * MIB
"""Messages being worked on; eight of the largest. Bounds the memory of a coordinator."""

RETRY_AFTER_MS = 100


class Admission:
    """Guards both bounds. Used from one event loop."""

    __slots__ = ("_bytes", "_bytes_max", "_requests", "_requests_max")

    def __init__(
        self,
        *,
        requests_max: int = REQUESTS_IN_FLIGHT_MAX,
        bytes_max: int = REQUEST_BYTES_IN_FLIGHT_MAX,
    ) -> None:
        self._requests = 0
        self._bytes = 0
        self._requests_max = requests_max
        self._bytes_max = bytes_max

    @property
    def requests(self) -> int:
        """Requests being worked on."""
        return self._requests

    @contextmanager
    def admit(self, size_bytes: int) -> Iterator[None]:
        """Counts a request for as long as it is worked on.

        Raises: Overloaded when it would exceed a bound (nothing was applied).
        """
        self.enter(size_bytes)
        try:
            yield
        finally:
            self.leave(size_bytes)

    def enter(self, size_bytes: int) -> None:
        """As `admit`; `leave` must follow unless it raises. Cheaper on the path of a search."""
        if self._requests >= self._requests_max:
            raise Overloaded(
                f"{self._requests} requests are in flight at this coordinator",
                limit=f"{self._requests_max} requests",
                retry_after_ms=RETRY_AFTER_MS,
            )
        # An idle coordinator takes any message, however small its bound is set.
        if self._bytes and self._bytes + size_bytes > self._bytes_max:
            raise Overloaded(
                f"requests of {self._bytes} bytes are in flight at this coordinator",
                limit=f"{self._bytes_max} bytes",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._requests += 1
        self._bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        self._requests -= 1
        self._bytes -= size_bytes
