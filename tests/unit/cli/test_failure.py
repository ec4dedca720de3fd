import pytest

import shoal
from shoal_cluster.cli import failure
from shoal_cluster.cli.failure import MAYBE_CHANGED, NOTHING_CHANGED, fields_of, paragraph
from shoal_cluster.domain import errors


def test_paragraph_says_what_happened_what_took_effect_and_what_to_do() -> None:
    told = paragraph(errors.Conflict("port 7700 is in use", field="grpc_port", limit="a free port"))
    assert told == (
        "error: port 7700 is in use. Field: grpc_port. Allowed: a free port. "
        "Nothing was changed. Resolve the conflict, then run it again."
    )


def test_indeterminate_write_is_never_called_failed() -> None:
    for error in (
        errors.Indeterminate("no answer"),
        shoal.Indeterminate("no answer", outcome="maybe_applied"),
        shoal.Internal("lost", outcome="maybe_applied"),
    ):
        told = paragraph(error)
        assert MAYBE_CHANGED in told
        assert NOTHING_CHANGED not in told


def test_time_to_wait_is_told() -> None:
    assert "Wait 1.5 s first." in paragraph(shoal.Overloaded("busy", retry_after_ms=1500))


def test_control_characters_of_a_foreign_message_are_written_out() -> None:
    assert "\x1b" not in paragraph(errors.Internal("\x1b[2J"))


def test_aftermath_replaces_the_advice_for_single_requests() -> None:
    told = paragraph(errors.Unavailable("gone"), aftermath="All was stopped.")
    assert told == "error: gone. All was stopped."


@pytest.mark.parametrize("kind", sorted({*errors.KINDS, *shoal.errors.KINDS} - {"not_primary"}))
def test_every_kind_of_error_has_its_advice(kind: str) -> None:
    assert failure._ADVICE[kind] in paragraph(errors.KINDS[kind]("x"))


@pytest.mark.parametrize("tree", [errors, shoal.errors])
def test_both_trees_give_the_same_fields(tree: object) -> None:
    error = tree.KINDS["not_found"]("no such", field="name")  # type: ignore[attr-defined]
    assert fields_of(error) == {
        "kind": "not_found",
        "message": "no such",
        "outcome": "not_applied",
        "field": "name",
        "limit": None,
        "retry_after_ms": None,
    }
