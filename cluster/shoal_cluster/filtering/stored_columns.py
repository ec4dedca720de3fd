"""The three kinds of column in a segment's attribute index, each as written and as read.

A column is a fixed list of sections; columns.py places them in the file and knows their offsets.
Sections are little-endian and start at multiples of 8 bytes, so numpy and memoryview read them in
place. A column object holds views, never rows, and is safe to use from several threads.
"""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt, Internal
from shoal_cluster.domain.limits import MIB
from shoal_cluster.domain.schema import AttributeType, AttributeValue
from shoal_cluster.filtering import bitmaps
from shoal_cluster.filtering.algebra import COMPARED, Between, Bounds, Condition
from shoal_cluster.filtering.expression import (
    AllOf,
    AnyOf,
    Comparison,
    Exists,
    In,
    Operator,
)
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.filtering.ordering import Start, numbers_in_order

Sections = Sequence[memoryview]

CACHE_BYTES_MAX = 4 * MIB
"""Decoded bitmaps kept per segment: 500 bitsets of 65,536 rows, more than filters repeat."""

_BITMAP_OVERHEAD_BYTES = 256
"""What a decoded bitmap takes beside its containers: object, dictionary entry, allocations."""

_CACHED_VALUES_MAX = 64
"""A filter with more values than this is not cached and not counted in advance: it would push
everything else out of the cache, and its estimate would cost as much as its answer."""

_POSITIONS_MAX = 1024
"""Values whose place in the dictionary a column remembers; a search costs 5 µs, a filter two."""


class BitmapCache:
    """Decoded bitmaps of one segment, least recently used out first. Thread-safe."""

    def __init__(self, size_bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._size_bytes_max = size_bytes_max
        self._size_bytes = 0
        self._entries: OrderedDict[tuple[str, int], tuple[BitMap, int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def get(self, key: tuple[str, int], serialised: Callable[[], memoryview]) -> BitMap:
        """Returns the bitmap under `key`, decoding `serialised()` when absent; do not change it."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry[0]
        encoded = serialised()
        bitmap = bitmaps.deserialise(encoded)
        size_bytes = len(encoded) + _BITMAP_OVERHEAD_BYTES
        with self._lock:
            if key not in self._entries and size_bytes <= self._size_bytes_max:
                self._entries[key] = (bitmap, size_bytes)
                self._size_bytes += size_bytes
                while self._size_bytes > self._size_bytes_max:
                    _, (_, evicted_bytes) = self._entries.popitem(last=False)
                    self._size_bytes -= evicted_bytes
        return bitmap


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnShape:
    """What the directory says of a column. present: rows with a value, of the segment's `rows`."""

    name: str
    kind: AttributeType
    present: int
    rows: int


class StoredColumn(Protocol):
    """Answers the conditions that validation lets through for its type."""

    def leaf_rows(self, leaf: Condition) -> BitMap: ...

    def leaf_bounds(self, leaf: Condition) -> Bounds: ...

    def value_counts(self, among: BitMap | None) -> Iterator[tuple[Scalar, int]]:
        """Yields each value that some row among them has, and how many have it.

        among: None for every row. A row counts once for each element of its list.
        """
        ...

    def in_order(
        self, among: BitMap | None, start: Start | None, *, descending: bool, limit: int
    ) -> list[tuple[Scalar, int]]:
        """Returns the first `limit` (value, row) among the rows, rows ascending among equals."""
        ...


Values = Mapping[int, AttributeValue]
"""The present values of one attribute by row number, ascending."""


class KeywordColumn:
    """Keyword or keyword list: a sorted dictionary and one bitmap per value.

    Sections: presence bitmap, u32 rows per value, u64 value ends, values in UTF-8, u64 bitmap
    ends, bitmaps. Values ascend by their bytes, which is also the order of Python strings.
    """

    SECTIONS = 6

    def __init__(self, shape: ColumnShape, sections: Sections, cache: BitmapCache) -> None:
        self._name = shape.name
        self._single = shape.kind is AttributeType.KEYWORD
        self._present = shape.present
        self._presence, counts, value_ends, self._values, bitmap_ends, self._bitmaps = sections
        if not len(counts) * 2 == len(value_ends) == len(bitmap_ends) or len(value_ends) % 8:
            raise Corrupt(f"sections of column {shape.name!r} contradict each other")
        self._counts = counts.cast("I")
        self._value_ends = value_ends.cast("Q")
        self._bitmap_ends = bitmap_ends.cast("Q")
        self._cache = cache
        self._positions: dict[str, int] = {}

    @staticmethod
    def encode(values: Values) -> list[bytes]:
        """Returns the sections."""
        postings: dict[str, list[int]] = {}
        for row, value in values.items():
            for word in value if isinstance(value, list) else (str(value),):
                postings.setdefault(word, []).append(row)
        ordered = sorted((word.encode(), matching) for word, matching in postings.items())
        counts = []
        encoded = []
        for _, matching in ordered:
            bitmap = bitmaps.from_rows(np.array(matching, dtype=np.uint32))
            bitmap.run_optimize()
            counts.append(len(bitmap))
            encoded.append(bitmap.serialize())
        return [
            _encode_presence(values),
            np.array(counts, dtype="<u4").tobytes(),
            _ends([word for word, _ in ordered]),
            b"".join(word for word, _ in ordered),
            _ends(encoded),
            b"".join(encoded),
        ]

    def leaf_rows(self, leaf: Condition) -> BitMap:
        match leaf:
            case Exists():
                return self._cache.get((self._name, -1), lambda: self._presence)
            case Comparison(_, _, str(word)):
                position = self._find(word)
                return BitMap() if position is None else self._bitmap(position)
            case In(_, words) | AnyOf(_, words):
                return self._union(words)
            case AllOf(_, words):
                return self._intersection(words)
            case _:
                raise _unanswerable(self._name, leaf)

    def leaf_bounds(self, leaf: Condition) -> Bounds:
        match leaf:
            case Exists():
                return Bounds(self._present, self._present)
            case Comparison(_, _, str(word)):
                count = self._count(word)
                return Bounds(count, count)
            case In(_, words) | AnyOf(_, words) | AllOf(_, words):
                return self._bounds_of_many(words, every=isinstance(leaf, AllOf))
            case _:
                raise _unanswerable(self._name, leaf)

    @property
    def distinct(self) -> int:
        """Returns how many values the dictionary has."""
        return len(self._counts)

    def value_counts(self, among: BitMap | None) -> Iterator[tuple[Scalar, int]]:
        for position, stored in enumerate(self._counts):
            count = stored
            if among is not None:
                count = among.intersection_cardinality(self._passed_by(position))
            if count:
                yield self._value(position).decode(), count

    def in_order(
        self, among: BitMap | None, start: Start | None, *, descending: bool, limit: int
    ) -> list[tuple[Scalar, int]]:
        positions = range(len(self._counts))
        if start is not None:
            low = self._first_not_below(str(start.value).encode(), 0)
            if not descending:
                positions = range(low, len(self._counts))
            else:
                held = self._find(str(start.value)) is not None
                positions = range(low + 1 if held else low)
        found: list[tuple[Scalar, int]] = []
        for position in reversed(positions) if descending else positions:
            bitmap = self._passed_by(position)
            rows = bitmaps.to_rows(bitmap if among is None else among & bitmap)
            value = self._value(position).decode()
            if start is not None and value == start.value:
                rows = rows[rows >= start.first_row]
            found += ((value, row) for row in rows[: limit - len(found)].tolist())
            if len(found) >= limit:
                break
        return found

    def _passed_by(self, position: int) -> BitMap:
        """Returns a bitmap for a walk over all values, which must not fill the cache with them."""
        if len(self._counts) <= _CACHED_VALUES_MAX:
            return self._bitmap(position)
        return bitmaps.deserialise(self._serialised(position))

    def _bounds_of_many(self, words: Sequence[Scalar], *, every: bool) -> Bounds:
        if len(words) > _CACHED_VALUES_MAX:
            return Bounds(0, self._present)
        counts = [self._count(str(word)) for word in words]
        if every:
            missed = sum(self._present - count for count in counts)
            return Bounds(max(0, self._present - missed), min(counts, default=self._present))
        total = sum(counts)
        if self._single:
            return Bounds(total, total)
        return Bounds(max(counts, default=0), min(total, self._present))

    def _union(self, words: Sequence[Scalar]) -> BitMap:
        found: list[BitMap] = []
        if len(words) <= _CACHED_VALUES_MAX:
            positions = (self._find(str(word)) for word in words)
            found = [self._bitmap(position) for position in positions if position is not None]
        else:
            found = [
                bitmaps.deserialise(self._serialised(position))
                for position in self._positions_of_many({str(word).encode() for word in words})
            ]
        return BitMap().union(*found)

    def _positions_of_many(self, wanted: set[bytes]) -> Iterator[int]:
        """Yields the places of the values that the dictionary has, ascending."""
        size = len(self._counts)
        if len(wanted) * size.bit_length() < size:
            for value in sorted(wanted):
                position = self._first_not_below(value, 0)
                if position < size and self._value(position) == value:
                    yield position
            return
        # One pass over the dictionary reads fewer values than that many binary searches.
        start = 0
        values = bytes(self._values)
        for position, end in enumerate(self._value_ends.tolist()):
            if values[start:end] in wanted:
                yield position
            start = end

    def _intersection(self, words: Sequence[str]) -> BitMap:
        by_count = sorted((self._count(word), word) for word in words)
        matching = self.leaf_rows(Exists(self._name))
        for count, word in by_count:
            position = self._find(word)
            if count == 0 or position is None:
                return BitMap()
            matching = matching & self._bitmap(position)
        return matching

    def _count(self, word: str) -> int:
        position = self._find(word)
        return 0 if position is None else self._counts[position]

    def _find(self, word: str) -> int | None:
        """Returns the place of a value in the dictionary, or None."""
        remembered = self._positions.get(word)
        if remembered is not None:
            return remembered if remembered >= 0 else None
        wanted = word.encode()
        position = self._first_not_below(wanted, 0)
        if position == len(self._counts) or self._value(position) != wanted:
            position = -1
        if len(self._positions) >= _POSITIONS_MAX:
            self._positions.clear()
        self._positions[word] = position
        return position if position >= 0 else None

    def _first_not_below(self, wanted: bytes, low: int) -> int:
        return bisect.bisect_left(range(len(self._counts)), wanted, low, key=self._value)

    def _value(self, position: int) -> bytes:
        start = self._value_ends[position - 1] if position else 0
        return bytes(self._values[start : self._value_ends[position]])

    def _serialised(self, position: int) -> memoryview:
        start = self._bitmap_ends[position - 1] if position else 0
        return self._bitmaps[start : self._bitmap_ends[position]]

    def _bitmap(self, position: int) -> BitMap:
        return self._cache.get((self._name, position), lambda: self._serialised(position))


class NumberColumn:
    """Int, timestamp or float: present values ascending with their rows, and values by row.

    Sections: presence bitmap, i64 or f64 values ascending, u32 row of each value (ascending among
    equal values), values by row (0 where missing; empty when most rows are). Narrow ranges are a
    span of the sorted values, wide ones one pass over the values by row.
    """

    SECTIONS = 4

    def __init__(self, shape: ColumnShape, sections: Sections, cache: BitmapCache) -> None:
        self._name = shape.name
        self._present = shape.present
        self._rows = shape.rows
        self._presence, values, order, by_row = sections
        if (
            len(values) != 8 * shape.present
            or len(order) != 4 * shape.present
            or len(by_row) not in (0, 8 * shape.rows)
        ):
            raise Corrupt(f"sections of column {shape.name!r} contradict each other")
        stored_type = _stored_type(shape.kind)
        self._values: npt.NDArray[Any] = np.frombuffer(values, dtype=stored_type)
        self._order = np.frombuffer(order, dtype="<u4")
        self._by_row: npt.NDArray[Any] | None = None
        if by_row:
            self._by_row = np.frombuffer(by_row, dtype=stored_type)
        self._cache = cache

    @staticmethod
    def encode(values: Values, kind: AttributeType, rows: int) -> list[bytes]:
        """Returns the sections."""
        numbers = np.array(list(values.values()), dtype=_stored_type(kind))
        order = np.argsort(numbers, kind="stable")
        held = np.fromiter(values, dtype="<u4", count=len(values))
        by_row = np.zeros(rows if len(values) >= rows * _BY_ROW_SHARE_MIN else 0, numbers.dtype)
        if len(by_row):
            by_row[held] = numbers
        return [
            _encode_presence(values),
            numbers[order].tobytes(),
            held[order].tobytes(),
            by_row.tobytes(),
        ]

    def leaf_rows(self, leaf: Condition) -> BitMap:
        match leaf:
            case Exists():
                return self._exists()
            case Comparison() | Between():
                start, stop = self._span(leaf)
                if self._by_row is None or stop - start <= _SORTED_ROWS_MAX:
                    return self._rows_in(self._order[start:stop])
                if stop - start == self._present:
                    return self._exists()
                return self._where_present(bitmaps.from_mask(_holds(leaf, self._by_row)))
            case In(_, values):
                spans = self._spans(values)
                if not spans:
                    return BitMap()
                return self._rows_in(np.concatenate([self._order[a:b] for a, b in spans]))
            case _:
                raise _unanswerable(self._name, leaf)

    def leaf_rows_among(self, leaf: Condition, candidates: BitMap) -> BitMap:
        """Returns the candidates that match, comparing only their values when they are few."""
        few = len(candidates) * _CANDIDATE_COST <= self._rows
        if self._by_row is None or not few or not isinstance(leaf, Comparison | Between):
            return candidates & self.leaf_rows(leaf)
        rows = bitmaps.to_rows(candidates)
        kept = rows[_holds(leaf, self._by_row[rows])]
        return self._where_present(bitmaps.from_rows(kept))

    def leaf_bounds(self, leaf: Condition) -> Bounds:
        match leaf:
            case Exists():
                count = self._present
            case Comparison() | Between():
                start, stop = self._span(leaf)
                count = stop - start
            case In(_, values) if len(values) <= _CACHED_VALUES_MAX:
                count = sum(stop - start for start, stop in self._spans(values))
            case In():
                return Bounds(0, self._present)
            case _:
                raise _unanswerable(self._name, leaf)
        return Bounds(count, count)

    def value_counts(self, among: BitMap | None) -> Iterator[tuple[Scalar, int]]:
        values = self._values
        if among is not None:
            values = values[self._mask(among)[self._order]]
        if len(values):
            starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
            counts = np.diff(np.append(starts, len(values)))
            yield from zip(values[starts].tolist(), counts.tolist(), strict=True)

    def in_order(
        self, among: BitMap | None, start: Start | None, *, descending: bool, limit: int
    ) -> list[tuple[Scalar, int]]:
        chosen = None if among is None else self._mask(among)
        return numbers_in_order(
            self._values, self._order, chosen, start, descending=descending, limit=limit
        )

    def _mask(self, rows: BitMap) -> bitmaps.Mask:
        mask = np.zeros(self._rows, dtype=np.bool_)
        mask[bitmaps.to_rows(rows)] = True
        return mask

    def _exists(self) -> BitMap:
        return self._cache.get((self._name, -1), lambda: self._presence)

    def _where_present(self, matching: BitMap) -> BitMap:
        """Removes rows that only match because a missing value is stored as 0."""
        return matching if self._present == self._rows else matching & self._exists()

    def _span(self, leaf: Comparison | Between) -> tuple[int, int]:
        """Returns the span of the sorted values for which the comparisons hold."""
        start, stop = 0, self._present
        for comparison in _comparisons(leaf):
            value = self._values.dtype.type(comparison.value)
            asked = comparison.operator
            if asked in (Operator.EQ, Operator.GE):
                start = max(start, int(self._values.searchsorted(value, "left")))
            elif asked is Operator.GT:
                start = max(start, int(self._values.searchsorted(value, "right")))
            if asked in (Operator.EQ, Operator.LE):
                stop = min(stop, int(self._values.searchsorted(value, "right")))
            elif asked is Operator.LT:
                stop = min(stop, int(self._values.searchsorted(value, "left")))
        return start, max(start, stop)

    def _spans(self, values: Sequence[Scalar]) -> list[tuple[int, int]]:
        wanted = np.unique(np.array(values, dtype=self._values.dtype))
        starts = self._values.searchsorted(wanted, "left")
        stops = self._values.searchsorted(wanted, "right")
        found = starts < stops
        return list(zip(starts[found].tolist(), stops[found].tolist(), strict=True))

    def _rows_in(self, rows: npt.NDArray[np.uint32]) -> BitMap:
        if len(rows) <= _SORTED_ROWS_MAX:
            return bitmaps.from_rows(np.sort(rows))
        mask = np.zeros(self._rows, dtype=np.bool_)
        mask[rows] = True
        return bitmaps.from_mask(mask)


_SORTED_ROWS_MAX = 2048
"""Below this, sorting row numbers (10 µs) beats any pass over all rows."""

_BY_ROW_SHARE_MIN = 0.25
"""A column that fewer rows have is too sparse for 8 bytes a row; its spans are short anyway."""

_CANDIDATE_COST = 16
"""Reading one candidate's value costs about as much as comparing 16 in sequence."""


def _holds(leaf: Comparison | Between, values: npt.NDArray[Any]) -> bitmaps.Mask:
    """Returns where every comparison holds."""
    first, *others = (
        COMPARED[comparison.operator](values, values.dtype.type(comparison.value))
        for comparison in _comparisons(leaf)
    )
    for held in others:
        first &= held
    return first


def _comparisons(leaf: Comparison | Between) -> tuple[Comparison, ...]:
    return leaf.comparisons if isinstance(leaf, Between) else (leaf,)


class BoolColumn:
    """Bool: one bitmap of the rows with false and one of those with true.

    Sections: the two bitmaps.
    """

    SECTIONS = 2

    def __init__(self, shape: ColumnShape, sections: Sections, cache: BitmapCache) -> None:
        self._name = shape.name
        self._sections = sections
        self._cache = cache

    @staticmethod
    def encode(values: Values) -> list[bytes]:
        """Returns the sections."""
        return [
            _encode_presence({row: value for row, value in values.items() if value is wanted})
            for wanted in (False, True)
        ]

    def leaf_rows(self, leaf: Condition) -> BitMap:
        match leaf:
            case Exists():
                return self._bitmap(False) | self._bitmap(True)
            case Comparison(_, Operator.EQ, bool(wanted)):
                return self._bitmap(wanted)
            case In(_, values):
                return BitMap().union(*(self._bitmap(bool(value)) for value in values))
            case _:
                raise _unanswerable(self._name, leaf)

    def leaf_bounds(self, leaf: Condition) -> Bounds:
        # Two bitmaps, cached after the first use: counting is as cheap as any bound.
        count = len(self.leaf_rows(leaf))
        return Bounds(count, count)

    def value_counts(self, among: BitMap | None) -> Iterator[tuple[Scalar, int]]:
        for value in (False, True):
            bitmap = self._bitmap(value)
            count = len(bitmap) if among is None else among.intersection_cardinality(bitmap)
            if count:
                yield value, count

    def in_order(
        self, among: BitMap | None, start: Start | None, *, descending: bool, limit: int
    ) -> list[tuple[Scalar, int]]:
        found: list[tuple[Scalar, int]] = []
        values: Sequence[bool] = (True, False) if descending else (False, True)
        if start is not None:
            values = values[values.index(bool(start.value)) :]
        for value in values:
            bitmap = self._bitmap(value)
            rows = bitmaps.to_rows(bitmap if among is None else among & bitmap)
            if start is not None and value is start.value:
                rows = rows[rows >= start.first_row]
            found += ((value, row) for row in rows[: limit - len(found)].tolist())
        return found

    def _bitmap(self, wanted: bool) -> BitMap:
        return self._cache.get((self._name, int(wanted)), lambda: self._sections[int(wanted)])


def _encode_presence(values: Values) -> bytes:
    bitmap = bitmaps.from_rows(np.fromiter(values, dtype=np.uint32, count=len(values)))
    bitmap.run_optimize()
    return bitmap.serialize()


def _ends(parts: Sequence[bytes]) -> bytes:
    return np.cumsum([len(part) for part in parts], dtype="<u8").tobytes()


def _stored_type(kind: AttributeType) -> str:
    return "<f8" if kind is AttributeType.FLOAT else "<i8"


def _unanswerable(name: str, leaf: Condition) -> Internal:
    """Returns the error for a condition that validation must have refused."""
    return Internal(
        f"column {name!r} cannot answer {type(leaf).__name__}; was the filter validated?"
    )
