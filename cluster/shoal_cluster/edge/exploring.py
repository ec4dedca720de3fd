"""Translates the requests and answers of query/explore.py between protobuf and the domain."""

from typing import Any

import numpy as np

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import RANGE_HITS_MAX
from shoal_cluster.domain.schema import AttributeType, CollectionSchema
from shoal_cluster.edge.explain_codec import fill_explain, fill_stages
from shoal_cluster.edge.filter_codec import decode_filter
from shoal_cluster.edge.rows_codec import fill_rows, scores_of
from shoal_cluster.edge.schema_codec import decode_freshness, decode_model, fill_token, whole_ms
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.query.diversity import DiverseRequest
from shoal_cluster.query.examples import Example
from shoal_cluster.query.execute import SearchExplain, SearchResult
from shoal_cluster.query.facets import FacetsRequest, FacetsResult
from shoal_cluster.query.grouping import GroupsRequest, GroupsResult
from shoal_cluster.query.merge import Hits
from shoal_cluster.query.ordered_scroll import OrderedRows, OrderedScrollRequest
from shoal_cluster.query.plan import SearchRequest
from shoal_cluster.query.range_search import RangeHits, RangeRequest
from shoal_cluster.query.recommendation import RecommendRequest
from shoal_protos.v1 import points_pb2, search_pb2, types_pb2

FACETS_DEFAULT = 10
SCROLL_LIMIT_DEFAULT = 100
MMR_LAMBDA_DEFAULT = 0.5

_VALUE_FIELDS = {
    AttributeType.KEYWORD: "keyword",
    AttributeType.KEYWORD_LIST: "keyword",
    AttributeType.INT: "int",
    AttributeType.FLOAT: "float",
    AttributeType.BOOL: "bool",
    AttributeType.TIMESTAMP: "timestamp_ms",
}


def decode_recommend(message: search_pb2.RecommendRequest) -> RecommendRequest:
    return RecommendRequest(
        search=_decode_settings(message, k=message.k),
        positive=[
            _decode_example(each, f"positive[{i}]") for i, each in enumerate(message.positive)
        ],
        negative=[
            _decode_example(each, f"negative[{i}]") for i, each in enumerate(message.negative)
        ],
    )


def encode_recommended(result: SearchResult, *, with_payload: bool) -> search_pb2.RecommendResponse:
    response = search_pb2.RecommendResponse()
    _fill_found(response, result, with_payload=with_payload)
    return response


def decode_diverse(message: search_pb2.SearchDiverseRequest) -> DiverseRequest:
    return DiverseRequest(
        search=_decode_settings(message, k=message.k),
        query=_decode_example(message.query, "query"),
        candidates=message.candidates or None,
        mmr_lambda=message.mmr_lambda if message.HasField("mmr_lambda") else MMR_LAMBDA_DEFAULT,
    )


def encode_diverse(result: SearchResult, *, with_payload: bool) -> search_pb2.SearchDiverseResponse:
    response = search_pb2.SearchDiverseResponse()
    _fill_found(response, result, with_payload=with_payload)
    return response


def decode_groups(message: search_pb2.SearchGroupsRequest) -> GroupsRequest:
    return GroupsRequest(
        search=_decode_settings(message, k=message.group_size),
        query=_decode_example(message.query, "query"),
        group_by=message.group_by,
        groups=message.groups,
    )


def encode_groups(result: GroupsResult, *, with_payload: bool) -> search_pb2.SearchGroupsResponse:
    response = search_pb2.SearchGroupsResponse(
        bounded=result.bounded, staleness_ms=whole_ms(result.staleness_ms)
    )
    for value, hits in result.groups:
        group = response.groups.add()
        fill_value(group.value, value, result.kind)
        fill_hits(group.hits, result.schema, hits, with_payload=with_payload)
    fill_token(response.as_of, result.schema, result.as_of)
    _fill_explain(response.explain, result.explain)
    return response


def decode_range(message: search_pb2.SearchRangeRequest) -> RangeRequest:
    bound = message.WhichOneof("bound")
    return RangeRequest(
        search=_decode_settings(message, k=1),
        query=_decode_example(message.query, "query"),
        score_min=message.score_min if bound == "score_min" else None,
        distance_max=message.distance_max if bound == "distance_max" else None,
        limit=message.limit or RANGE_HITS_MAX,
        cursor=message.cursor,
    )


def encode_range(found: RangeHits, *, with_payload: bool) -> search_pb2.SearchRangeResponse:
    response = search_pb2.SearchRangeResponse(
        cursor=found.cursor,
        staleness_ms=whole_ms(found.staleness_ms),
        truncated=found.truncated,
    )
    fill_hits(response.hits, found.schema, found.hits, with_payload=with_payload)
    fill_token(response.as_of, found.schema, found.as_of)
    _fill_explain(response.explain, found.explain)
    return response


def decode_facets(message: points_pb2.FacetsRequest) -> FacetsRequest:
    return FacetsRequest(
        collection=message.collection,
        attribute=message.attribute,
        limit=message.limit or FACETS_DEFAULT,
        filter=decode_filter(message.filter) if message.HasField("filter") else None,
        freshness=decode_freshness(message.consistency, message.session),
        explain=message.explain,
    )


def encode_facets(result: FacetsResult) -> points_pb2.FacetsResponse:
    response = points_pb2.FacetsResponse(
        rows=result.rows,
        missing=result.missing,
        distinct=result.distinct,
        staleness_ms=whole_ms(result.staleness_ms),
    )
    for value, count in result.counts:
        facet = response.facets.add(count=count)
        fill_value(facet.value, value, result.kind)
    fill_token(response.as_of, result.schema, result.as_of)
    _fill_explain(response.explain, result.explain)
    return response


def decode_scroll_ordered(message: points_pb2.ScrollOrderedRequest) -> OrderedScrollRequest:
    return OrderedScrollRequest(
        collection=message.collection,
        order_by=message.order_by,
        descending=message.descending,
        limit=message.limit or SCROLL_LIMIT_DEFAULT,
        cursor=message.cursor,
        filter=decode_filter(message.filter) if message.HasField("filter") else None,
        with_payload=message.with_payload,
        with_vector=message.with_vector,
        freshness=decode_freshness(message.consistency, message.session),
        explain=message.explain,
    )


def encode_ordered_rows(
    result: OrderedRows, *, with_payload: bool
) -> points_pb2.ScrollOrderedResponse:
    rows = result.rows
    response = points_pb2.ScrollOrderedResponse(
        next_cursor=rows.next_cursor, staleness_ms=whole_ms(rows.staleness_ms)
    )
    fill_token(response.as_of, rows.schema, rows.as_of)
    fill_rows(
        response.rows,
        rows.schema,
        ids=rows.ids,
        seqs=rows.seqs,
        tails=rows.tails,
        vectors=rows.vectors,
        with_payload=with_payload,
    )
    _fill_explain(response.explain, result.explain)
    return response


def fill_value(message: types_pb2.FilterValue, value: Scalar, kind: AttributeType) -> None:
    """Writes a value of an attribute of type `kind`."""
    setattr(message, _VALUE_FIELDS[kind], value)


def _decode_settings(message: Any, *, k: int) -> SearchRequest:
    """Returns what the messages of all kinds of search have in common, without a query."""
    # A range search is always exact, and has neither field.
    approximate = not isinstance(message, search_pb2.SearchRangeRequest)
    target = approximate and message.HasField("recall_target")
    return SearchRequest(
        collection=message.collection,
        k=k,
        filter=decode_filter(message.filter) if message.HasField("filter") else None,
        exact=message.exact if approximate else True,
        recall_target=message.recall_target if target else None,
        freshness=decode_freshness(message.consistency, message.session),
        with_payload=message.with_payload,
        with_vector=message.with_vector,
        explain=message.explain,
        model=decode_model(message.model) if message.HasField("model") else None,
    )


def _decode_example(message: search_pb2.Example, field: str) -> Example:
    match message.WhichOneof("example"):
        case "vector":
            if len(message.vector) % 4:
                raise InvalidRequest(
                    f"{len(message.vector)} bytes are not whole float32",
                    field=field,
                    limit="a multiple of 4 bytes",
                )
            return Example(vector=np.frombuffer(message.vector, np.dtype("<f4")), field=field)
        case "id":
            return Example(id=message.id.encode(), field=field)
        case _:
            raise InvalidRequest("neither a vector nor an id is given", field=field)


def _fill_found(response: Any, result: SearchResult, *, with_payload: bool) -> None:
    """Writes an answer of one query."""
    response.staleness_ms = whole_ms(result.staleness_ms)
    fill_token(response.as_of, result.schema, result.as_of)
    fill_hits(response.hits, result.schema, result.hits, with_payload=with_payload)
    _fill_explain(response.explain, result.explain)


def fill_hits(
    message: search_pb2.QueryHits, schema: CollectionSchema, hits: Hits, *, with_payload: bool
) -> None:
    """Writes the hits of one query."""
    message.scores.extend(scores_of(hits.keys, schema.metric))
    fill_rows(
        message.rows,
        schema,
        ids=hits.ids,
        seqs=hits.seqs,
        tails=hits.tails,
        vectors=hits.vectors,
        with_payload=with_payload,
    )


def _fill_explain(message: search_pb2.Explain, explain: SearchExplain | None) -> None:
    if explain is not None:
        fill_explain(message, explain)
        fill_stages(message.stages, explain.stages_us)
