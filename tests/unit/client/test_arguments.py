"""A wrong argument is refused by its own name and limit, before anything is sent."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shoal import F, Point
from shoal.calls import Calls
from shoal.errors import InvalidRequest
from shoal.exploring import ExploringCalls
from shoal_protos.v1 import search_pb2

VECTOR = np.ones(4, dtype=np.float32)
CALLS = Calls()
EXPLORING = ExploringCalls(CALLS.sessions)


def search(**changes: Any) -> Any:
    asked = {"vector": VECTOR, "k": 3, "condition": None, "model": None, **changes}
    return CALLS.search(asked.pop("collection", "docs"), **asked)


def scroll(**changes: Any) -> Any:
    return CALLS.scroll(
        "docs",
        **{
            "condition": None,
            "page_size": 9,
            "cursor": None,
            "with_payload": True,
            "with_vector": False,
            "consistency": "session",
            **changes,
        },
    )


def scroll_ordered(**changes: Any) -> Any:
    return EXPLORING.scroll(
        "docs",
        **{
            "order_by": "size",
            "descending": False,
            "condition": None,
            "page_size": 9,
            "cursor": None,
            "with_payload": True,
            "with_vector": False,
            "consistency": "session",
            "explain": False,
            **changes,
        },
    )


def upsert(**changes: Any) -> Any:
    asked = {"model": None, "if_absent": False, "if_seq": None, **changes}
    return CALLS.upsert("docs", [Point(id="a", vector=VECTOR)], **asked)


def groups(**changes: Any) -> Any:
    asked = {"group_by": "color", "groups": 3, "group_size": 2, "condition": None, "model": None}
    return EXPLORING.search_groups("docs", "a", **{**asked, **changes})


def diverse(**changes: Any) -> Any:
    asked = {"k": 3, "candidates": 9, "mmr_lambda": 0.5, "condition": None, "model": None}
    return EXPLORING.search_diverse("docs", "a", **{**asked, **changes})


def within(**changes: Any) -> Any:
    asked = {"score_min": 0.5, "distance_max": None, "limit": 9, "condition": None, "model": None}
    return EXPLORING.search_range("docs", "a", **{**asked, **changes})


def recommend(**changes: Any) -> Any:
    asked = {"k": 3, "condition": None, "model": None}
    return EXPLORING.recommend("docs", ["a"], ["b"], **{**asked, **changes})


def facets(**changes: Any) -> Any:
    return EXPLORING.facets("docs", "color", **{"condition": None, "limit": 9, **changes})


COUNTS: list[tuple[Callable[..., Any], str]] = [
    (search, "k"),
    (recommend, "k"),
    (diverse, "k"),
    (groups, "groups"),
    (groups, "group_size"),
    (within, "limit"),
    (facets, "limit"),
    (scroll, "page_size"),
    (scroll_ordered, "page_size"),
]


@pytest.mark.parametrize(("build", "field"), COUNTS)
@pytest.mark.parametrize(
    "value", ["ten", "10", 1.5, 10.0, -1, 0, 2**40, None, True, np.True_, np.float32(3), [3]]
)
def test_a_count_that_is_none_names_field_and_limit(
    build: Callable[..., Any], field: str, value: object
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        build(**{field: value})
    assert refused.value.field == field
    assert refused.value.limit is not None and refused.value.limit.startswith("1 to ")
    assert refused.value.message.startswith(field)


@pytest.mark.parametrize(("build", "field"), COUNTS)
@pytest.mark.parametrize("value", [1, 7, np.int64(7), np.uint8(7)])
def test_whole_numbers_of_any_kind_are_counts(
    build: Callable[..., Any], field: str, value: Any
) -> None:
    build(**{field: value})


def test_a_count_is_sent_as_it_was_given() -> None:
    request = search(k=np.int64(7)).request
    assert isinstance(request, search_pb2.SearchRequest)
    assert request.k == 7


FLAGS: list[tuple[Callable[..., Any], str]] = [
    *((search, name) for name in ("exact", "with_payload", "with_vector", "explain")),
    *((recommend, name) for name in ("exact", "with_payload", "with_vector", "explain")),
    *((scroll, name) for name in ("with_payload", "with_vector")),
    (scroll_ordered, "descending"),
    (facets, "explain"),
    (upsert, "if_absent"),
]


@pytest.mark.parametrize(("build", "field"), FLAGS)
@pytest.mark.parametrize("value", ["x", "no", 1, 0, None])
def test_a_flag_is_true_or_false(build: Callable[..., Any], field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        build(**{field: value})
    assert (refused.value.field, refused.value.limit) == (field, "True or False")


@pytest.mark.parametrize(
    ("build", "changes", "field"),
    [
        (search, {"recall_target": "x"}, "recall_target"),
        (search, {"recall_target": True}, "recall_target"),
        (search, {"max_cost_ms": "x"}, "max_cost_ms"),
        (search, {"max_cost_ms": True}, "max_cost_ms"),
        (search, {"collection": None}, "collection"),
        (search, {"collection": 5}, "collection"),
        (search, {"consistency": "bad"}, "consistency"),
        (search, {"consistency": ["session"]}, "consistency"),
        (search, {"condition": "a"}, "filter"),
        (diverse, {"mmr_lambda": "x"}, "mmr_lambda"),
        (within, {"score_min": "x"}, "score_min"),
        (groups, {"group_by": 7}, "group_by"),
        (upsert, {"if_seq": [-1]}, "if_seq[0]"),
        (upsert, {"if_seq": ["x"]}, "if_seq[0]"),
        (upsert, {"if_seq": [True]}, "if_seq[0]"),
        (upsert, {"if_seq": 5}, "if_seq"),
    ],
)
def test_other_wrong_arguments_are_named(
    build: Callable[..., Any], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        build(**changes)
    assert refused.value.field == field


@pytest.mark.parametrize("method", ["in_", "any_of", "all_of"])
@pytest.mark.parametrize("values", [None, 5, "word"])
def test_values_that_are_no_list_are_refused_by_the_filter(method: str, values: object) -> None:
    with pytest.raises(InvalidRequest, match="'tag'") as refused:
        getattr(F("tag"), method)(values)
    assert refused.value.field == "filter"
