"""Translates filters from protobuf. What they mean, and whether it is allowed, is filtering/'s."""

from collections.abc import Mapping, Sequence

from shoal_cluster.domain.errors import InvalidRequest
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
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.filtering.validation import require_size
from shoal_protos.v1 import types_pb2 as pb

_OPERATORS: Mapping[int, Operator] = {
    pb.COMPARISON_OP_EQ: Operator.EQ,
    pb.COMPARISON_OP_NE: Operator.NE,
    pb.COMPARISON_OP_LT: Operator.LT,
    pb.COMPARISON_OP_LE: Operator.LE,
    pb.COMPARISON_OP_GT: Operator.GT,
    pb.COMPARISON_OP_GE: Operator.GE,
}


def decode_filter(message: pb.Filter) -> Expression:
    """Returns the filter as a syntax tree; its attributes and literals are not checked yet.

    Raises: InvalidRequest naming the malformed place, e.g. `filter.and[1].operator`.
    """
    return _Decoding().decode(message, field="filter", depth=1)


class _Decoding:
    """One walk over one message; counts nodes so that hostile input ends early."""

    def __init__(self) -> None:
        self._nodes = 0

    def decode(self, message: pb.Filter, *, field: str, depth: int) -> Expression:
        self._nodes += 1
        require_size(nodes=self._nodes, depth=depth, field=field)
        match message.WhichOneof("condition"):
            case "comparison":
                asked = _OPERATORS.get(message.comparison.op)
                if asked is None:
                    raise InvalidRequest(
                        f"unknown comparison operator {message.comparison.op}",
                        field=f"{field}.operator",
                    )
                value = _scalar(message.comparison.value, f"{field}.value")
                return Comparison(message.comparison.attribute, asked, value)
            case "member_of":
                return In(message.member_of.attribute, _scalars(message.member_of, field))
            case "any_of":
                return AnyOf(message.any_of.attribute, _words(message.any_of, field))
            case "all_of":
                return AllOf(message.all_of.attribute, _words(message.all_of, field))
            case "exists":
                return Exists(message.exists.attribute)
            case "conjunction":
                children = message.conjunction.filters
                return And(self._decode_all(children, field=f"{field}.and", depth=depth))
            case "disjunction":
                children = message.disjunction.filters
                return Or(self._decode_all(children, field=f"{field}.or", depth=depth))
            case "negation":
                return Not(self.decode(message.negation, field=f"{field}.not", depth=depth + 1))
            case _:
                raise InvalidRequest(
                    "a filter without a condition; leave it out to match every row", field=field
                )

    def _decode_all(
        self, messages: Sequence[pb.Filter], *, field: str, depth: int
    ) -> tuple[Expression, ...]:
        # Checked before the walk, so that the count of a huge list costs nothing.
        require_size(nodes=self._nodes + len(messages), depth=depth, field=field)
        return tuple(
            self.decode(message, field=f"{field}[{position}]", depth=depth + 1)
            for position, message in enumerate(messages)
        )


def _scalars(membership: pb.Membership, field: str) -> tuple[Scalar, ...]:
    return tuple(
        _scalar(value, f"{field}.values[{position}]")
        for position, value in enumerate(membership.values)
    )


def _words(membership: pb.Membership, field: str) -> tuple[str, ...]:
    words = []
    for position, value in enumerate(_scalars(membership, field)):
        if not isinstance(value, str):
            raise InvalidRequest(
                "any_of and all_of take keywords only", field=f"{field}.values[{position}]"
            )
        words.append(value)
    return tuple(words)


def _scalar(value: pb.FilterValue, field: str) -> Scalar:
    match value.WhichOneof("value"):
        case "keyword":
            return value.keyword
        case "int":
            return value.int
        case "float":
            return value.float
        case "bool":
            return value.bool
        case "timestamp_ms":
            return value.timestamp_ms
        case _:
            raise InvalidRequest("no value to compare with", field=field)
