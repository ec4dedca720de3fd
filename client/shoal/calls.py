"""Every operation as a value: which method, which request, how to read the reply. No I/O.

`Client` and `AsyncClient` only send what this module builds, so they cannot drift apart.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar
from uuid import uuid4

from google.protobuf.message import Message

from shoal.arguments import (
    K_MAX,
    PAGE_SIZE_MAX,
    checked_count,
    checked_flag,
    checked_name,
    checked_number,
)
from shoal.batches import (
    Batch,
    PointArrays,
    batch_of_arrays,
    batch_of_points,
    batches_of_arrays,
    batches_of_points,
    checked_ids,
    columns_of,
    conditions_of,
)
from shoal.bulk import BATCH_SIZE_MAX, CHUNK_BYTES_MAX, Upload
from shoal.errors import Internal, InvalidRequest, ShoalError
from shoal.filters import Filter
from shoal.point import Point
from shoal.results import (
    DeleteResult,
    Page,
    PatchResult,
    PointsRead,
    SearchResult,
    UpsertResult,
    page_read,
    points_read,
)
from shoal.rpc import Method
from shoal.schema import (
    AttributeTypeName,
    CollectionDescription,
    CollectionSchema,
    Model,
    TierName,
    declarations,
    description_from_proto,
    model_to_proto,
    schema_from_proto,
    schema_to_proto,
    tier_to_proto,
)
from shoal.search_templates import SearchTemplates
from shoal.session import Sessions, token_from_proto
from shoal.vectors import VectorLike, Vectors, VectorsLike, to_vector, to_vectors
from shoal_protos.v1 import admin_pb2, collections_pb2, points_pb2, search_pb2, types_pb2

Reply = TypeVar("Reply")

ConsistencyName = Literal["eventual", "session", "strong"]

_CONSISTENCIES: Mapping[str, types_pb2.Consistency.ValueType] = {
    "eventual": types_pb2.CONSISTENCY_EVENTUAL,
    "session": types_pb2.CONSISTENCY_SESSION,
    "strong": types_pb2.CONSISTENCY_STRONG,
}


class SearchOptions(TypedDict, total=False):
    """What every kind of search takes besides its queries.

    exact: compare with every row. recall_target: 0.5 to 1, the collection's when absent.
    with_payload (default True): attributes, payloads and provenance of the hits. with_vector
    (False). consistency: "eventual", "session" (default) or "strong". explain: how the answer was
    found.
    """

    exact: bool
    recall_target: float | None
    with_payload: bool
    with_vector: bool
    consistency: ConsistencyName
    explain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Reply]):
    """One unary call. decode: turns the response message into what the user gets.

    request: the message, or already serialised; a write's is a message, which retries change.
    """

    method: Method
    request: Message | bytes
    is_write: bool
    decode: Callable[[Any], Reply]

    @property
    def maybe_applied(self) -> bool:
        """Whether an earlier attempt of this write may have been applied; travels with it."""
        request: Any = self.request
        return self.is_write and bool(request.request_id.again)

    def note_maybe_applied(self) -> None:
        request: Any = self.request
        request.request_id.again = True

    def ended(self, error: ShoalError) -> ShoalError:
        """Returns the error a call ended with; if the result is unknown, with the call in it."""
        if self.is_write and error.outcome == "maybe_applied":
            self.note_maybe_applied()
            error.request = self
        return error


def call_of(error: ShoalError) -> Call[Any]:
    """Returns the write whose result is unknown.

    Raises: InvalidRequest when the error is about none.
    """
    if not isinstance(error.request, Call):
        raise InvalidRequest(
            f"the error carries no write to resolve: {error}; only one whose outcome is "
            "'maybe_applied' does, and none of bulk_upsert",
            field="error",
        )
    return error.request


class Calls:
    """Builds the calls of one client: its request ids, and the session tokens it has seen.

    Invariant: request numbers of a client id strictly increase and are never used twice.
    """

    def __init__(self) -> None:
        self.sessions = Sessions()
        self._searches = SearchTemplates()
        self._client_id = uuid4().hex
        # next() on a count is one step of the interpreter, so threads never share a number.
        self._request_no = itertools.count(1)

    def create_collection(self, schema: CollectionSchema) -> Call[CollectionSchema]:
        with Sending("schema"):
            request = collections_pb2.CreateCollectionRequest(
                request_id=self._request_id(), schema=schema_to_proto(schema)
            )
        return Call(
            method=Method.CREATE_COLLECTION,
            request=request,
            is_write=True,
            decode=lambda response: schema_from_proto(response.schema),
        )

    def describe_collection(self, name: str) -> Call[CollectionDescription]:
        with Sending("name"):
            request = collections_pb2.DescribeCollectionRequest(
                name=checked_name(name, field="name")
            )
        return Call(
            method=Method.DESCRIBE_COLLECTION,
            request=request,
            is_write=False,
            decode=description_from_proto,
        )

    def list_collections(self) -> Call[list[CollectionSchema]]:
        return Call(
            method=Method.LIST_COLLECTIONS,
            request=collections_pb2.ListCollectionsRequest(),
            is_write=False,
            decode=lambda response: [schema_from_proto(each) for each in response.schemas],
        )

    def alter_collection(
        self,
        name: str,
        *,
        add_attributes: Mapping[str, AttributeTypeName] | None,
        replicas: int | None,
        recall_target: float | None,
        chunking_rule: str | None,
        model: Model | None,
        tier: TierName | None,
        recall_sample_share: float | None,
        if_version: int | None,
    ) -> Call[CollectionSchema]:
        with Sending("alter"):
            request = collections_pb2.AlterCollectionRequest(
                request_id=self._request_id(),
                name=name,
                add_attributes=declarations(add_attributes or {}),
                replicas=replicas,
                recall_target=recall_target,
                chunking_rule=chunking_rule,
                model=model_to_proto(model),
                if_version=if_version,
                tier=types_pb2.MEMORY_TIER_UNSPECIFIED if tier is None else tier_to_proto(tier),
                recall_sample_share=recall_sample_share,
            )
        return Call(
            method=Method.ALTER_COLLECTION,
            request=request,
            is_write=True,
            decode=lambda response: schema_from_proto(response.schema),
        )

    def drop_collection(self, name: str) -> Call[None]:
        with Sending("name"):
            request = collections_pb2.DropCollectionRequest(
                request_id=self._request_id(), name=name
            )
        return Call(
            method=Method.DROP_COLLECTION,
            request=request,
            is_write=True,
            decode=lambda _response: self.sessions.forget(name),
        )

    def upsert(
        self,
        collection: str,
        points: Iterable[Point] | PointArrays,
        *,
        model: Model | None,
        if_absent: bool,
        if_seq: Sequence[int | None] | None,
    ) -> Call[UpsertResult]:
        if isinstance(points, PointArrays):
            batch = batch_of_arrays(points)
        else:
            batch = batch_of_points(points)
        request = self._upsert_request(collection, batch, model=model)
        with Sending("if_seq"):
            request.conditions.extend(
                conditions_of(
                    len(batch.ids),
                    if_absent=checked_flag(if_absent, field="if_absent"),
                    if_seq=if_seq,
                )
            )

        def decode(response: points_pb2.UpsertResponse) -> UpsertResult:
            self.sessions.observe(collection, response.session)
            return UpsertResult(
                seqs=list(response.seqs), session=token_from_proto(response.session)
            )

        return Call(method=Method.UPSERT, request=request, is_write=True, decode=decode)

    def bulk_upsert(
        self,
        collection: str,
        points: Iterable[Point] | PointArrays,
        *,
        model: Model | None,
        batch_size: int,
        progress: Callable[[int, int | None], None] | None,
    ) -> Upload:
        """Raises: InvalidRequest for a batch size out of range."""
        batch_size = checked_count(batch_size, field="batch_size", most=BATCH_SIZE_MAX)
        rows_total: int | None
        if isinstance(points, PointArrays):
            batches = batches_of_arrays(points, batch_size=batch_size, bytes_max=CHUNK_BYTES_MAX)
            rows_total = len(points.ids)
        else:
            batches = batches_of_points(points, batch_size=batch_size, bytes_max=CHUNK_BYTES_MAX)
            rows_total = len(points) if isinstance(points, Sized) else None
        return Upload(
            requests=(self._upsert_request(collection, batch, model=model) for batch in batches),
            rows_total=rows_total,
            on_reply=lambda reply: self.sessions.observe(collection, reply.session),
            progress=progress,
        )

    def _upsert_request(
        self, collection: str, batch: Batch, *, model: Model | None
    ) -> points_pb2.UpsertRequest:
        with Sending("points"):
            return points_pb2.UpsertRequest(
                collection=checked_name(collection, field="collection"),
                request_id=self._request_id(),
                rows=batch.to_rows(),
                model=model_to_proto(model),
            )

    def get(
        self,
        collection: str,
        ids: Sequence[str],
        *,
        with_vector: bool,
        consistency: ConsistencyName,
    ) -> Call[PointsRead]:
        with Sending("ids"):
            request = points_pb2.GetRequest(
                collection=checked_name(collection, field="collection"),
                ids=checked_ids(ids),
                with_vector=checked_flag(with_vector, field="with_vector"),
                consistency=consistency_number(consistency),
                session=self._token(collection, consistency),
            )

        def decode(response: points_pb2.GetResponse) -> PointsRead:
            self.sessions.observe(collection, response.as_of)
            return points_read(response)

        return Call(method=Method.GET, request=request, is_write=False, decode=decode)

    def patch_attributes(
        self,
        collection: str,
        ids: Sequence[str],
        attributes: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        remove: Sequence[str],
    ) -> Call[PatchResult]:
        listed = checked_ids(ids)
        rows = [attributes] * len(listed) if isinstance(attributes, Mapping) else attributes
        if len(rows) != len(listed):
            raise InvalidRequest(
                f"attributes has {len(rows)} rows for {len(listed)} ids", field="attributes"
            )
        with Sending("attributes"):
            request = points_pb2.PatchAttributesRequest(
                collection=checked_name(collection, field="collection"),
                request_id=self._request_id(),
                ids=listed,
                set=columns_of(rows),
                remove=remove,
            )

        def decode(response: points_pb2.PatchAttributesResponse) -> PatchResult:
            self.sessions.observe(collection, response.session)
            return PatchResult(
                missing_ids=list(response.missing_ids), session=token_from_proto(response.session)
            )

        return Call(method=Method.PATCH_ATTRIBUTES, request=request, is_write=True, decode=decode)

    def delete(self, collection: str, ids: Sequence[str]) -> Call[DeleteResult]:
        with Sending("ids"):
            request = points_pb2.DeleteRequest(
                collection=checked_name(collection, field="collection"),
                request_id=self._request_id(),
                ids=checked_ids(ids),
            )
        return self._deletion(Method.DELETE, collection, request)

    def delete_where(self, collection: str, condition: Filter) -> Call[DeleteResult]:
        with Sending("filter"):
            request = points_pb2.DeleteByFilterRequest(
                collection=checked_name(collection, field="collection"),
                request_id=self._request_id(),
                filter=filter_message(condition),
            )
        return self._deletion(Method.DELETE_BY_FILTER, collection, request)

    def scroll(
        self,
        collection: str,
        *,
        condition: Filter | None,
        page_size: int,
        cursor: bytes | None,
        with_payload: bool,
        with_vector: bool,
        consistency: ConsistencyName,
    ) -> Call[Page]:
        with Sending("scroll"):
            request = points_pb2.ScrollRequest(
                collection=checked_name(collection, field="collection"),
                filter=filter_message(condition),
                limit=checked_count(page_size, field="page_size", most=PAGE_SIZE_MAX),
                cursor=cursor or b"",
                with_payload=checked_flag(with_payload, field="with_payload"),
                with_vector=checked_flag(with_vector, field="with_vector"),
                consistency=consistency_number(consistency),
                session=self._token(collection, consistency),
            )

        def decode(response: points_pb2.ScrollResponse) -> Page:
            self.sessions.observe(collection, response.as_of)
            return page_read(response)

        return Call(method=Method.SCROLL, request=request, is_write=False, decode=decode)

    def count(
        self, collection: str, *, condition: Filter | None, consistency: ConsistencyName
    ) -> Call[int]:
        with Sending("count"):
            request = points_pb2.CountRequest(
                collection=checked_name(collection, field="collection"),
                filter=filter_message(condition),
                consistency=consistency_number(consistency),
                session=self._token(collection, consistency),
            )

        def decode(response: points_pb2.CountResponse) -> int:
            self.sessions.observe(collection, response.as_of)
            return response.count

        return Call(method=Method.COUNT, request=request, is_write=False, decode=decode)

    def search(
        self,
        collection: str,
        *,
        vector: VectorLike | None = None,
        vectors: VectorsLike | None = None,
        ids: Sequence[str] | None = None,
        k: int,
        condition: Filter | None,
        model: Model | None,
        exact: bool = False,
        recall_target: float | None = None,
        max_cost_ms: float | None = None,
        with_payload: bool = True,
        with_vector: bool = False,
        consistency: ConsistencyName = "session",
        explain: bool = False,
    ) -> Call[list[SearchResult]]:
        """The queries are one `vector`, several `vectors`, or stored points by `ids`."""
        queries = _queries(vector, vectors, ids)
        options = (
            exact,
            recall_target,
            max_cost_ms,
            with_payload,
            with_vector,
            consistency,
            explain,
        )
        template = None
        if queries is not None and condition is None:
            template = (collection, k, model, *options, queries.shape)
        token = self._token(collection, consistency)
        request: search_pb2.SearchRequest | bytes | None = None
        if template is not None and queries is not None:
            request = self._searches.request(template, token, queries)
        if request is None:
            with Sending("search"):
                message = search_pb2.SearchRequest(
                    collection=checked_name(collection, field="collection"),
                    ids=None if ids is None else checked_ids(ids),
                    k=checked_count(k, field="k", most=K_MAX),
                    filter=filter_message(condition),
                    exact=checked_flag(exact, field="exact"),
                    recall_target=checked_recall_target(recall_target),
                    max_cost_ms=checked_max_cost(max_cost_ms),
                    with_payload=checked_flag(with_payload, field="with_payload"),
                    with_vector=checked_flag(with_vector, field="with_vector"),
                    consistency=consistency_number(consistency),
                    session=token,
                    model=model_to_proto(model),
                    explain=checked_flag(explain, field="explain"),
                )
            if queries is not None:
                message.vectors = queries.tobytes()
                message.dimension = queries.shape[-1]
                if template is not None:
                    self._searches.remember(template, token, message)
            request = message
        if queries is None:
            asked = 0 if ids is None else len(ids)
        else:
            asked = 1 if queries.ndim == 1 else len(queries)

        def decode(response: search_pb2.SearchResponse) -> list[SearchResult]:
            self.sessions.observe(collection, response.as_of)
            if len(response.results) != asked:
                raise Internal(f"the server answered {len(response.results)} of {asked} queries")
            return [SearchResult(found, response) for found in response.results]

        return Call(method=Method.SEARCH, request=request, is_write=False, decode=decode)

    def status(self, collection: str) -> Call[admin_pb2.StatusResponse]:
        with Sending("collection"):
            request = admin_pb2.StatusRequest(collection=collection)
        return Call(
            method=Method.STATUS,
            request=request,
            is_write=False,
            decode=lambda response: response,
        )

    def _request_id(self) -> types_pb2.RequestId:
        return types_pb2.RequestId(client_id=self._client_id, request_no=next(self._request_no))

    def _token(
        self, collection: str, consistency: ConsistencyName
    ) -> types_pb2.SessionToken | None:
        """The other two levels do not look at the token, so they do not pay for sending it."""
        return self.sessions.message(collection) if consistency == "session" else None

    def _deletion(self, method: Method, collection: str, request: Message) -> Call[DeleteResult]:
        def decode(
            response: points_pb2.DeleteResponse | points_pb2.DeleteByFilterResponse,
        ) -> DeleteResult:
            self.sessions.observe(collection, response.session)
            return DeleteResult(
                deleted=response.deleted, session=token_from_proto(response.session)
            )

        return Call(method=method, request=request, is_write=True, decode=decode)


class Sending:
    """Turns what protobuf says of a value it cannot carry into InvalidRequest."""

    __slots__ = ("_field",)

    def __init__(self, field: str) -> None:
        self._field = field

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, TypeError | ValueError):
            raise InvalidRequest(f"a value cannot be sent: {error}", field=self._field) from error


def _queries(
    vector: VectorLike | None, vectors: VectorsLike | None, ids: Sequence[str] | None
) -> Vectors | None:
    """Returns the queries, None when they are stored points; one kind must be given."""
    if (vector is None) + (vectors is None) + (ids is None) != 2:
        raise InvalidRequest("a search takes vectors or ids, one of the two", field="vectors")
    if vector is not None:
        return to_vector(vector, field="vector")
    if vectors is not None:
        return to_vectors(vectors, field="vectors")
    return None


def checked_recall_target(value: float | None) -> float | None:
    """Raises: InvalidRequest unless it is a number or None, the collection's own."""
    return None if value is None else checked_number(value, field="recall_target")


def checked_max_cost(value: float | None) -> float | None:
    """Raises: InvalidRequest unless it is a number or None; its range is the server's."""
    return None if value is None else checked_number(value, field="max_cost_ms")


def consistency_number(name: ConsistencyName) -> types_pb2.Consistency.ValueType:
    if not isinstance(name, str) or name not in _CONSISTENCIES:
        raise InvalidRequest(
            f"consistency {name!r} is not known",
            field="consistency",
            limit=f"one of {', '.join(_CONSISTENCIES)}",
        )
    return _CONSISTENCIES[name]


def filter_message(condition: Filter | None) -> types_pb2.Filter | None:
    if condition is None:
        return None
    if not isinstance(condition, Filter):
        raise InvalidRequest(
            f"filter is a {type(condition).__name__}; build one with F, as in F('year') >= 2020",
            field="filter",
        )
    return condition.to_proto()
