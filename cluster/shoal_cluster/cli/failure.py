"""A failed command as one paragraph: what happened, whether it took effect, what to do."""

import json
from collections.abc import Mapping
from typing import IO, Any

import click

import shoal
from shoal_cluster.cli.output import printable
from shoal_cluster.domain.errors import Outcome, ShoalError

AnyShoalError = ShoalError | shoal.ShoalError
SHOAL_ERRORS = (ShoalError, shoal.ShoalError)
"""The cluster's tree and the SDK's, which mirrors it kind by kind."""

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_PROBLEMS = 3
"""`shoal check` found problems."""

NOTHING_CHANGED = "Nothing was changed."
MAYBE_CHANGED = "The change may have been applied or not."

_ADVICE: Mapping[str, str] = {
    "invalid_request": "Correct the command and run it again.",
    "unauthenticated": "Check the credentials and run it again.",
    "permission_denied": "Use an account that may do this.",
    "not_found": "Check the name; `shoal collection list` shows the collections.",
    "already_exists": "Choose another name, or drop what is there.",
    "conflict": "Resolve the conflict, then run it again.",
    "overloaded": "The cluster has more work than it can take: run it again later.",
    "unavailable": "Run it again once that is resolved; `shoal up` starts a cluster.",
    "indeterminate": "Look whether it took effect before you repeat it.",
    "corrupt": "`shoal check BUCKET` names every damaged object; restore those from a copy.",
    "internal": "This is a bug in Shoal; please report it with the message above.",
}


class CommandFailed(click.ClickException):
    """Ends a command with exit status 1 and a paragraph on stderr, and JSON on stdout if asked."""

    exit_code = EXIT_ERROR

    def __init__(
        self, error: AnyShoalError, *, as_json: bool, aftermath: str | None = None
    ) -> None:
        super().__init__(paragraph(error, aftermath=aftermath))
        self._document = {"error": fields_of(error)}
        self._as_json = as_json

    def show(self, file: IO[Any] | None = None) -> None:
        if self._as_json:
            click.echo(json.dumps(self._document, indent=2))
        click.echo(self.message, file=file, err=file is None)


def may_be_applied(error: AnyShoalError) -> bool:
    """Says whether the request may have taken effect although it failed."""
    return error.outcome in (Outcome.MAYBE_APPLIED, Outcome.MAYBE_APPLIED.value)


def paragraph(error: AnyShoalError, *, aftermath: str | None = None) -> str:
    """Returns the error as one paragraph for a person.

    aftermath: what remains after a command of many steps; takes the place of the advice, which is
    for a single request.
    """
    told = [f"error: {error.message.rstrip('. ')}."]
    if error.field and error.field not in error.message:
        told.append(f"Field: {error.field}.")
    if error.limit:
        told.append(f"Allowed: {error.limit}.")
    if aftermath is not None:
        return printable(" ".join([*told, aftermath]))
    told.append(MAYBE_CHANGED if may_be_applied(error) else NOTHING_CHANGED)
    if error.retry_after_ms is not None:
        told.append(f"Wait {error.retry_after_ms / 1000:g} s first.")
    told.append(_ADVICE.get(error.kind, _ADVICE["internal"]))
    return printable(" ".join(told))


def fields_of(error: AnyShoalError) -> dict[str, Any]:
    """Returns the error as a JSON object."""
    return {
        "kind": error.kind,
        "message": error.message,
        "outcome": "maybe_applied" if may_be_applied(error) else "not_applied",
        "field": error.field,
        "limit": error.limit,
        "retry_after_ms": error.retry_after_ms,
    }
