"""Exceptions, one for each kind of error the server tells apart.

    ShoalError
    ├── InvalidRequest      the request is wrong; sending it again cannot help
    ├── Unauthenticated
    ├── PermissionDenied
    ├── NotFound
    ├── AlreadyExists
    ├── Conflict            a condition did not hold, or somebody else won
    ├── Overloaded          try again after `retry_after_ms`
    ├── Unavailable         nothing was done; try again, perhaps elsewhere
    ├── Indeterminate       the write may or may not have been applied
    ├── Corrupt             stored bytes fail their checksum or contradict each other
    └── Internal            a bug

The SDK has already retried what is safe to retry when one of these reaches the caller.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

Outcome = Literal["not_applied", "maybe_applied"]


class ShoalError(Exception):
    """Root of everything the SDK raises about a request.

    message: lower case, with the values. outcome: whether a write may have been applied all the
    same. field: the offending field of the request, dotted. limit: the bound that was exceeded, as
    text with its unit. retry_after_ms: how long the server asks to wait. attempts: how often the
    request was sent. request: the write whose result is unknown, for `Client.resolve`; else None.
    """

    kind: ClassVar[str] = "internal"
    request: object | None = None

    def __init__(
        self,
        message: str,
        *,
        outcome: Outcome = "not_applied",
        field: str | None = None,
        limit: str | None = None,
        retry_after_ms: int | None = None,
        attempts: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.outcome: Outcome = outcome
        self.field = field
        self.limit = limit
        self.retry_after_ms = retry_after_ms
        self.attempts = attempts

    def __str__(self) -> str:
        notes = [
            f"field: {self.field}" if self.field else "",
            f"limit: {self.limit}" if self.limit else "",
            f"retry after {self.retry_after_ms} ms" if self.retry_after_ms is not None else "",
            f"sent {self.attempts} times" if self.attempts > 1 else "",
            "may have been applied" if self.outcome == "maybe_applied" else "",
        ]
        told = "; ".join(note for note in notes if note)
        return f"{self.message} ({told})" if told else self.message


class InvalidRequest(ShoalError):
    kind = "invalid_request"


class Unauthenticated(ShoalError):
    kind = "unauthenticated"


class PermissionDenied(ShoalError):
    kind = "permission_denied"


class NotFound(ShoalError):
    kind = "not_found"


class AlreadyExists(ShoalError):
    kind = "already_exists"


class Conflict(ShoalError):
    kind = "conflict"


class Overloaded(ShoalError):
    kind = "overloaded"


class Unavailable(ShoalError):
    kind = "unavailable"


class Indeterminate(ShoalError):
    """The write may or may not have been applied; `Client.resolve` finds out.

    With `field` "request_id.…" the cluster no longer knows either: read the points.
    """

    kind = "indeterminate"


class Corrupt(ShoalError):
    kind = "corrupt"


class Internal(ShoalError):
    kind = "internal"


KINDS: Mapping[str, type[ShoalError]] = {
    error.kind: error
    for error in (
        InvalidRequest,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        Conflict,
        Overloaded,
        Unavailable,
        Indeterminate,
        Corrupt,
        Internal,
    )
} | {"not_primary": Unavailable}
"""Which exception stands for a kind; to a caller, not_primary is one more way to be unavailable."""
