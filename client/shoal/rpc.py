"""The gRPC side that both clients share: methods, channel settings, addresses, errors."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import grpc
from google.protobuf.message import DecodeError, Message

from shoal.errors import (
    KINDS,
    Indeterminate,
    Internal,
    InvalidRequest,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_protos.status import ERROR_DETAIL_KEY, STATUS_OF_KIND
from shoal_protos.v1 import (
    admin_pb2,
    collections_pb2,
    loads_pb2,
    points_pb2,
    search_pb2,
    types_pb2,
)
from shoal_protos.v1.lanes_pb2_grpc import LanesStub
from shoal_protos.v1.points_pb2_grpc import PointsStub
from shoal_protos.v1.search_pb2_grpc import SearchStub

DEFAULT_ADDRESS = "127.0.0.1:7700"

TIMEOUT_S = 30.0
"""A call's default deadline: a shard's takeover takes seconds, and several may come in a row."""

REQUEST_BYTES_MAX = 32 * 1024 * 1024
"""The server's bound on one request; larger ones are refused here, before they are sent."""

REPLY_BYTES_MAX = 256 * 1024 * 1024
"""256 queries of 1,000 hits with 256-dimensional vectors, the largest reply worth having."""

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_receive_message_length", REPLY_BYTES_MAX),
    # Retries are decided in retry.py, where request ids and outcomes are known.
    ("grpc.enable_retries", 0),
    # The default waits up to 2 minutes before it tries a restarted server again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

STATUS_KINDS: Mapping[grpc.StatusCode, type[ShoalError]] = {
    status: KINDS[kind] for kind, status in STATUS_OF_KIND.items() if kind != "indeterminate"
}
"""What a status means when no ErrorDetail came with it. UNKNOWN is absent: without a detail it is
gRPC's word for an exception in the server."""

_OUTCOMES: Mapping[int, Outcome] = {types_pb2.OUTCOME_NOT_APPLIED: "not_applied"}

CLOSED = "the client is closed"

_LOST_IN_TRANSIT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)

_NEVER_SENT = "failed to connect to all addresses"
"""How gRPC's balancer refuses a call for want of a connection: nothing left this process."""

_AIO_WRITE_FAILED = "Internal error from Core"
"""What grpc.aio reports, as INTERNAL, when it writes to a stream that has just ended; it overwrites
the status the server gave (grpc/grpc issue 36066). The next stream shows the true one."""


class Method(enum.Enum):
    """The unary calls of the API; the value is the gRPC path."""

    CREATE_COLLECTION = "/shoal.v1.Collections/CreateCollection"
    DESCRIBE_COLLECTION = "/shoal.v1.Collections/DescribeCollection"
    LIST_COLLECTIONS = "/shoal.v1.Collections/ListCollections"
    ALTER_COLLECTION = "/shoal.v1.Collections/AlterCollection"
    DROP_COLLECTION = "/shoal.v1.Collections/DropCollection"
    UPSERT = "/shoal.v1.Points/Upsert"
    GET = "/shoal.v1.Points/Get"
    PATCH_ATTRIBUTES = "/shoal.v1.Points/PatchAttributes"
    DELETE = "/shoal.v1.Points/Delete"
    DELETE_BY_FILTER = "/shoal.v1.Points/DeleteByFilter"
    SCROLL = "/shoal.v1.Points/Scroll"
    SCROLL_ORDERED = "/shoal.v1.Points/ScrollOrdered"
    COUNT = "/shoal.v1.Points/Count"
    FACETS = "/shoal.v1.Points/Facets"
    SEARCH = "/shoal.v1.Search/Search"
    RECOMMEND = "/shoal.v1.Search/Recommend"
    SEARCH_DIVERSE = "/shoal.v1.Search/SearchDiverse"
    SEARCH_GROUPS = "/shoal.v1.Search/SearchGroups"
    STAGE_CHUNK = "/shoal.v1.Loads/StageChunk"
    DESCRIBE_LOAD = "/shoal.v1.Loads/DescribeLoad"
    COMMIT_LOAD = "/shoal.v1.Loads/CommitLoad"
    ABORT_LOAD = "/shoal.v1.Loads/AbortLoad"
    STATUS = "/shoal.v1.Admin/Status"


RESPONSES: Mapping[Method, type[Message]] = {
    Method.CREATE_COLLECTION: collections_pb2.CreateCollectionResponse,
    Method.DESCRIBE_COLLECTION: collections_pb2.DescribeCollectionResponse,
    Method.LIST_COLLECTIONS: collections_pb2.ListCollectionsResponse,
    Method.ALTER_COLLECTION: collections_pb2.AlterCollectionResponse,
    Method.DROP_COLLECTION: collections_pb2.DropCollectionResponse,
    Method.UPSERT: points_pb2.UpsertResponse,
    Method.GET: points_pb2.GetResponse,
    Method.PATCH_ATTRIBUTES: points_pb2.PatchAttributesResponse,
    Method.DELETE: points_pb2.DeleteResponse,
    Method.DELETE_BY_FILTER: points_pb2.DeleteByFilterResponse,
    Method.SCROLL: points_pb2.ScrollResponse,
    Method.SCROLL_ORDERED: points_pb2.ScrollOrderedResponse,
    Method.COUNT: points_pb2.CountResponse,
    Method.FACETS: points_pb2.FacetsResponse,
    Method.SEARCH: search_pb2.SearchResponse,
    Method.RECOMMEND: search_pb2.RecommendResponse,
    Method.SEARCH_DIVERSE: search_pb2.SearchDiverseResponse,
    Method.SEARCH_GROUPS: search_pb2.SearchGroupsResponse,
    Method.STAGE_CHUNK: loads_pb2.StageChunkResponse,
    Method.DESCRIBE_LOAD: loads_pb2.DescribeLoadResponse,
    Method.COMMIT_LOAD: loads_pb2.CommitLoadResponse,
    Method.ABORT_LOAD: loads_pb2.AbortLoadResponse,
    Method.STATUS: admin_pb2.StatusResponse,
}


@dataclass(frozen=True, slots=True)
class Stubs:
    """An open channel to one address, sync or asyncio, and what can be called on it."""

    channel: Any
    unary: Mapping[Method, Any]
    upsert_stream: Any
    search_range: Any
    connect: Any


def parsed(method: Method, response: memoryview) -> Message:
    """Returns a serialised response as the message it is."""
    # Protobuf reads any buffer, though it says bytes.
    return RESPONSES[method].FromString(cast(bytes, response))


def make_stubs(channel: Any) -> Stubs:
    unary = {
        method: channel.unary_unary(
            method.value,
            request_serializer=serialised,
            response_deserializer=response.FromString,
        )
        for method, response in RESPONSES.items()
    }
    return Stubs(
        channel=channel,
        unary=unary,
        upsert_stream=PointsStub(channel).UpsertStream,
        search_range=SearchStub(channel).SearchRange,
        connect=LanesStub(channel).Connect,
    )


def serialised(request: Message | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


class Addresses:
    """The coordinators a client may use, and which one it uses now.

    Every coordinator can answer everything, so a client stays with one until it fails.
    """

    def __init__(self, addresses: str | Iterable[str]) -> None:
        self._all = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self._all or not all(isinstance(each, str) and each for each in self._all):
            raise InvalidRequest(
                "a client needs at least one address such as '127.0.0.1:7700'", field="address"
            )
        self._current = 0

    @property
    def current(self) -> str:
        return self._all[self._current]

    def leave(self, address: str) -> None:
        """Goes on to the next address, unless somebody else has done so already."""
        if self.current == address:
            self._current = (self._current + 1) % len(self._all)


TransportName = Literal["auto", "grpc"]


def checked_transport(name: TransportName) -> TransportName:
    """Raises: InvalidRequest unless it is one of the two."""
    if name not in get_args(TransportName):
        raise InvalidRequest(
            f"transport {name!r} is not known",
            field="transport",
            limit="'auto' (fast lanes where they work) or 'grpc'",
        )
    return name


def checked_timeout_s(timeout_s: float) -> float:
    """Raises: InvalidRequest unless the timeout is above 0."""
    if not timeout_s > 0:
        raise InvalidRequest(f"timeout_s {timeout_s} must be above 0", field="timeout_s")
    return timeout_s


def error_of(failure: grpc.RpcError, *, is_write: bool, address: str) -> ShoalError:
    """Translates the failure of a call on `address`.

    The server's ErrorDetail decides; without one the failure happened on the way, and then a write
    may have been applied.
    """
    call = cast(grpc.Call, failure)
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_DETAIL_KEY and isinstance(value, bytes):
            try:
                detail = error_of_detail(types_pb2.ErrorDetail.FromString(value))
                return known_of(detail, is_write=is_write)
            except DecodeError:
                break
    return _error_of_status(call.code(), call.details() or "", is_write=is_write, address=address)


def known_of(error: ShoalError, *, is_write: bool) -> ShoalError:
    """Returns the error as it is, but for a read that ended without a result: it did nothing.

    Who ends a call at its deadline need not know which kind it was.
    """
    if isinstance(error, Indeterminate) and not is_write:
        return error_of_lost_call(error.message, is_write=False)
    return error


def error_of_detail(detail: types_pb2.ErrorDetail) -> ShoalError:
    """Rebuilds the server's error; a kind this version does not know becomes Internal."""
    return KINDS.get(detail.kind, Internal)(
        detail.message,
        outcome=_OUTCOMES.get(detail.outcome, "maybe_applied"),
        field=detail.field or None,
        limit=detail.limit or None,
        retry_after_ms=detail.retry_after_ms if detail.HasField("retry_after_ms") else None,
    )


def error_of_lost_call(reason: str, *, is_write: bool) -> ShoalError:
    """Returns what a call is that got no answer."""
    if is_write:
        return Indeterminate(
            f"{reason}; the write may or may not have been applied", outcome="maybe_applied"
        )
    return Unavailable(reason)


def _error_of_status(
    code: grpc.StatusCode, details: str, *, is_write: bool, address: str
) -> ShoalError:
    reason = f"no answer from {address}: {code.name.lower()}: {details}"
    if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_NEVER_SENT):
        return Unavailable(f"nobody answers at {address}: {details}")
    write_failed = code is grpc.StatusCode.INTERNAL and details == _AIO_WRITE_FAILED
    if code in _LOST_IN_TRANSIT or write_failed:
        return error_of_lost_call(reason, is_write=is_write)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "larger than max" in details:
            return InvalidRequest(
                f"a message is too large: {details}",
                field="request",
                limit=f"{REQUEST_BYTES_MAX} bytes a request, {REPLY_BYTES_MAX} bytes a reply",
            )
        return Overloaded(reason)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Internal(
            f"{address} does not offer this call; is it a Shoal server of this version? {details}"
        )
    kind = STATUS_KINDS.get(code, Internal)
    applied: Outcome = "maybe_applied" if is_write and kind is Internal else "not_applied"
    return kind(f"{address} answered {code.name.lower()}: {details}", outcome=applied)
