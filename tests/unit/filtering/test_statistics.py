"""Statistics rule out only what cannot match (invariant F-3)."""

import msgpack
import pytest
from hypothesis import given, settings

from shoal_cluster.domain.errors import Corrupt, Internal
from shoal_cluster.domain.schema import AttributeType
from shoal_cluster.filtering import statistics
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
    matches,
)
from shoal_cluster.filtering.statistics import DISTINCT_VALUES_MAX, rule_out
from shoal_cluster.filtering.validation import validate
from tests.unit.filtering.strategies import Case, Row, cases, every_leaf, every_row

EQ, NE, LT, LE, GT, GE = list(Operator)


@settings(max_examples=150, deadline=None)
@given(cases(rows_max=4))
def test_segment_with_a_matching_row_is_never_ruled_out(case: Case) -> None:
    """Few rows, so that most filters come near to ruling the segment out."""
    expression = validate(case.expression, case.attributes)
    stats = statistics.build(case.rows, case.stored)
    packed = msgpack.packb(statistics.to_wire(stats))
    assert statistics.from_wire(msgpack.unpackb(packed)) == stats
    for asked in (expression, Not(expression)):
        if any(matches(asked, row) for row in case.rows):
            assert rule_out(asked, stats, len(case.rows)) is None


@pytest.mark.parametrize("kind", list(AttributeType))
def test_every_condition_is_judged_soundly_at_every_border(kind: AttributeType) -> None:
    """Over all segments of one or two rows; one of one row is judged exactly, too."""
    rows = every_row("a", kind)
    asked = [(leaf, [matches(leaf, row) for row in rows]) for leaf in every_leaf("a", kind)]
    for i in range(len(rows)):
        for j in range(i, len(rows)):
            stats = statistics.build([rows[i], rows[j]], {"a": kind})
            for leaf, holds in asked:
                if holds[i] or holds[j]:
                    assert rule_out(leaf, stats, 2) is None
                elif i == j and not isinstance(leaf, And):
                    assert rule_out(leaf, stats, 2) is not None
                if not (holds[i] and holds[j]):
                    assert rule_out(Not(leaf), stats, 2) is None


ATTRIBUTES = {
    "size": AttributeType.INT,
    "score": AttributeType.FLOAT,
    "section": AttributeType.KEYWORD,
    "name": AttributeType.KEYWORD,
    "tags": AttributeType.KEYWORD_LIST,
    "free": AttributeType.BOOL,
}
ROWS: list[Row] = [
    {
        "size": 100 + number % 801,
        "section": ("net", "web")[number % 2],
        "name": f"n{number:04}",
        "tags": ["a", "b"],
        "free": True,
    }
    for number in range(1000)
]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        (Comparison("size", GE, 1000), "size max 900 < 1000"),
        (Comparison("size", GT, 900), "size max 900 <= 900"),
        (Comparison("size", LT, 100), "size min 100 >= 100"),
        (Comparison("size", LE, 99), "size min 100 > 99"),
        (Comparison("size", EQ, 7), "size min 100 > 7"),
        (Comparison("section", EQ, "doc"), 'no row has section "doc"'),
        (Comparison("name", EQ, "z"), 'name max "n0999" < "z"'),
        (In("name", ("a", "z")), 'no row has name in 2 values: min "n0000", max "n0999"'),
        (AnyOf("tags", ("c",)), 'no row has tags "c"'),
        (AllOf("tags", ("a", "c")), 'no row has tags "c"'),
        (Comparison("free", EQ, False), "free min true > false"),
        (Comparison("score", LT, 1.0), "no row has score"),
        (Exists("undeclared_then"), "no row has undeclared_then"),
        (Not(Exists("size")), "every row has exists(size)"),
        (Comparison("free", NE, True), "every row has free = true"),
        (Not(Comparison("size", LT, 1000)), "every row has size < 1000"),
        (And((Exists("size"), Comparison("size", GE, 1000))), "size max 900 < 1000"),
        (
            Or((Comparison("size", GE, 1000), Exists("score"))),
            "size max 900 < 1000 and no row has score",
        ),
    ],
)
def test_reason_says_what_rules_the_segment_out(expression: Expression, reason: str) -> None:
    stats = statistics.build(ROWS, ATTRIBUTES)
    assert rule_out(expression, stats, len(ROWS)) == reason


@pytest.mark.parametrize(
    "expression",
    [
        Comparison("size", GE, 900),
        Comparison("section", EQ, "web"),
        Comparison("section", NE, "web"),
        Comparison("name", EQ, "n0000x"),
        Not(AnyOf("tags", ("a",))),
        Or((Comparison("size", GE, 1000), Exists("size"))),
    ],
)
def test_segment_that_might_match_stays(expression: Expression) -> None:
    assert rule_out(expression, statistics.build(ROWS, ATTRIBUTES), len(ROWS)) is None


def test_value_set_is_kept_up_to_its_bound() -> None:
    for distinct, kept in ((DISTINCT_VALUES_MAX, True), (DISTINCT_VALUES_MAX + 1, False)):
        rows: list[Row] = [{"name": f"n{number}"} for number in range(distinct)]
        stats = statistics.build(rows, {"name": AttributeType.KEYWORD})
        assert (stats["name"].values is not None) is kept
        assert stats["name"].present == distinct


def test_empty_segment_is_ruled_out() -> None:
    assert rule_out(Not(Exists("size")), statistics.build([], ATTRIBUTES), 0) == "no rows"


def test_statistics_of_undeclared_attributes_are_refused() -> None:
    with pytest.raises(Internal, match="colour"):
        statistics.build([{"colour": "red"}], ATTRIBUTES)


@pytest.mark.parametrize("wire", [None, [3], [["size", "int", 1]], [["s", "word", 0, 1, 1, None]]])
def test_damaged_statistics_are_corrupt(wire: object) -> None:
    with pytest.raises(Corrupt):
        statistics.from_wire(wire)
