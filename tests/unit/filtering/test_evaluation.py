"""The column indexes agree with the row-wise meaning of filters (invariants F-1 and F-5)."""

import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt, Internal
from shoal_cluster.domain.schema import AttributeType, AttributeValue
from shoal_cluster.filtering import stored_columns
from shoal_cluster.filtering.columns import Columns, build_columns
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
from shoal_cluster.filtering.memory_columns import MemoryColumns
from shoal_cluster.filtering.stored_columns import BitmapCache
from shoal_cluster.filtering.validation import validate
from tests.unit.filtering.strategies import KEYWORDS, Case, Row, cases, every_leaf, every_row

EQ, NE, LT, GE = Operator.EQ, Operator.NE, Operator.LT, Operator.GE


def opened(rows: list[Row], attributes: dict[str, AttributeType]) -> Columns:
    return Columns.open(memoryview(build_columns(rows, attributes)))


def appended(rows: list[Row], attributes: dict[str, AttributeType]) -> MemoryColumns:
    columns = MemoryColumns(attributes)
    for row in rows:
        columns.append(row)
    return columns


def expected(rows: list[Row], expression: Expression) -> list[int]:
    return [number for number, row in enumerate(rows) if matches(expression, row)]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_both_indexes_agree_with_the_row_wise_meaning(case: Case) -> None:
    expression = validate(case.expression, case.attributes)
    wanted = expected(case.rows, expression)
    stored = opened(case.rows, case.stored)
    memory = appended(case.rows, case.stored)
    for source in (stored, memory):
        assert list(source.evaluate(expression)) == wanted
        low, high = source.estimate(expression)
        assert 0 <= low <= len(wanted) <= high <= len(case.rows)
    # Again, from the cache, which the first answers' owners must not be able to change.
    stored.evaluate(expression).clear()
    assert list(stored.evaluate(expression)) == wanted


@pytest.mark.parametrize("kind", list(AttributeType))
@pytest.mark.parametrize("sparse", [False, True])
def test_every_condition_holds_at_every_border(kind: AttributeType, sparse: bool) -> None:
    """sparse: under a quarter of the rows have a value, which number columns store differently."""
    attributes = {"a": kind}
    rows = every_row("a", kind) + [{}] * (100 if sparse else 0)
    stored, memory = opened(rows, attributes), appended(rows, attributes)
    for leaf in every_leaf("a", kind):
        wanted = expected(rows, validate(leaf, attributes))
        assert list(stored.evaluate(leaf)) == wanted
        assert list(memory.evaluate(leaf)) == wanted
        among = And((Exists("a"), Not(leaf)))
        assert list(stored.evaluate(among)) == expected(rows, among)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_de_morgan_holds_with_missing_values(case: Case) -> None:
    inner = validate(case.expression, case.attributes)
    some = Exists(next(iter(case.attributes)))
    pairs: list[tuple[Expression, Expression]] = [
        (Not(And((inner, some))), Or((Not(inner), Not(some)))),
        (Not(Or((inner, some))), And((Not(inner), Not(some)))),
        (Not(Not(inner)), inner),
    ]
    stored = opened(case.rows, case.stored)
    memory = appended(case.rows, case.stored)
    for left, right in pairs:
        assert stored.evaluate(left) == stored.evaluate(right)
        assert memory.evaluate(left) == memory.evaluate(right)
        assert expected(case.rows, left) == expected(case.rows, right)


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        (Comparison("n", EQ, 0), []),
        (Comparison("n", NE, 0), [0, 1]),
        (Comparison("n", LT, 5), [0]),
        (Not(Comparison("n", LT, 5)), [1]),
        (In("n", (-3, 0)), [0]),
        (Not(In("n", (-3, 0))), [1]),
        (Exists("n"), [0]),
        (Comparison("word", EQ, ""), []),
        (Comparison("word", NE, ""), [0, 1]),
        (Comparison("flag", EQ, False), []),
        (Comparison("flag", NE, False), [0, 1]),
        (AnyOf("tags", ("a",)), []),
        (AllOf("tags", ("a",)), []),
        (Not(AnyOf("tags", ("a",))), [0, 1]),
        (Exists("tags"), [0]),
    ],
)
def test_missing_values_have_one_meaning(expression: Expression, wanted: list[int]) -> None:
    """Row 0 has a number below zero and an empty list; row 1 has nothing at all."""
    attributes = {
        "n": AttributeType.INT,
        "word": AttributeType.KEYWORD,
        "flag": AttributeType.BOOL,
        "tags": AttributeType.KEYWORD_LIST,
    }
    rows: list[Row] = [{"n": -3, "tags": []}, {}]
    assert expected(rows, expression) == wanted
    assert list(opened(rows, attributes).evaluate(expression)) == wanted
    assert list(appended(rows, attributes).evaluate(expression)) == wanted


def test_filter_against_brute_force_at_every_selectivity() -> None:
    """20,000 random rows, from 0.01 % to 100 %: two rows, then ranges, values and mixtures."""
    count = 20_000
    generator = np.random.default_rng(20_260_101)
    size = generator.integers(0, 1_000_000, count)
    score = generator.normal(size=count)
    section = generator.choice(50, count, p=np.arange(1, 51) / np.arange(1, 51).sum())
    present = generator.random(count) < 0.9
    attributes = {
        "size": AttributeType.INT,
        "score": AttributeType.FLOAT,
        "section": AttributeType.KEYWORD,
        "tags": AttributeType.KEYWORD_LIST,
        "free": AttributeType.BOOL,
        "rare": AttributeType.TIMESTAMP,
    }
    rows: list[Row] = []
    for number in range(count):
        row: dict[str, AttributeValue] = {
            "size": int(size[number]),
            "section": f"s{section[number]}",
            "tags": [f"t{tag}" for tag in range(6) if (int(size[number]) >> tag) & 1],
            "free": bool(size[number] % 3),
        }
        if present[number]:
            row["score"] = float(score[number])
        if number % 7 == 0:
            row["rare"] = number % 100
        rows.append(row)
    stored, memory = opened(rows, attributes), appended(rows, attributes)
    cuts = np.sort(size)
    filters: list[Expression] = [
        Comparison("size", LT, int(cuts[int(count * share)]))
        for share in (0.0001, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.9999)
    ]
    filters += [Comparison("size", GE, 0), Comparison("size", LT, 0)]
    filters += [Comparison("section", EQ, f"s{number}") for number in (0, 10, 49, 99)]
    filters += [
        In("section", ("s1", "s2", "s48")),
        In("size", tuple(size[:300].tolist())),
        AnyOf("tags", ("t0", "t1")),
        AllOf("tags", ("t0", "t1", "t2", "t3", "t4", "t5")),
        Not(Exists("score")),
        And((Comparison("section", EQ, "s0"), Comparison("score", LT, 0.25))),
        And((Comparison("section", EQ, "s0"), Not(Comparison("score", LT, 0.25)))),
        And((Comparison("size", GE, 400_000), Comparison("size", LT, 400_900))),
        And((Comparison("size", GE, 600_000), Comparison("size", LT, 500_000))),
        And((Comparison("rare", GE, 0), Comparison("rare", LT, 90))),
        Comparison("rare", LT, 90),
        Comparison("free", NE, True),
        And(
            (Comparison("score", GE, 0.5), Comparison("section", NE, "s49"), AnyOf("tags", ("t2",)))
        ),
        Or((Comparison("score", LT, -3.5), And((Comparison("size", LT, 50_000), Exists("score"))))),
    ]
    shares = set()
    for expression in filters:
        wanted = expected(rows, validate(expression, attributes))
        assert list(stored.evaluate(expression)) == wanted
        assert list(memory.evaluate(expression)) == wanted
        for source in (stored, memory):
            low, high = source.estimate(expression)
            assert low <= len(wanted) <= high
        shares.add(len(wanted) / count)
    assert 0 < sorted(shares)[1] <= 0.0001
    assert max(shares) == 1.0


def test_rows_beyond_one_roaring_container_are_found() -> None:
    """200,000 rows span four containers: runs, bitsets and arrays in one bitmap."""
    count = 200_000
    attributes = {"n": AttributeType.INT, "word": AttributeType.KEYWORD}
    rows: list[Row] = [
        {"n": (number * 7919) % count, "word": "low" if number < 70_000 else "high"}
        for number in range(count)
    ]
    stored = opened(rows, attributes)
    narrow = And((Comparison("n", LT, 9000), Comparison("word", EQ, "high")))
    n = (np.arange(count) * 7919) % count
    assert (
        list(stored.evaluate(narrow))
        == np.flatnonzero((n < 9000) & (np.arange(count) >= 70_000)).tolist()
    )
    between = And((Comparison("n", GE, 60_000), Comparison("n", LT, 60_500)))
    assert len(stored.evaluate(between)) == 500
    assert stored.estimate(between) == (500, 500)
    wide = Comparison("n", GE, 60_000)
    assert list(stored.evaluate(wide)) == np.flatnonzero(n >= 60_000).tolist()


def test_many_values_in_one_in_are_found_without_the_cache() -> None:
    attributes = {"word": AttributeType.KEYWORD}
    rows: list[Row] = [{"word": f"w{number % 5000}"} for number in range(10_000)]
    stored = opened(rows, attributes)
    chosen = validate(In("word", tuple(f"w{n}" for n in range(0, 9000, 3))), attributes)
    assert list(stored.evaluate(chosen)) == expected(rows, chosen)
    assert stored.cached_bytes == 0
    assert stored.estimate(chosen) == (0, 10_000)


def test_bitmap_cache_stays_within_its_bound() -> None:
    encoded = memoryview(BitMap(range(0, 60_000, 2)).serialize())
    cache = BitmapCache(size_bytes_max=3 * len(encoded))
    for number in range(10):
        assert len(cache.get(("column", number), lambda: encoded)) == 30_000
        assert cache.size_bytes <= 3 * len(encoded)
    assert cache.size_bytes > len(encoded)

    def unexpected() -> memoryview:
        raise AssertionError("the latest entry was decoded again")

    cache.get(("column", 9), unexpected)


def test_remembered_dictionary_places_stay_bounded() -> None:
    attributes = {"word": AttributeType.KEYWORD}
    stored = opened([{"word": word} for word in KEYWORDS], attributes)
    column = stored._columns["word"]
    assert isinstance(column, stored_columns.KeywordColumn)
    for number in range(3 * stored_columns._POSITIONS_MAX):
        assert not stored.evaluate(Comparison("word", EQ, f"absent {number}"))
    assert len(column._positions) <= stored_columns._POSITIONS_MAX
    assert list(stored.evaluate(Comparison("word", EQ, "ab"))) == [2]


def test_rows_with_undeclared_attributes_are_refused_not_dropped() -> None:
    with pytest.raises(Internal, match="size"):
        build_columns([{"size": 3}], {})
    memory = MemoryColumns({})
    with pytest.raises(Internal, match="size"):
        memory.append({"size": 3})
    memory.append({})
    memory.declare({"size": AttributeType.INT})
    memory.append({"size": 3})
    assert list(memory.evaluate(Exists("size"))) == [1]
    assert list(memory.evaluate(Comparison("size", NE, 3))) == [0]


def test_memtable_snapshot_ignores_rows_appended_later() -> None:
    memory = MemoryColumns({"tags": AttributeType.KEYWORD_LIST, "n": AttributeType.INT})
    for number in range(1000):
        memory.append({"tags": ["even"] if number % 2 == 0 else [], "n": number})
    assert list(memory.evaluate(AnyOf("tags", ("even",)), rows=5)) == [0, 2, 4]
    assert list(memory.evaluate(Not(AnyOf("tags", ("even",))), rows=5)) == [1, 3]
    assert list(memory.evaluate(Comparison("n", GE, 3), rows=5)) == [3, 4]


def test_memtable_answers_while_another_thread_appends() -> None:
    """Each answer is the exact one for some number of rows that were appended by then."""
    attributes = {
        "n": AttributeType.INT,
        "word": AttributeType.KEYWORD,
        "tags": AttributeType.KEYWORD_LIST,
    }
    memory = MemoryColumns(attributes)

    def fill() -> None:
        for number in range(8192):
            memory.append({"n": number, "word": f"w{number % 2}", "tags": [f"t{number % 2}", "x"]})

    writer = threading.Thread(target=fill)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    asked = Or((Comparison("word", EQ, "w1"), AllOf("tags", ("t0", "x"))))
    writer.start()
    checks = 0
    while writer.is_alive() or checks == 0:
        before = memory.rows
        found = memory.evaluate(asked)
        assert before <= len(found) <= memory.rows
        assert len(found) == 0 or found.max() == len(found) - 1
        even = memory.evaluate(Not(Comparison("word", EQ, "w1")), rows=before)
        assert list(even) == list(range(0, before, 2))
        checks += 1
    writer.join()
    sys.setswitchinterval(interval_s)
    assert len(memory.evaluate(asked)) == 8192


def test_damage_to_header_or_directory_is_found_when_opening() -> None:
    attributes = {"word": AttributeType.KEYWORD, "n": AttributeType.INT, "flag": AttributeType.BOOL}
    rows: list[Row] = [{"word": f"w{number}", "n": number, "flag": True} for number in range(9)]
    encoded = build_columns(rows, attributes)
    directory_at = int.from_bytes(encoded[24:32], "little")
    for position in (*range(40), *range(directory_at, len(encoded))):
        damaged = bytearray(encoded)
        damaged[position] ^= 0x41
        with pytest.raises(Corrupt):
            Columns.open(memoryview(bytes(damaged)))
    for size_bytes in range(len(encoded)):
        with pytest.raises(Corrupt):
            Columns.open(memoryview(encoded[:size_bytes]))


def test_index_of_a_later_format_says_so() -> None:
    encoded = bytearray(build_columns([], {}))
    encoded[8] = 2
    with pytest.raises(Corrupt, match=r"format 2.*upgrade"):
        Columns.open(memoryview(bytes(encoded)))
