"""How failures of gRPC become errors, and which coordinator is used."""

from typing import Any

import grpc
import pytest

from shoal.errors import (
    KINDS,
    Indeterminate,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal.rpc import Addresses, error_of
from shoal_cluster.domain.errors import KINDS as SERVER_KINDS
from shoal_protos.status import ERROR_DETAIL_KEY, STATUS_OF_KIND
from shoal_protos.v1 import types_pb2
from tests.unit.client.fake_server import detail


class Failure(grpc.RpcError):
    """A failed call as grpc hands it over."""

    def __init__(self, code: grpc.StatusCode, details: str = "", metadata: Any = ()) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


def translated(failure: Failure, *, is_write: bool) -> ShoalError:
    return error_of(failure, is_write=is_write, address="here:7700")


CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("failure", "of_read", "of_write", "outcome_of_write"),
    [
        (Failure(CODE.UNAVAILABLE), Unavailable, Indeterminate, "maybe_applied"),
        (
            Failure(CODE.UNAVAILABLE, "failed to connect to all addresses; last error: refused"),
            Unavailable,
            Unavailable,
            "not_applied",
        ),
        (Failure(CODE.DEADLINE_EXCEEDED), Unavailable, Indeterminate, "maybe_applied"),
        (Failure(CODE.CANCELLED), Unavailable, Indeterminate, "maybe_applied"),
        (
            Failure(CODE.INTERNAL, "Internal error from Core"),
            Unavailable,
            Indeterminate,
            "maybe_applied",
        ),
        (Failure(CODE.RESOURCE_EXHAUSTED), Overloaded, Overloaded, "not_applied"),
        (
            Failure(CODE.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)"),
            InvalidRequest,
            InvalidRequest,
            "not_applied",
        ),
        (Failure(CODE.UNIMPLEMENTED), Internal, Internal, "not_applied"),
        (Failure(CODE.UNKNOWN, "Exception calling"), Internal, Internal, "maybe_applied"),
        (Failure(CODE.INTERNAL), Internal, Internal, "maybe_applied"),
        (Failure(CODE.NOT_FOUND), NotFound, NotFound, "not_applied"),
        (Failure(CODE.INVALID_ARGUMENT), InvalidRequest, InvalidRequest, "not_applied"),
    ],
)
def test_a_failure_without_a_detail_is_judged_by_its_status(
    failure: Failure,
    of_read: type[ShoalError],
    of_write: type[ShoalError],
    outcome_of_write: str,
) -> None:
    read = translated(failure, is_write=False)
    write = translated(failure, is_write=True)
    assert (type(read), read.outcome) == (of_read, "not_applied")
    assert (type(write), write.outcome) == (of_write, outcome_of_write)
    assert "here:7700" in read.message or "too large" in read.message


def with_detail(code: grpc.StatusCode, message: types_pb2.ErrorDetail) -> Failure:
    return Failure(code, metadata=((ERROR_DETAIL_KEY, message.SerializeToString()),))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_detail_of_the_server_decides(kind: str) -> None:
    message = detail(kind, field="k", limit="9", retry_after_ms=0)
    error = translated(with_detail(STATUS_OF_KIND[kind], message), is_write=True)
    assert type(error) is KINDS[kind]
    assert (error.field, error.limit, error.retry_after_ms) == ("k", "9", 0)
    assert error.outcome == "not_applied"


def test_sdk_server_and_status_table_know_the_same_kinds() -> None:
    assert STATUS_OF_KIND.keys() == KINDS.keys() == SERVER_KINDS.keys()


def test_absent_fields_are_none() -> None:
    error = translated(with_detail(CODE.NOT_FOUND, detail("not_found")), is_write=False)
    assert (error.field, error.limit, error.retry_after_ms) == (None, None, None)


def test_an_unknown_kind_is_internal_and_an_absent_outcome_uncertain() -> None:
    message = types_pb2.ErrorDetail(kind="eaten_by_shark", message="gone")
    error = translated(with_detail(CODE.ABORTED, message), is_write=True)
    assert type(error) is Internal
    assert error.outcome == "maybe_applied"


def test_a_garbled_detail_falls_back_to_the_status() -> None:
    garbled = Failure(CODE.NOT_FOUND, metadata=((ERROR_DETAIL_KEY, b"\xff\xff"),))
    assert type(translated(garbled, is_write=False)) is NotFound


def test_only_the_one_who_noticed_first_moves_on() -> None:
    addresses = Addresses(["a:1", "b:1"])
    addresses.leave("a:1")
    addresses.leave("a:1")
    assert addresses.current == "b:1"
    addresses.leave("b:1")
    assert addresses.current == "a:1"


@pytest.mark.parametrize("address", ["", [], ["a:1", ""], [7700]])
def test_an_address_that_is_none_is_refused(address: Any) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        Addresses(address)
