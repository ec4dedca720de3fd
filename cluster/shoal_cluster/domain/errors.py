"""The error tree. A kind exists only where the caller would act differently.

`outcome` says whether a write may have been applied; it alone drives the gRPC status table, the
SDK's retries and what a history checker may assume.

    ShoalError
    ├── InvalidRequest      the request is wrong; sending it again cannot help
    ├── Unauthenticated
    ├── PermissionDenied
    ├── NotFound
    ├── AlreadyExists
    ├── Conflict            a condition did not hold, or somebody else won
    ├── Overloaded          try again after `retry_after_ms`
    ├── Unavailable         nothing was done; try again, perhaps elsewhere
    │   └── NotPrimary      this replica does not take writes for the shard
    ├── Indeterminate       the write may or may not have been applied; retry the same request id
    ├── Corrupt             stored bytes fail their checksum or contradict each other
    └── Internal            a bug
"""

import enum
from collections.abc import Mapping
from typing import Any, ClassVar


class Outcome(enum.Enum):
    NOT_APPLIED = "not_applied"
    MAYBE_APPLIED = "maybe_applied"


class ShoalError(Exception):
    """Root of all errors that cross a package boundary.

    message: lower case, no full stop, with the values. field: the offending field of the request,
    dotted (`points[3].vector`). limit: the bound that was exceeded, as text with its unit.
    """

    kind: ClassVar[str] = "internal"
    outcome: Outcome = Outcome.NOT_APPLIED

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        limit: str | None = None,
        retry_after_ms: int | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.limit = limit
        self.retry_after_ms = retry_after_ms
        if outcome is not None:
            self.outcome = outcome


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


class NotPrimary(Unavailable):
    kind = "not_primary"


class Indeterminate(ShoalError):
    kind = "indeterminate"
    outcome = Outcome.MAYBE_APPLIED


class Corrupt(ShoalError):
    kind = "corrupt"


class Internal(ShoalError):
    kind = "internal"


KINDS: Mapping[str, type[ShoalError]] = {
    cls.kind: cls
    for cls in (
        InvalidRequest,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        Conflict,
        Overloaded,
        Unavailable,
        NotPrimary,
        Indeterminate,
        Corrupt,
        Internal,
    )
}


def to_wire(error: ShoalError) -> dict[str, Any]:
    """Returns the error as a msgpack-able map, for links."""
    return {
        "kind": error.kind,
        "message": error.message,
        "outcome": error.outcome.value,
        "field": error.field,
        "limit": error.limit,
        "retry_after_ms": error.retry_after_ms,
    }


def from_wire(fields: Mapping[str, Any]) -> ShoalError:
    """Rebuilds the error that `to_wire` described; an unknown kind becomes Internal."""
    cls = KINDS.get(str(fields.get("kind")), Internal)
    return cls(
        str(fields.get("message", "")),
        field=fields.get("field"),
        limit=fields.get("limit"),
        retry_after_ms=fields.get("retry_after_ms"),
        outcome=Outcome(fields.get("outcome", Outcome.NOT_APPLIED.value)),
    )
