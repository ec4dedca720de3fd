"""What a segment's manifest entry knows of its attributes, and which filters that rules out.

Kept in memory for every segment, so that a search drops whole segments before it opens them.
Invariant F-3: when `rule_out` gives a reason, no row that the statistics were built from matches.
Rows that die later change nothing: statistics describe a superset of the living.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal_cluster.domain.errors import Corrupt, Internal
from shoal_cluster.domain.schema import AttributeType, AttributeValue
from shoal_cluster.filtering.expression import (
    HOLDS,
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
)
from shoal_cluster.filtering.literals import Scalar, show, show_names

DISTINCT_VALUES_MAX = 256
"""Keywords kept as a set; beyond, only least and greatest. 256 × 20 bytes: 5 KiB an attribute."""

_REASON_LENGTH_MAX = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeStatistics:
    """One attribute over all rows of a segment.

    present: rows that have it. minimum, maximum: of the values (of the keywords in lists), None
    when there is none; false is less than true. values: the distinct keywords, or None when they
    are more than DISTINCT_VALUES_MAX or not keywords.
    """

    kind: AttributeType
    present: int
    minimum: Scalar | None
    maximum: Scalar | None
    values: frozenset[str] | None


SegmentStatistics = Mapping[str, AttributeStatistics]
"""By attribute name; an attribute that is absent was declared after the segment was built."""


def build(
    rows: Sequence[Mapping[str, AttributeValue]], attributes: Mapping[str, AttributeType]
) -> dict[str, AttributeStatistics]:
    """Returns the statistics of the rows for every declared attribute.

    Raises: Internal when a row has an attribute that is not declared.
    """
    undeclared = set().union(*rows) - attributes.keys()
    if undeclared:
        raise Internal(
            f"rows have attributes that the schema does not declare: "
            f"{show_names(sorted(undeclared))}"
        )
    return {name: _build_one(name, kind, rows) for name, kind in attributes.items()}


def _build_one(
    name: str, kind: AttributeType, rows: Sequence[Mapping[str, AttributeValue]]
) -> AttributeStatistics:
    held = [row[name] for row in rows if name in row]
    distinct: set[Scalar] = set()
    for value in held:
        if isinstance(value, list):
            distinct.update(value)
        else:
            distinct.add(value)
    keywords = kind in (AttributeType.KEYWORD, AttributeType.KEYWORD_LIST)
    few = keywords and len(distinct) <= DISTINCT_VALUES_MAX
    return AttributeStatistics(
        kind=kind,
        present=len(held),
        minimum=min(distinct, default=None),
        maximum=max(distinct, default=None),
        values=frozenset(str(word) for word in distinct) if few else None,
    )


def to_wire(statistics: SegmentStatistics) -> list[object]:
    """Returns msgpack-able lists; `from_wire` reverses it exactly."""
    return [
        [
            name,
            known.kind.value,
            known.present,
            known.minimum,
            known.maximum,
            None if known.values is None else sorted(known.values),
        ]
        for name, known in statistics.items()
    ]


def from_wire(wire: object) -> dict[str, AttributeStatistics]:
    """Rebuilds the statistics.

    Raises: Corrupt when the lists are not what `to_wire` returned.
    """
    statistics = {}
    for entry in wire if isinstance(wire, list) else [wire]:
        match entry:
            case [
                str(name),
                str(kind),
                int(present),
                None | str() | int() | float() as minimum,
                None | str() | int() | float() as maximum,
                None | [*_] as values,
            ] if kind in _KINDS and all(isinstance(word, str) for word in values or ()):
                statistics[name] = AttributeStatistics(
                    kind=_KINDS[kind],
                    present=present,
                    minimum=minimum,
                    maximum=maximum,
                    values=None if values is None else frozenset(map(str, values)),
                )
            case _:
                raise Corrupt("attribute statistics do not decode")
    return statistics


_KINDS: Mapping[str, AttributeType] = {kind.value: kind for kind in AttributeType}


def rule_out(expression: Expression, statistics: SegmentStatistics, rows: int) -> str | None:
    """Returns why no row can match, e.g. `installed_kb max 900 < 1000`, or None if one might.

    expression: validated. rows: how many the statistics were built from. Sound, not complete: each
    condition is judged alone.
    """
    reason = _Judgement(statistics, rows).why_none(expression)
    if reason is None or len(reason) <= _REASON_LENGTH_MAX:
        return reason
    return reason[:_REASON_LENGTH_MAX] + "…"


class _Judgement:
    """Bounds a filter from both sides, since `not` turns one into the other."""

    def __init__(self, statistics: SegmentStatistics, rows: int) -> None:
        self._statistics = statistics
        self._rows = rows

    def why_none(self, expression: Expression) -> str | None:
        """Returns why no row matches, or None."""
        if self._rows == 0:
            return "no rows"
        match expression:
            case And(children):
                return next(filter(None, map(self.why_none, children)), None)
            case Or(children):
                reasons = [self.why_none(child) for child in children]
                if not all(reasons):
                    return None
                return " and ".join(dict.fromkeys(filter(None, reasons)))
            case Not(child):
                return f"every row has {describe(child)}" if self.all_match(child) else None
            case Comparison(attribute, Operator.NE, value):
                return self.why_none(Not(Comparison(attribute, Operator.EQ, value)))
        known = self._statistics.get(expression.attribute)
        if known is None or known.present == 0:
            return f"no row has {expression.attribute}"
        match expression:
            case Exists():
                return None
            case Comparison(attribute, asked, value):
                return _why_no_value(attribute, known, asked, value)
            case In(attribute, values) | AnyOf(attribute, values):
                return _why_none_of(attribute, known, values)
            case AllOf(attribute, values):
                whys = (_why_no_value(attribute, known, Operator.EQ, v) for v in values)
                return next(filter(None, whys), None)

    def all_match(self, expression: Expression) -> bool:
        """Tells whether every row is known to match."""
        match expression:
            case And(children):
                return all(self.all_match(child) for child in children)
            case Or(children):
                return any(self.all_match(child) for child in children)
            case Not(child):
                return self.why_none(child) is not None
            case Comparison(attribute, Operator.NE, value):
                return self.why_none(Comparison(attribute, Operator.EQ, value)) is not None
        known = self._statistics.get(expression.attribute)
        if known is None or known.present < self._rows:
            return False
        match expression:
            case Exists():
                return True
            case Comparison(_, asked, value):
                # Every operator left is monotone: what holds at both ends holds between them.
                ends = (known.minimum, known.maximum)
                return None not in ends and all(HOLDS[asked](end, value) for end in ends)
            case In(_, values):
                if known.values is not None:
                    return known.values <= frozenset(values)
                return known.minimum == known.maximum and known.minimum in values
            case AnyOf() | AllOf():
                # The shortest list is not known; it may even be empty.
                return False


def _why_no_value(
    attribute: str, known: AttributeStatistics, asked: Operator, wanted: Scalar
) -> str | None:
    """Returns why no present value stands in the asked relation to `wanted`, or None."""
    least, greatest = known.minimum, known.maximum
    if least is None or greatest is None:
        return f"no row has a value in {attribute}"
    if known.values is not None and asked is Operator.EQ:
        return None if wanted in known.values else f"no row has {attribute} {show(wanted)}"
    below, above = HOLDS[Operator.LT], HOLDS[Operator.GT]
    match asked:
        case Operator.EQ if below(greatest, wanted):
            return f"{attribute} max {show(greatest)} < {show(wanted)}"
        case Operator.EQ if above(least, wanted):
            return f"{attribute} min {show(least)} > {show(wanted)}"
        case Operator.GE if below(greatest, wanted):
            return f"{attribute} max {show(greatest)} < {show(wanted)}"
        case Operator.GT if not above(greatest, wanted):
            return f"{attribute} max {show(greatest)} <= {show(wanted)}"
        case Operator.LE if above(least, wanted):
            return f"{attribute} min {show(least)} > {show(wanted)}"
        case Operator.LT if not below(least, wanted):
            return f"{attribute} min {show(least)} >= {show(wanted)}"
        case _:
            return None


def _why_none_of(
    attribute: str, known: AttributeStatistics, values: Sequence[Scalar]
) -> str | None:
    """Returns why no present value is one of `values`, or None."""
    reason = None
    for value in values:
        reason = _why_no_value(attribute, known, Operator.EQ, value)
        if reason is None:
            return None
    if len(values) == 1 or known.minimum is None or known.maximum is None:
        return reason
    return (
        f"no row has {attribute} in {len(values)} values: "
        f"min {show(known.minimum)}, max {show(known.maximum)}"
    )
