"""Checks a filter against the declared attributes and brings it into canonical form.

Runs once per request, at the coordinator. Everything below trusts its result: every attribute is
declared, every literal has the type of its column, and every size is within its limit.
"""

from collections.abc import Mapping

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import FILTER_DEPTH_MAX, FILTER_NODES_MAX, FILTER_VALUES_MAX
from shoal_cluster.domain.schema import AttributeType
from shoal_cluster.filtering.expression import (
    RANGE_OPERATORS,
    AllOf,
    And,
    AnyOf,
    Comparison,
    Exists,
    Expression,
    In,
    Not,
    Or,
)
from shoal_cluster.filtering.literals import (
    INT64_TYPES,
    NUMBER_TYPES,
    Scalar,
    check_scalar,
    show,
    show_names,
    show_typed,
)


def validate(expression: Expression, attributes: Mapping[str, AttributeType]) -> Expression:
    """Returns the filter in canonical form.

    Literals have the type of their column (an int for a float attribute becomes a float, an
    integral float for an int attribute becomes an int); values of `in`, `any_of` and `all_of` are
    sorted and free of duplicates.

    Raises: InvalidRequest naming the place, e.g. `filter.and[1].value`, and the limit or the
    declared attributes (nothing was applied).
    """
    return _Validation(attributes).check(expression, field="filter", depth=1)


class _Validation:
    """One walk over one filter; counts what the limits bound."""

    def __init__(self, attributes: Mapping[str, AttributeType]) -> None:
        self._attributes = attributes
        self._nodes = 0
        self._values = 0

    def check(self, expression: Expression, *, field: str, depth: int) -> Expression:
        self._nodes += 1
        require_size(nodes=self._nodes, depth=depth, field=field)
        match expression:
            case And(children):
                return And(self._check_children(children, field=f"{field}.and", depth=depth))
            case Or(children):
                return Or(self._check_children(children, field=f"{field}.or", depth=depth))
            case Not(child):
                return Not(self.check(child, field=f"{field}.not", depth=depth + 1))
        kind = self._declared_type(expression.attribute, field)
        match expression:
            case Exists():
                return expression
            case Comparison():
                return _check_comparison(expression, kind, field)
            case In(attribute, values):
                if kind is AttributeType.KEYWORD_LIST:
                    raise _list_needs_any_of(attribute, "in", field)
                return In(attribute, self._check_values(attribute, values, kind, field))
            case AnyOf(attribute, values) | AllOf(attribute, values):
                if kind is not AttributeType.KEYWORD_LIST:
                    raise InvalidRequest(
                        f"attribute {show(attribute)} is declared {kind.value}; any_of and all_of "
                        "ask for a keyword_list, use in",
                        field=f"{field}.operator",
                    )
                checked = self._check_values(attribute, values, AttributeType.KEYWORD, field)
                return type(expression)(attribute, tuple(str(word) for word in checked))

    def _check_children(
        self, children: tuple[Expression, ...], *, field: str, depth: int
    ) -> tuple[Expression, ...]:
        if not children:
            raise InvalidRequest(
                "a filter without operands; leave it out to match every row",
                field=field,
                limit="at least 1 operand",
            )
        return tuple(
            self.check(child, field=f"{field}[{position}]", depth=depth + 1)
            for position, child in enumerate(children)
        )

    def _declared_type(self, attribute: str, field: str) -> AttributeType:
        kind = self._attributes.get(attribute)
        if kind is None:
            raise InvalidRequest(
                f"attribute {show(attribute)} is not declared; "
                f"declared are: {show_names(self._attributes)}",
                field=f"{field}.attribute",
            )
        return kind

    def _check_values(
        self, attribute: str, values: tuple[Scalar, ...], kind: AttributeType, field: str
    ) -> tuple[Scalar, ...]:
        if not values:
            raise InvalidRequest(
                f"attribute {show(attribute)} is compared with an empty list of values",
                field=f"{field}.values",
                limit="at least 1 value",
            )
        self._values += len(values)
        if self._values > FILTER_VALUES_MAX:
            raise InvalidRequest(
                f"the filter lists at least {self._values} values",
                field=f"{field}.values",
                limit=f"{FILTER_VALUES_MAX} values in all",
            )
        checked = {
            _check_literal(value, kind, attribute=attribute, field=f"{field}.values[{position}]")
            for position, value in enumerate(values)
        }
        return tuple(sorted(checked))


def require_size(*, nodes: int, depth: int, field: str) -> None:
    """Checks the bounds that keep a walk over a filter short.

    Raises: InvalidRequest naming the field and the limit (nothing was applied).
    """
    if depth > FILTER_DEPTH_MAX:
        raise InvalidRequest(
            f"the filter is nested {depth} deep", field=field, limit=f"{FILTER_DEPTH_MAX} levels"
        )
    if nodes > FILTER_NODES_MAX:
        raise InvalidRequest(
            f"the filter has at least {nodes} conditions and operators; many values of one "
            "attribute fit in one in",
            field=field,
            limit=f"{FILTER_NODES_MAX} conditions and operators",
        )


def _check_comparison(comparison: Comparison, kind: AttributeType, field: str) -> Comparison:
    attribute, asked = comparison.attribute, comparison.operator
    if kind is AttributeType.KEYWORD_LIST:
        raise _list_needs_any_of(attribute, asked.value, field)
    if asked in RANGE_OPERATORS and kind not in NUMBER_TYPES:
        raise InvalidRequest(
            f"attribute {show(attribute)} is declared {kind.value}, which has no order; "
            f"{asked.value} asks for int, float or timestamp",
            field=f"{field}.operator",
        )
    value = _check_literal(comparison.value, kind, attribute=attribute, field=f"{field}.value")
    return Comparison(attribute, asked, value)


def _check_literal(value: Scalar, kind: AttributeType, *, attribute: str, field: str) -> Scalar:
    """Checks a literal; unlike a row's value, it may be an integral float for an int attribute.

    Languages without integers write 3 as 3.0, and asking for it cannot lose anything.
    """
    if kind in INT64_TYPES and isinstance(value, float):
        if not value.is_integer():
            raise InvalidRequest(
                f"attribute {show(attribute)} is declared {kind.value}, "
                f"got {show_typed(value)}; compare it with a whole number",
                field=field,
            )
        value = int(value)
    return check_scalar(value, kind, attribute=attribute, field=field)


def _list_needs_any_of(attribute: str, asked: str, field: str) -> InvalidRequest:
    return InvalidRequest(
        f"attribute {show(attribute)} is declared keyword_list, which {asked} cannot compare; "
        "use any_of or all_of",
        field=f"{field}.operator",
    )
