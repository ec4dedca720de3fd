"""Filters: validation, wire form, routing bounds and descriptions."""

import math

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_cluster.domain.errors import InvalidRequest, Outcome
from shoal_cluster.domain.limits import (
    FILTER_DEPTH_MAX,
    FILTER_NODES_MAX,
    FILTER_VALUES_MAX,
    KEYWORD_BYTES_MAX,
)
from shoal_cluster.domain.schema import AttributeType
from shoal_cluster.filtering.expression import (
    AllOf,
    And,
    AnyOf,
    Comparison,
    Exists,
    Expression,
    In,
    Not,
    Operator,
    Or,
    describe,
    matches,
    pinned_values,
)
from shoal_cluster.filtering.validation import validate
from shoal_cluster.filtering.wire import from_wire, to_wire
from tests.unit.filtering.strategies import Case, cases, expressions, rows_of

EQ, NE, LT, GE = Operator.EQ, Operator.NE, Operator.LT, Operator.GE

ATTRIBUTES = {
    "section": AttributeType.KEYWORD,
    "tags": AttributeType.KEYWORD_LIST,
    "size": AttributeType.INT,
    "score": AttributeType.FLOAT,
    "free": AttributeType.BOOL,
    "built_at": AttributeType.TIMESTAMP,
}


def deep(levels: int) -> Expression:
    nested: Expression = Exists("size")
    for _ in range(levels - 1):
        nested = Not(nested)
    return nested


NET = Comparison("section", EQ, "net")

REFUSED: dict[str, tuple[Expression, str, str | None]] = {
    "undeclared": (And((NET, Exists("colour"))), "filter.and[1].attribute", None),
    "wrong type": (Comparison("section", EQ, 3), "filter.value", None),
    "bool is not int": (Not(Comparison("size", EQ, True)), "filter.not.value", None),
    "int is not bool": (Comparison("free", EQ, 1), "filter.value", None),
    "fraction": (Or((NET, Comparison("size", LT, 1.5))), "filter.or[1].value", None),
    "infinity for an int": (Comparison("size", LT, math.inf), "filter.value", None),
    "nan": (Comparison("score", EQ, math.nan), "filter.value", "finite numbers"),
    "infinity": (Comparison("score", LT, math.inf), "filter.value", "finite numbers"),
    "too large": (Comparison("size", LT, 1 << 63), "filter.value", "signed 64-bit integers"),
    "huge float": (Comparison("size", LT, 1e300), "filter.value", "signed 64-bit integers"),
    "huge int": (Comparison("score", LT, 10**5000), "filter.value", "signed 64-bit integers"),
    "inexact float": (Comparison("score", EQ, 2**53 + 1), "filter.value", "integers up to 2**53"),
    "range of words": (Comparison("section", GE, "net"), "filter.operator", None),
    "range of bools": (Comparison("free", LT, True), "filter.operator", None),
    "equal list": (Comparison("tags", EQ, "a"), "filter.operator", None),
    "list in": (In("tags", ("a",)), "filter.operator", None),
    "any of a word": (AnyOf("section", ("a",)), "filter.operator", None),
    "all of a number": (AllOf("size", ("a",)), "filter.operator", None),
    "empty in": (In("section", ()), "filter.values", "at least 1 value"),
    "empty any of": (AnyOf("tags", ()), "filter.values", "at least 1 value"),
    "empty all of": (AllOf("tags", ()), "filter.values", "at least 1 value"),
    "empty and": (Not(And(())), "filter.not.and", "at least 1 operand"),
    "empty or": (Or(()), "filter.or", "at least 1 operand"),
    "wrong element": (In("size", (1, "b")), "filter.values[1]", None),
    "long keyword": (
        Comparison("section", EQ, "é" * KEYWORD_BYTES_MAX),
        "filter.value",
        f"{KEYWORD_BYTES_MAX} bytes of UTF-8",
    ),
    "lone surrogate": (Comparison("section", EQ, "\ud800"), "filter.value", None),
    "too deep": (
        deep(FILTER_DEPTH_MAX + 1),
        "filter" + ".not" * FILTER_DEPTH_MAX,
        f"{FILTER_DEPTH_MAX} levels",
    ),
    "too many conditions": (
        Or((NET,) * FILTER_NODES_MAX),
        f"filter.or[{FILTER_NODES_MAX - 1}]",
        f"{FILTER_NODES_MAX} conditions",
    ),
    "too many values": (
        And((In("size", (1,)), In("size", tuple(range(FILTER_VALUES_MAX))))),
        "filter.and[1].values",
        f"{FILTER_VALUES_MAX} values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_filter_is_refused_naming_field_and_limit(name: str) -> None:
    expression, field, limit = REFUSED[name]
    with pytest.raises(InvalidRequest) as caught:
        validate(expression, ATTRIBUTES)
    assert caught.value.field == field
    assert caught.value.outcome is Outcome.NOT_APPLIED
    assert limit is None or (caught.value.limit or "").startswith(limit)
    assert len(caught.value.message) < 300


def test_undeclared_attribute_error_lists_the_declared_ones() -> None:
    with pytest.raises(InvalidRequest, match='"colour" is not declared; declared are: section, '):
        validate(Exists("colour"), ATTRIBUTES)
    with pytest.raises(InvalidRequest, match="declared are: none"):
        validate(Exists("colour"), {})


def test_wrong_type_error_names_attribute_declared_type_and_value() -> None:
    with pytest.raises(InvalidRequest, match='"size" is declared int, got keyword "big"'):
        validate(Comparison("size", EQ, "big"), ATTRIBUTES)
    with pytest.raises(InvalidRequest, match="use any_of"):
        validate(Comparison("tags", EQ, "a"), ATTRIBUTES)


def test_filters_at_the_limits_are_accepted() -> None:
    validate(deep(FILTER_DEPTH_MAX), ATTRIBUTES)
    validate(Or((NET,) * (FILTER_NODES_MAX - 1)), ATTRIBUTES)
    validate(In("size", tuple(range(FILTER_VALUES_MAX))), ATTRIBUTES)
    validate(Comparison("section", EQ, "k" * KEYWORD_BYTES_MAX), ATTRIBUTES)
    validate(Comparison("size", GE, -(1 << 63)), ATTRIBUTES)


def test_canonical_form_has_column_types_and_sorted_values() -> None:
    score = validate(Comparison("score", GE, 3), ATTRIBUTES)
    assert isinstance(score, Comparison)
    assert score.value == 3.0
    assert isinstance(score.value, float)
    size = validate(Comparison("built_at", LT, 3.0), ATTRIBUTES)
    assert isinstance(size, Comparison)
    assert isinstance(size.value, int)
    assert validate(In("size", (3, 1.0, 1, 2)), ATTRIBUTES) == In("size", (1, 2, 3))
    assert validate(AnyOf("tags", ("b", "a", "b")), ATTRIBUTES) == AnyOf("tags", ("a", "b"))


@settings(max_examples=60, deadline=None)
@given(cases(rows_max=0))
def test_wire_form_round_trips_and_validation_is_idempotent(case: Case) -> None:
    """Invariant F-2."""
    packed = msgpack.packb(to_wire(case.expression))
    assert repr(from_wire(msgpack.unpackb(packed))) == repr(case.expression)
    canonical = validate(case.expression, case.attributes)
    assert repr(validate(canonical, case.attributes)) == repr(canonical)


@pytest.mark.parametrize(
    ("wire", "field"),
    [
        (None, "filter"),
        ([], "filter"),
        ({"and": []}, "filter"),
        (["nand", []], "filter"),
        (["=", "section"], "filter"),
        (["=", 3, "net"], "filter"),
        (["=", "section", None], "filter.value"),
        (["=", "section", b"net"], "filter.value"),
        (["in", "section", "net"], "filter"),
        (["not", ["in", "section", ["a", []]]], "filter.not.values[1]"),
        (["any_of", "tags", ["a", 1]], "filter.values[1]"),
        (["and", [["exists", "size"], ["exists"]]], "filter.and[1]"),
        (["in", "size", [1] * (FILTER_VALUES_MAX + 1)], "filter.values"),
        (["or", [["exists", "size"]] * FILTER_NODES_MAX], "filter.or"),
    ],
)
def test_malformed_wire_form_is_refused_naming_the_place(wire: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        from_wire(wire)
    assert caught.value.field == field


def test_wire_form_nested_without_end_is_refused_early() -> None:
    wire: list[object] = ["exists", "size"]
    for _ in range(5000):
        wire = ["not", wire]
    with pytest.raises(InvalidRequest, match="nested"):
        from_wire(wire)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)
WORDS = st.sampled_from(["and", "or", "not", "=", "in", "any_of", "exists", "size"])


@settings(max_examples=100, deadline=None)
@given(st.recursive(WORDS | JSON, lambda inner: st.lists(inner, max_size=3), max_leaves=8))
def test_any_other_wire_form_fails_as_invalid_request(wire: object) -> None:
    try:
        rebuilt = from_wire(wire)
    except InvalidRequest as error:
        assert (error.field or "").startswith("filter")
    else:
        assert repr(from_wire(to_wire(rebuilt))) == repr(rebuilt)


ROUTED = {"section": AttributeType.KEYWORD, "other": AttributeType.KEYWORD}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_matching_rows_have_one_of_the_pinned_values(data: st.DataObject) -> None:
    """Invariant F-4, under every nesting of and, or and not."""
    expression = data.draw(expressions(ROUTED))
    pinned = pinned_values(expression, "section")
    for row in data.draw(rows_of(ROUTED, rows_max=12)):
        if pinned is not None and matches(expression, row):
            assert row.get("section") in pinned


@pytest.mark.parametrize(
    ("expression", "pinned"),
    [
        (NET, {"net"}),
        (In("section", ("net", "web")), {"net", "web"}),
        (And((NET, Exists("size"))), {"net"}),
        (And((In("section", ("net", "web")), In("section", ("web", "doc")))), {"web"}),
        (And((NET, Comparison("section", EQ, "web"))), set()),
        (Or((NET, Comparison("section", EQ, "web"))), {"net", "web"}),
        (Or((NET, Exists("size"))), None),
        (Comparison("section", NE, "net"), None),
        (Not(NET), None),
        (Not(Comparison("section", NE, "net")), {"net"}),
        (Not(Or((Comparison("section", NE, "net"), Exists("size")))), {"net"}),
        (Not(And((Comparison("section", NE, "net"), Exists("size")))), None),
        (Not(In("section", ("net",))), None),
        (Exists("section"), None),
        (Comparison("other", EQ, "net"), None),
    ],
)
def test_pinned_values_are_as_narrow_as_the_filter_says(
    expression: Expression, pinned: set[str] | None
) -> None:
    assert pinned_values(expression, "section") == pinned


def test_description_reads_as_the_filter_is_meant() -> None:
    expression = And((NET, Or((Comparison("size", GE, 1000), Not(Exists("tags"))))))
    assert describe(expression) == 'section = "net" and (size >= 1000 or not (exists(tags)))'
    many = describe(In("size", tuple(range(5000))))
    assert many == "size in [0, 1, 2, 3, 4, 5, 6, 7, and 4992 more]"
    assert describe(AllOf("tags", ("a",))) == 'tags all of ["a"]'
    assert len(describe(Or((NET,) * 900))) < 2100
