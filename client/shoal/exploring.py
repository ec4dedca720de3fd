"""The calls beside plain search: what is sent, and how replies are read. No I/O."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from shoal.arguments import (
    CANDIDATES_MAX,
    FACETS_MAX,
    GROUPS_MAX,
    K_MAX,
    PAGE_SIZE_MAX,
    RANGE_HITS_MAX,
    checked_count,
    checked_flag,
    checked_name,
    checked_number,
)
from shoal.calls import (
    Call,
    ConsistencyName,
    SearchOptions,
    Sending,
    checked_recall_target,
    consistency_number,
    filter_message,
)
from shoal.errors import Internal, InvalidRequest
from shoal.filters import Filter
from shoal.results import Hit, Page, SearchResult, page_read
from shoal.rpc import Method
from shoal.schema import Model, model_to_proto
from shoal.session import Sessions, SessionToken, token_from_proto
from shoal.streams import RangeStream
from shoal.vectors import VectorLike, to_vector
from shoal_protos.v1 import points_pb2, search_pb2, types_pb2

ScalarValue = str | int | float | bool
"""One value of an attribute; a timestamp is an int of ms since 1970-01-01 UTC."""


Examples = str | Sequence[str | VectorLike] | npt.NDArray[np.generic]
"""Ids of stored points and vectors, mixed as one likes; an array holds one vector a row."""


class ReadOptions(TypedDict, total=False):
    """consistency: "eventual", "session" (default) or "strong". explain: how it was answered."""

    consistency: ConsistencyName
    explain: bool


class RangeOptions(TypedDict, total=False):
    """What a range search takes besides query and bound; as in SearchOptions."""

    with_payload: bool
    with_vector: bool
    consistency: ConsistencyName
    explain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The best points that have one value of the attribute, best first."""

    value: ScalarValue
    hits: Sequence[Hit]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups by their best hit. Iterates over the groups.

    bounded: looking for groups stopped at the server's bound, so one may be missing. explain: the
    `Explain` message of shoal.v1, None unless asked for.
    """

    groups: Sequence[Group]
    bounded: bool
    as_of: SessionToken
    staleness_ms: int
    explain: search_pb2.Explain | None

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class FacetCount:
    """How many points have a value."""

    value: ScalarValue
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FacetCounts:
    """The most frequent values first, equal counts by value. Iterates over the facets.

    rows: points that satisfy the filter. missing: those of them without a value. distinct: how many
    values they have in all. explain: the `Explain` message of shoal.v1, None unless asked for.
    """

    facets: Sequence[FacetCount]
    rows: int
    missing: int
    distinct: int
    as_of: SessionToken
    staleness_ms: int
    explain: search_pb2.Explain | None

    def __len__(self) -> int:
        return len(self.facets)

    def __iter__(self) -> Iterator[FacetCount]:
        return iter(self.facets)

    def as_dict(self) -> dict[ScalarValue, int]:
        return {facet.value: facet.count for facet in self.facets}


class ExploringCalls:
    """Builds the calls of one client; sessions: the tokens it has seen."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def recommend(
        self,
        collection: str,
        positive: Examples,
        negative: Examples,
        *,
        k: int,
        condition: Filter | None,
        model: Model | None,
        **options: Unpack[SearchOptions],
    ) -> Call[SearchResult]:
        with Sending("recommend"):
            request = search_pb2.RecommendRequest(
                collection=checked_name(collection, field="collection"),
                positive=_examples(positive, field="positive"),
                negative=_examples(negative, field="negative"),
                k=checked_count(k, field="k", most=K_MAX),
                **self._settings(collection, condition, model, options),
            )
        return Call(
            method=Method.RECOMMEND,
            request=request,
            is_write=False,
            decode=lambda response: self._found(collection, response),
        )

    def search_diverse(
        self,
        collection: str,
        query: str | VectorLike,
        *,
        k: int,
        candidates: int | None,
        mmr_lambda: float,
        condition: Filter | None,
        model: Model | None,
        **options: Unpack[SearchOptions],
    ) -> Call[SearchResult]:
        if candidates is not None:
            candidates = checked_count(candidates, field="candidates", most=CANDIDATES_MAX)
        with Sending("search"):
            request = search_pb2.SearchDiverseRequest(
                collection=checked_name(collection, field="collection"),
                query=_example(query, field="query"),
                k=checked_count(k, field="k", most=K_MAX),
                candidates=candidates or 0,
                mmr_lambda=checked_number(mmr_lambda, field="mmr_lambda"),
                **self._settings(collection, condition, model, options),
            )
        return Call(
            method=Method.SEARCH_DIVERSE,
            request=request,
            is_write=False,
            decode=lambda response: self._found(collection, response),
        )

    def search_groups(
        self,
        collection: str,
        query: str | VectorLike,
        *,
        group_by: str,
        groups: int,
        group_size: int,
        condition: Filter | None,
        model: Model | None,
        **options: Unpack[SearchOptions],
    ) -> Call[Groups]:
        with Sending("search"):
            request = search_pb2.SearchGroupsRequest(
                collection=checked_name(collection, field="collection"),
                query=_example(query, field="query"),
                group_by=checked_name(group_by, field="group_by"),
                groups=checked_count(groups, field="groups", most=GROUPS_MAX),
                group_size=checked_count(group_size, field="group_size", most=K_MAX),
                **self._settings(collection, condition, model, options),
            )

        def decode(response: search_pb2.SearchGroupsResponse) -> Groups:
            self._sessions.observe(collection, response.as_of)
            return Groups(
                groups=[
                    Group(value=value_of(group.value), hits=SearchResult(group.hits, response).hits)
                    for group in response.groups
                ],
                bounded=response.bounded,
                as_of=token_from_proto(response.as_of),
                staleness_ms=response.staleness_ms,
                explain=response.explain if response.HasField("explain") else None,
            )

        return Call(method=Method.SEARCH_GROUPS, request=request, is_write=False, decode=decode)

    def search_range(
        self,
        collection: str,
        query: str | VectorLike,
        *,
        score_min: float | None,
        distance_max: float | None,
        limit: int,
        condition: Filter | None,
        model: Model | None,
        **options: Unpack[RangeOptions],
    ) -> RangeStream:
        limit = checked_count(limit, field="limit", most=RANGE_HITS_MAX)
        if (score_min is None) == (distance_max is None):
            raise InvalidRequest(
                "a range takes score_min (cosine, dot) or distance_max (l2), one of the two",
                field="score_min",
            )
        settings = self._settings(collection, condition, model, options)
        del settings["exact"], settings["recall_target"]  # always exact
        with Sending("search"):
            request = search_pb2.SearchRangeRequest(
                collection=checked_name(collection, field="collection"),
                query=_example(query, field="query"),
                limit=limit,
                **settings,
            )
            if score_min is not None:
                request.score_min = checked_number(score_min, field="score_min")
            if distance_max is not None:
                request.distance_max = checked_number(distance_max, field="distance_max")
        sends_token = options.get("consistency", "session") == "session"
        return RangeStream(request, self._sessions, sends_token=sends_token)

    def _found(
        self,
        collection: str,
        response: search_pb2.RecommendResponse | search_pb2.SearchDiverseResponse,
    ) -> SearchResult:
        self._sessions.observe(collection, response.as_of)
        return SearchResult(response.hits, response)

    def _settings(
        self,
        collection: str,
        condition: Filter | None,
        model: Model | None,
        options: SearchOptions | RangeOptions,
    ) -> dict[str, Any]:
        """Returns the fields that the messages of all kinds of search have in common."""
        consistency = options.get("consistency", "session")
        return {
            "filter": filter_message(condition),
            "exact": checked_flag(options.get("exact", False), field="exact"),  # type: ignore[arg-type]
            "recall_target": checked_recall_target(options.get("recall_target")),  # type: ignore[arg-type]
            "with_payload": checked_flag(options.get("with_payload", True), field="with_payload"),
            "with_vector": checked_flag(options.get("with_vector", False), field="with_vector"),
            "consistency": consistency_number(consistency),
            "session": self._token(collection, consistency),
            "model": model_to_proto(model),
            "explain": checked_flag(options.get("explain", False), field="explain"),
        }

    def facets(
        self,
        collection: str,
        attribute: str,
        *,
        condition: Filter | None,
        limit: int,
        consistency: ConsistencyName = "session",
        explain: bool = False,
    ) -> Call[FacetCounts]:
        with Sending("facets"):
            request = points_pb2.FacetsRequest(
                collection=checked_name(collection, field="collection"),
                attribute=checked_name(attribute, field="attribute"),
                filter=filter_message(condition),
                limit=checked_count(limit, field="limit", most=FACETS_MAX),
                consistency=consistency_number(consistency),
                session=self._token(collection, consistency),
                explain=checked_flag(explain, field="explain"),
            )

        def decode(response: points_pb2.FacetsResponse) -> FacetCounts:
            self._sessions.observe(collection, response.as_of)
            return FacetCounts(
                facets=[
                    FacetCount(value=value_of(facet.value), count=facet.count)
                    for facet in response.facets
                ],
                rows=response.rows,
                missing=response.missing,
                distinct=response.distinct,
                as_of=token_from_proto(response.as_of),
                staleness_ms=response.staleness_ms,
                explain=response.explain if response.HasField("explain") else None,
            )

        return Call(method=Method.FACETS, request=request, is_write=False, decode=decode)

    def scroll(
        self,
        collection: str,
        *,
        order_by: str,
        descending: bool,
        condition: Filter | None,
        page_size: int,
        cursor: bytes | None,
        with_payload: bool,
        with_vector: bool,
        consistency: ConsistencyName,
        explain: bool,
    ) -> Call[Page]:
        with Sending("scroll"):
            request = points_pb2.ScrollOrderedRequest(
                collection=checked_name(collection, field="collection"),
                order_by=checked_name(order_by, field="order_by"),
                descending=checked_flag(descending, field="descending"),
                filter=filter_message(condition),
                limit=checked_count(page_size, field="page_size", most=PAGE_SIZE_MAX),
                cursor=cursor or b"",
                with_payload=checked_flag(with_payload, field="with_payload"),
                with_vector=checked_flag(with_vector, field="with_vector"),
                consistency=consistency_number(consistency),
                session=self._token(collection, consistency),
                explain=checked_flag(explain, field="explain"),
            )

        def decode(response: points_pb2.ScrollOrderedResponse) -> Page:
            self._sessions.observe(collection, response.as_of)
            return page_read(response)

        return Call(method=Method.SCROLL_ORDERED, request=request, is_write=False, decode=decode)

    def _token(
        self, collection: str, consistency: ConsistencyName
    ) -> types_pb2.SessionToken | None:
        return self._sessions.message(collection) if consistency == "session" else None


def _examples(examples: Examples, *, field: str) -> list[search_pb2.Example]:
    listed = [examples] if isinstance(examples, str) else examples
    return [_example(each, field=f"{field}[{i}]") for i, each in enumerate(listed)]


def _example(example: str | VectorLike, *, field: str) -> search_pb2.Example:
    if isinstance(example, str):
        return search_pb2.Example(id=example)
    return search_pb2.Example(vector=to_vector(example, field=field).tobytes())


def value_of(message: types_pb2.FilterValue) -> ScalarValue:
    """Raises: Internal when the server sent no value."""
    match message.WhichOneof("value"):
        case "keyword":
            return message.keyword
        case "int":
            return message.int
        case "float":
            return message.float
        case "bool":
            return message.bool
        case "timestamp_ms":
            return message.timestamp_ms
        case _:
            raise Internal("the server sent a value of no type")
