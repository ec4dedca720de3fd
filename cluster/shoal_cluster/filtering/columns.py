"""The attribute index of one segment: immutable, read in place from a mapped file.

`build_columns` writes it once, when a segment is built. `Columns` answers filters from it: keyword
values by binary search in a sorted dictionary and one roaring bitmap per value, numbers by binary
search in sorted values, booleans and presence by bitmaps. Opening reads only the directory; no
Python object per row or per value is ever made. README.md has the layout byte by byte.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence

import msgpack
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt, Internal
from shoal_cluster.domain.limits import ATTRIBUTES_MAX
from shoal_cluster.domain.schema import AttributeType, AttributeValue
from shoal_cluster.filtering import algebra, bitmaps
from shoal_cluster.filtering.algebra import Bounds, Condition
from shoal_cluster.filtering.expression import Exists, Expression
from shoal_cluster.filtering.literals import NUMBER_TYPES, Scalar, show_names
from shoal_cluster.filtering.ordering import Start
from shoal_cluster.filtering.stored_columns import (
    BitmapCache,
    BoolColumn,
    ColumnShape,
    KeywordColumn,
    NumberColumn,
    StoredColumn,
)

MAGIC = b"SHOALATR"
FORMAT_VERSION = 1
ALIGNMENT = 8

_HEADER = struct.Struct("<8sIIQQQ")
"""Magic, format version, CRC-32 of all fields behind it and the directory, rows, directory offset,
directory size."""
_CHECKED_FROM = 16

_COLUMN_CLASSES: Mapping[AttributeType, type[KeywordColumn | NumberColumn | BoolColumn]] = {
    AttributeType.KEYWORD: KeywordColumn,
    AttributeType.KEYWORD_LIST: KeywordColumn,
    AttributeType.BOOL: BoolColumn,
    **{kind: NumberColumn for kind in NUMBER_TYPES},
}


def build_columns(
    rows: Sequence[Mapping[str, AttributeValue]], attributes: Mapping[str, AttributeType]
) -> bytes:
    """Returns the attribute index of the rows; row numbers are positions in `rows`.

    attributes: every attribute that any row has, each row validated against it.
    Raises: Internal when a row has an attribute that is not declared, rather than losing it.
    """
    undeclared = set().union(*rows) - attributes.keys()
    if undeclared:
        raise Internal(
            f"rows have attributes that the schema does not declare: "
            f"{show_names(sorted(undeclared))}"
        )
    body = bytearray(_HEADER.size)
    directory = []
    for name, kind in attributes.items():
        values = {row: held[name] for row, held in enumerate(rows) if name in held}
        spans = []
        for section in _encode_column(values, kind, len(rows)):
            body.extend(bytes(-len(body) % ALIGNMENT))
            spans.append([len(body), len(section)])
            body.extend(section)
        directory.append([name, kind.value, len(values), spans])
    body.extend(bytes(-len(body) % ALIGNMENT))
    packed: bytes = msgpack.packb(directory)
    _HEADER.pack_into(body, 0, MAGIC, FORMAT_VERSION, 0, len(rows), len(body), len(packed))
    checksum = zlib.crc32(packed, zlib.crc32(body[_CHECKED_FROM : _HEADER.size]))
    _HEADER.pack_into(body, 0, MAGIC, FORMAT_VERSION, checksum, len(rows), len(body), len(packed))
    return bytes(body + packed)


def _encode_column(
    values: Mapping[int, AttributeValue], kind: AttributeType, rows: int
) -> list[bytes]:
    if kind in NUMBER_TYPES:
        return NumberColumn.encode(values, kind, rows)
    if kind is AttributeType.BOOL:
        return BoolColumn.encode(values)
    return KeywordColumn.encode(values)


class Columns:
    """Answers filters over the rows of one segment. Immutable; safe to use from several threads.

    Holds views of the buffer for as long as it lives: a mapped file stays mapped until then.
    """

    def __init__(self, rows: int, columns: Mapping[str, StoredColumn], cache: BitmapCache) -> None:
        self._rows = rows
        self._columns = columns
        self._cache = cache

    @staticmethod
    def open(buffer: memoryview) -> "Columns":
        """Reads the directory of an attribute index; everything else is read when first asked for.

        buffer: the whole file, starting at a multiple of 8 bytes (mapped files do).
        Raises: Corrupt when header or directory are damaged, or the format is newer than this
        software. Damage inside sections is for the segment's checksum to find, before opening.
        """
        if len(buffer) < _HEADER.size:
            raise Corrupt(f"attribute index of {len(buffer)} bytes is shorter than its header")
        magic, version, checksum, rows, offset, size = _HEADER.unpack_from(buffer)
        if magic != MAGIC:
            raise Corrupt(f"not an attribute index: it starts with {magic!r}")
        if not 1 <= version <= FORMAT_VERSION:
            raise Corrupt(
                f"attribute index has format {version}, this software reads up to "
                f"{FORMAT_VERSION}; upgrade it"
            )
        directory = buffer[offset : offset + size]
        if zlib.crc32(directory, zlib.crc32(buffer[_CHECKED_FROM : _HEADER.size])) != checksum:
            raise Corrupt("header or directory of the attribute index fail their checksum")
        cache = BitmapCache()
        columns: dict[str, StoredColumn] = {}
        for entry in _read_directory(directory):
            match entry:
                case [str(name), str(kind_text), int(present), [*spans]] if present <= rows:
                    shape = ColumnShape(
                        name=name, kind=_read_kind(kind_text), present=present, rows=rows
                    )
                    sections = [_section(buffer, span) for span in spans]
                    column_class = _COLUMN_CLASSES[shape.kind]
                    if len(sections) != column_class.SECTIONS:
                        raise Corrupt(f"column {name!r} has {len(sections)} sections")
                    columns[name] = column_class(shape, sections, cache)
                case _:
                    raise Corrupt("directory of the attribute index does not decode")
        return Columns(rows, columns, cache)

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def cached_bytes(self) -> int:
        """Returns the memory that decoded bitmaps take, at most CACHE_BYTES_MAX."""
        return self._cache.size_bytes

    def evaluate(self, expression: Expression) -> BitMap:
        """Returns the rows that match, as a bitmap that the caller owns.

        expression: validated. An attribute that the index does not have was declared after it was
        built, and so is missing in every row.
        """
        return algebra.evaluate(expression, self)

    def estimate(self, expression: Expression) -> Bounds:
        """Returns (low, high), which the number of matching rows lies between, ends included.

        Exact for one condition on numbers, bools and keywords. A few µs a condition.
        """
        return algebra.estimate(expression, self)

    def value_counts(self, attribute: str, among: BitMap | None) -> Iterator[tuple[Scalar, int]]:
        """Yields each value that some row among them has, and how many; see StoredColumn."""
        column = self._columns.get(attribute)
        return iter(()) if column is None else column.value_counts(among)

    def in_order(
        self,
        attribute: str,
        among: BitMap | None,
        start: Start | None,
        *,
        descending: bool,
        limit: int,
    ) -> list[tuple[Scalar, int]]:
        """Returns the first `limit` (value, row) among the rows that have a value, from `start` on.

        Ordered by value, then by row ascending in both directions. Not for keyword lists.
        """
        column = self._columns.get(attribute)
        if column is None:
            return []
        return column.in_order(among, start, descending=descending, limit=limit)

    def missing(self, attribute: str, among: BitMap | None) -> BitMap:
        """Returns the rows among them that have no value, as a bitmap that the caller owns."""
        rows = bitmaps.all_rows(self._rows) if among is None else among
        return rows - self.leaf_rows(Exists(attribute))

    def distinct_words(self, attribute: str) -> int:
        """Returns how many values a walk over a keyword attribute passes; 0 for other types."""
        column = self._columns.get(attribute)
        return column.distinct if isinstance(column, KeywordColumn) else 0

    def leaf_rows(self, leaf: Condition) -> BitMap:
        column = self._columns.get(leaf.attribute)
        return BitMap() if column is None else column.leaf_rows(leaf)

    def leaf_rows_among(self, leaf: Condition, candidates: BitMap) -> BitMap:
        column = self._columns.get(leaf.attribute)
        if isinstance(column, NumberColumn):
            return column.leaf_rows_among(leaf, candidates)
        return candidates & self.leaf_rows(leaf)

    def leaf_bounds(self, leaf: Condition) -> Bounds:
        column = self._columns.get(leaf.attribute)
        return Bounds(0, 0) if column is None else column.leaf_bounds(leaf)


def _read_directory(encoded: memoryview) -> list[object]:
    try:
        directory = msgpack.unpackb(encoded)
    except (ValueError, msgpack.UnpackException) as error:
        raise Corrupt(f"directory of the attribute index does not decode: {error}") from error
    if not isinstance(directory, list) or len(directory) > ATTRIBUTES_MAX:
        raise Corrupt("directory of the attribute index is not a list of columns")
    return directory


def _read_kind(text: str) -> AttributeType:
    try:
        return AttributeType(text)
    except ValueError as error:
        raise Corrupt(f"attribute index has a column of unknown type {text!r}") from error


def _section(buffer: memoryview, span: object) -> memoryview:
    match span:
        case [int(offset), int(size)] if (
            offset % ALIGNMENT == 0 and size >= 0 and _HEADER.size <= offset
        ) and offset + size <= len(buffer):
            return buffer[offset : offset + size]
        case _:
            raise Corrupt(f"attribute index of {len(buffer)} bytes has a section at {span!r}")
