"""Random schemas, rows and filters that validation accepts; small pools, so that things meet."""

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from shoal_cluster.domain.schema import AttributeType, AttributeValue
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
)
from shoal_cluster.filtering.literals import INT64_MAX, INT64_MIN, NUMBER_TYPES, Scalar

KEYWORDS = ["", "a", "ab", "b", "net", "œuvre", "\U0001f41f", "zz"]
INTS = [INT64_MIN, -7, -1, 0, 1, 2, 3, 900, 1000, INT64_MAX]
FLOATS = [-1e300, -2.5, -0.0, 0.0, 5e-324, 0.5, 1.0, 2.0, 1e300]

EQUALITY = (Operator.EQ, Operator.NE)

SCALARS: Mapping[AttributeType, st.SearchStrategy[Scalar]] = {
    AttributeType.KEYWORD: st.sampled_from(KEYWORDS),
    AttributeType.INT: st.sampled_from(INTS),
    AttributeType.TIMESTAMP: st.sampled_from(INTS),
    AttributeType.FLOAT: st.sampled_from(FLOATS),
    AttributeType.BOOL: st.booleans(),
}
LISTS = st.lists(st.sampled_from(KEYWORDS), max_size=4, unique=True)

Row = dict[str, AttributeValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """attributes: what is asked about. stored: what was declared when the rows were written."""

    attributes: dict[str, AttributeType]
    stored: dict[str, AttributeType]
    rows: list[Row]
    expression: Expression


@st.composite
def rows_of(draw: st.DrawFn, stored: Mapping[str, AttributeType], *, rows_max: int) -> list[Row]:
    optional = {name: SCALARS.get(kind, LISTS) for name, kind in stored.items()}
    row = st.fixed_dictionaries({}, optional=optional)
    return draw(st.lists(row, max_size=rows_max))


def leaves(attributes: Mapping[str, AttributeType]) -> st.SearchStrategy[Expression]:
    return st.one_of([_leaf(name, kind) for name, kind in attributes.items()])


def _leaf(name: str, kind: AttributeType) -> st.SearchStrategy[Expression]:
    exists = st.just(Exists(name))
    words = st.lists(st.sampled_from(KEYWORDS), min_size=1, max_size=3).map(tuple)
    if kind is AttributeType.KEYWORD_LIST:
        any_of = words.map(lambda chosen: AnyOf(name, chosen))
        return any_of | words.map(lambda chosen: AllOf(name, chosen)) | exists
    asked = st.sampled_from(list(Operator) if kind in NUMBER_TYPES else list(EQUALITY))
    comparison = st.builds(Comparison, st.just(name), asked, SCALARS[kind])
    values = st.lists(SCALARS[kind], min_size=1, max_size=3).map(tuple)
    return comparison | values.map(lambda chosen: In(name, chosen)) | exists


def expressions(attributes: Mapping[str, AttributeType]) -> st.SearchStrategy[Expression]:
    def extend(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        operands = st.lists(inner, min_size=1, max_size=4).map(tuple)
        return operands.map(And) | operands.map(Or) | inner.map(Not)

    return st.recursive(leaves(attributes), extend, max_leaves=8)


@st.composite
def cases(draw: st.DrawFn, *, rows_max: int = 30) -> Case:
    kinds = draw(st.lists(st.sampled_from(list(AttributeType)), min_size=1, max_size=5))
    attributes = {f"{kind.value}_{position}": kind for position, kind in enumerate(kinds)}
    stored_count = draw(st.integers(0, len(attributes)) | st.just(len(attributes)))
    stored = dict(list(attributes.items())[:stored_count])
    return Case(
        attributes=attributes,
        stored=stored,
        rows=draw(rows_of(stored, rows_max=rows_max)),
        expression=draw(expressions(attributes)),
    )


def every_leaf(name: str, kind: AttributeType) -> list[Expression]:
    """Returns every condition on every value of the pools: the borders that chance may miss."""
    if kind is AttributeType.KEYWORD_LIST:
        pairs = [(a, b) for a in KEYWORDS for b in KEYWORDS]
        return [Exists(name), *(make(name, pair) for pair in pairs for make in (AnyOf, AllOf))]
    asked = list(Operator) if kind in NUMBER_TYPES else list(EQUALITY)
    values = EVERY[kind]
    ranges = [
        And((Comparison(name, Operator.GT, low), Comparison(name, Operator.LE, high)))
        for low in values
        for high in values
        if kind in NUMBER_TYPES
    ]
    return [
        Exists(name),
        *(Comparison(name, each, value) for each in asked for value in values),
        *(In(name, (low, high)) for low in values for high in values),
        *ranges,
    ]


EVERY: Mapping[AttributeType, list[Scalar]] = {
    AttributeType.KEYWORD: [*KEYWORDS],
    AttributeType.INT: [*INTS],
    AttributeType.TIMESTAMP: [*INTS],
    AttributeType.FLOAT: [*FLOATS],
    AttributeType.BOOL: [False, True],
}


def every_row(name: str, kind: AttributeType) -> list[Row]:
    """Returns a row for every value of the pools, and one without the attribute."""
    if kind is AttributeType.KEYWORD_LIST:
        lists = [[], *([word] for word in KEYWORDS), KEYWORDS[:3], KEYWORDS]
        filled: list[Row] = [{name: words} for words in lists]
    else:
        filled = [{name: value} for value in EVERY[kind]]
    return [{}, *filled]
