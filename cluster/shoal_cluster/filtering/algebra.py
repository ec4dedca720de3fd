"""Evaluates filters over any index of attribute values: the one place that knows and, or and not.

A `LeafSource` (columns.py for segments, memory_columns.py for the memtable) answers single
conditions; this module combines the answers and gives missing values their one meaning
(invariant F-1): no row without the value is in any source's answer, and `!=` is the complement
of `=`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.filtering.bitmaps import Mask, all_rows
from shoal_cluster.filtering.expression import (
    RANGE_OPERATORS,
    And,
    Comparison,
    Expression,
    Leaf,
    Not,
    Operator,
    Or,
)


@dataclass(frozen=True, slots=True)
class Between:
    """All comparisons of one number attribute in an `and`, answered at once.

    `size >= 10 and size < 20` is a narrow span of the sorted values; its halves are wide ones. Not
    part of the filter language: it exists only while a filter is evaluated.
    """

    attribute: str
    comparisons: tuple[Comparison, ...]


Condition = Leaf | Between
"""What a source answers."""


COMPARED: Mapping[Operator, Callable[[npt.NDArray[Any], Any], Mask]] = {
    Operator.EQ: np.equal,
    Operator.LT: np.less,
    Operator.LE: np.less_equal,
    Operator.GT: np.greater,
    Operator.GE: np.greater_equal,
}
"""What each operator that sources answer asks of many numbers at once."""


class Bounds(NamedTuple):
    """Least and greatest number of rows that can match; equal when known exactly."""

    low: int
    high: int


class LeafSource(Protocol):
    """Answers single conditions over rows 0 … rows - 1; is never asked for `!=`."""

    @property
    def rows(self) -> int: ...

    def leaf_rows(self, leaf: Condition) -> BitMap:
        """Returns the rows that match; the caller does not change the bitmap."""
        ...

    def leaf_rows_among(self, leaf: Condition, candidates: BitMap) -> BitMap:
        """Returns the candidates that match; cheaper than all rows when they are few."""
        ...

    def leaf_bounds(self, leaf: Condition) -> Bounds:
        """Returns how many rows can match, at a small part of the cost of `leaf_rows`."""
        ...


def evaluate(expression: Expression, source: LeafSource) -> BitMap:
    """Returns the rows that match, as a bitmap that the caller owns."""
    return _matching(expression, source).copy()


def estimate(expression: Expression | Between, source: LeafSource) -> Bounds:
    """Returns how many rows can match (invariant F-5), without reading row numbers."""
    rows = source.rows
    match expression:
        case Not(child):
            low, high = estimate(child, source)
            return Bounds(rows - high, rows - low)
        case And(children):
            bounds = [estimate(operand, source) for operand in _operands(children)]
            missed = sum(rows - bound.low for bound in bounds)
            return Bounds(max(0, rows - missed), min((b.high for b in bounds), default=rows))
        case Or(children):
            bounds = [estimate(child, source) for child in children]
            reached = sum(bound.high for bound in bounds)
            return Bounds(max((b.low for b in bounds), default=0), min(rows, reached))
        case Comparison(_, Operator.NE, _):
            return estimate(_without_ne(expression), source)
        case _:
            return source.leaf_bounds(expression)


def _matching(expression: Expression | Between, source: LeafSource) -> BitMap:
    """Returns the rows that match; the bitmap may be the source's own."""
    match expression:
        case Not(child):
            return all_rows(source.rows) - _matching(child, source)
        case And(children):
            return _intersection(children, source)
        case Or((first, *others)):
            return _matching(first, source).union(*(_matching(o, source) for o in others))
        case Or():
            return BitMap()
        case Comparison(_, Operator.NE, _):
            return _matching(_without_ne(expression), source)
        case _:
            return source.leaf_rows(expression)


def _intersection(children: tuple[Expression, ...], source: LeafSource) -> BitMap:
    """Intersects the rarest condition first and stops when nothing is left."""
    operands = _operands(children)
    if len(operands) > 1:
        highs = {id(operand): estimate(operand, source).high for operand in operands}
        operands.sort(key=lambda operand: highs[id(operand)])
        if highs[id(operands[0])] == 0:
            return BitMap()
    matching: BitMap | None = None
    for operand in operands:
        if matching is None:
            matching = _matching(operand, source)
        else:
            matching = _matching_among(operand, matching, source)
        if not matching:
            return BitMap()
    return all_rows(source.rows) if matching is None else matching


def _matching_among(
    expression: Expression | Between, candidates: BitMap, source: LeafSource
) -> BitMap:
    match expression:
        case Not(child):
            # A difference spares the complement over all rows.
            return candidates - _matching_among(_without_ne(child), candidates, source)
        case And() | Or():
            return candidates & _matching(expression, source)
        case _:
            return source.leaf_rows_among(expression, candidates)


def _operands(children: tuple[Expression, ...]) -> list[Expression | Between]:
    """Returns the operands of an `and` without `!=`, ranges of one attribute brought together."""
    operands: list[Expression | Between] = []
    ranges: dict[str, list[Comparison]] = {}
    for child in children:
        if isinstance(child, Comparison) and child.operator in RANGE_OPERATORS:
            ranges.setdefault(child.attribute, []).append(child)
        else:
            operands.append(_without_ne(child))
    for attribute, comparisons in ranges.items():
        fused = len(comparisons) > 1
        operands.append(Between(attribute, tuple(comparisons)) if fused else comparisons[0])
    return operands


def _without_ne(expression: Expression) -> Expression:
    """Returns `!=` as `not (=)`, which is its definition; other filters unchanged."""
    match expression:
        case Comparison(attribute, Operator.NE, value):
            return Not(Comparison(attribute, Operator.EQ, value))
        case _:
            return expression
