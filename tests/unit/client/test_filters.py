from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest

from shoal import F, Filter, InvalidRequest
from shoal_protos.v1 import types_pb2


def comparison(condition: Filter) -> types_pb2.Comparison:
    message = condition.to_proto()
    assert message.WhichOneof("condition") == "comparison"
    return message.comparison


@pytest.mark.parametrize(
    ("condition", "op"),
    [
        (F("n") == 1, types_pb2.COMPARISON_OP_EQ),
        (F("n") != 1, types_pb2.COMPARISON_OP_NE),
        (F("n") < 1, types_pb2.COMPARISON_OP_LT),
        (F("n") <= 1, types_pb2.COMPARISON_OP_LE),
        (F("n") > 1, types_pb2.COMPARISON_OP_GT),
        (F("n") >= 1, types_pb2.COMPARISON_OP_GE),
        (1 < F("n"), types_pb2.COMPARISON_OP_GT),  # noqa: SIM300
        (1 >= F("n"), types_pb2.COMPARISON_OP_LE),  # noqa: SIM300
    ],
)
def test_each_operator_becomes_its_comparison(condition: Filter, op: int) -> None:
    assert comparison(condition) == types_pb2.Comparison(
        attribute="n", op=op, value=types_pb2.FilterValue(int=1)
    )


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ("net", types_pb2.FilterValue(keyword="net")),
        (True, types_pb2.FilterValue(bool=True)),
        (3, types_pb2.FilterValue(int=3)),
        (3.0, types_pb2.FilterValue(float=3.0)),
        (np.int32(3), types_pb2.FilterValue(int=3)),
        (np.float32(0.5), types_pb2.FilterValue(float=0.5)),
        (np.bool_(True), types_pb2.FilterValue(bool=True)),
        (datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), types_pb2.FilterValue(timestamp_ms=1000)),
        (
            datetime(1970, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))),
            types_pb2.FilterValue(timestamp_ms=0),
        ),
    ],
)
def test_each_python_type_becomes_its_value(value: Any, sent: types_pb2.FilterValue) -> None:
    assert comparison(F("a") == value).value == sent


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "exists"),
        (date(2024, 1, 1), "date"),
        (datetime(2024, 1, 1), "time zone"),
        (["a"], "list"),
        (2**63, "cannot compare"),
        ("\ud800", "cannot compare"),
    ],
)
def test_a_value_that_cannot_be_compared_is_refused_by_name(value: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        _ = F("a") == value
    assert caught.value.field == "filter"
    assert "'a'" in caught.value.message


def test_membership_conditions_carry_their_values() -> None:
    values = [types_pb2.FilterValue(keyword="a"), types_pb2.FilterValue(keyword="b")]
    membership = types_pb2.Membership(attribute="tag", values=values)
    assert F("tag").in_(["a", "b"]).to_proto().member_of == membership
    assert F("tag").any_of(("a", "b")).to_proto().any_of == membership
    assert F("tag").all_of(iter(["a", "b"])).to_proto().all_of == membership
    assert F("tag").exists().to_proto().exists == types_pb2.Existence(attribute="tag")


def test_one_string_is_not_taken_for_a_list_of_letters() -> None:
    with pytest.raises(InvalidRequest, match=r"\['net'\]"):
        F("section").in_("net")


def test_chains_of_one_kind_stay_one_level_deep() -> None:
    chain = F("a") == 0
    for n in range(1, 100):
        chain = chain & (F("a") == n)
    message = chain.to_proto()
    assert len(message.conjunction.filters) == 100
    either = ((F("a") == 1) | (F("b") == 2)) | chain
    assert len(either.to_proto().disjunction.filters) == 3


def test_not_wraps_what_it_negates() -> None:
    condition = ~(F("a") == 1)
    assert condition.to_proto().negation.comparison.attribute == "a"


def test_combining_does_not_change_the_parts() -> None:
    left = (F("a") == 1) & (F("b") == 2)
    before = left.to_proto().SerializeToString()
    _ = left & (F("c") == 3)
    assert left.to_proto().SerializeToString() == before


def test_and_or_not_and_chained_comparisons_explain_themselves() -> None:
    with pytest.raises(TypeError, match=r"& \|"):
        _ = (F("a") == 1) and (F("b") == 2)
    with pytest.raises(TypeError, match=r"& \|"):
        _ = not F("a").exists()
    with pytest.raises(TypeError, match="range"):
        _ = 1 < F("a") < 5
    with pytest.raises(TypeError, match=r"\.exists\(\)"):
        if F("a"):
            pass


def test_a_filter_reads_as_a_sentence() -> None:
    condition = (F("section") == "net") & ~F("kb").in_([1, 2]) | F("tag").exists()
    assert repr(condition) == ("<Filter ((section == 'net' and not kb in [1, 2]) or tag exists)>")
