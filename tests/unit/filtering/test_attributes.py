"""Attributes of written rows."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_cluster.domain.errors import InvalidRequest, Outcome
from shoal_cluster.domain.limits import KEYWORD_BYTES_MAX, KEYWORD_LIST_LENGTH_MAX
from shoal_cluster.domain.schema import AttributeType
from shoal_cluster.filtering.attributes import ATTRIBUTE_BYTES_MAX, validate_attributes
from shoal_cluster.filtering.literals import check_scalar, is_stored_form

DECLARED = {
    "section": AttributeType.KEYWORD,
    "tags": AttributeType.KEYWORD_LIST,
    "more_tags": AttributeType.KEYWORD_LIST,
    "size": AttributeType.INT,
    "score": AttributeType.FLOAT,
    "free": AttributeType.BOOL,
    "built_at": AttributeType.TIMESTAMP,
}
FIELD = "points[3].attributes"

REFUSED: dict[str, tuple[dict[str, object], str, str | None]] = {
    "keyword from int": ({"section": 3}, "section", None),
    "list from keyword": ({"tags": "net"}, "tags", None),
    "list of ints": ({"tags": ["a", 3]}, "tags[1]", None),
    "int from bool": ({"size": True}, "size", None),
    "int from float": ({"size": 3.0}, "size", None),
    "int from null": ({"size": None}, "size", None),
    "float from bool": ({"score": False}, "score", None),
    "float from keyword": ({"score": "3"}, "score", None),
    "bool from int": ({"free": 1}, "free", None),
    "timestamp from keyword": ({"built_at": "2024"}, "built_at", None),
    "nan": ({"score": math.nan}, "score", "finite numbers"),
    "infinity": ({"score": -math.inf}, "score", "finite numbers"),
    "int too large": ({"size": 1 << 63}, "size", "signed 64-bit integers"),
    "timestamp too small": ({"built_at": -(1 << 63) - 1}, "built_at", "signed 64-bit integers"),
    "float too fine": ({"score": 2**53 + 1}, "score", "integers up to 2**53 for a float attribute"),
    "keyword too long": (
        {"section": "k" * (KEYWORD_BYTES_MAX + 1)},
        "section",
        f"{KEYWORD_BYTES_MAX} bytes of UTF-8",
    ),
    "list too long": (
        {"tags": ["a"] * (KEYWORD_LIST_LENGTH_MAX + 1)},
        "tags",
        f"{KEYWORD_LIST_LENGTH_MAX} keywords",
    ),
    "surrogate": ({"section": "\udfff"}, "section", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_attribute_is_refused_naming_field_and_limit(name: str) -> None:
    attributes, field, limit = REFUSED[name]
    with pytest.raises(InvalidRequest) as caught:
        validate_attributes({"free": True, **attributes}, DECLARED, field=FIELD)
    assert caught.value.field == f"{FIELD}.{field}"
    assert caught.value.limit == limit
    assert caught.value.outcome is Outcome.NOT_APPLIED


def test_undeclared_attribute_error_lists_the_declared_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"are: section, tags, .*built_at") as caught:
        validate_attributes({"colour": "red"}, DECLARED, field=FIELD)
    assert caught.value.field == FIELD


def test_keywords_of_one_row_are_bounded_together() -> None:
    words = [f"{number:04}".ljust(KEYWORD_BYTES_MAX, "x") for number in range(256)]
    full = {"tags": words}
    assert validate_attributes(full, DECLARED, field=FIELD) == full
    with pytest.raises(InvalidRequest) as caught:
        validate_attributes({**full, "more_tags": ["y"]}, DECLARED, field=FIELD)
    assert caught.value.limit == f"{ATTRIBUTE_BYTES_MAX} bytes of UTF-8"


def test_values_are_returned_as_columns_store_them() -> None:
    checked = validate_attributes(
        {"tags": ("b", "a", "b"), "score": 3, "size": -(1 << 63), "section": "", "free": False},
        DECLARED,
        field=FIELD,
    )
    assert checked == {
        "tags": ["b", "a"],
        "score": 3.0,
        "size": -(1 << 63),
        "section": "",
        "free": False,
    }
    assert isinstance(checked["score"], float)
    assert validate_attributes({"tags": []}, DECLARED, field=FIELD) == {"tags": []}


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), 1 << 64)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["k" * 1024, "k" * 1025, "é" * 513, "\ud800"])
    | st.lists(st.text(max_size=2), max_size=2)
)


@settings(max_examples=300, deadline=None)
@given(SCALARS, st.sampled_from(list(AttributeType)))
def test_quick_check_accepts_only_what_the_full_check_leaves_unchanged(
    value: object, kind: AttributeType
) -> None:
    if is_stored_form(value, kind):
        checked = check_scalar(value, kind, attribute="a", field="a")
        assert checked is value
