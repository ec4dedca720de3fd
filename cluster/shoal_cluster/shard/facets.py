"""Counts the living, matching rows of a snapshot by the value of an attribute. Thread-safe.

Exact: segments by bitmaps and columns, memtables row by row.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pyroaring import BitMap

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import FACET_VALUE_BYTES_MAX, FACET_VALUES_MAX, MIB
from shoal_cluster.domain.point import decode_tail
from shoal_cluster.domain.schema import AttributeValue
from shoal_cluster.filtering import bitmaps
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.passing import explain_passing, rows_passing
from shoal_cluster.shard.rows import memtable_matches
from shoal_cluster.shard.state import Snapshot

TAIL_COST = 4
"""Opening a row's payload block (28 µs) costs about as much as passing so many dictionary values,
each of which has a bitmap to decode (6 to 15 µs among 50,000)."""

VALUE_BYTES = 9
"""What a number or bool takes on the wire, at most."""


@dataclass(slots=True, kw_only=True)
class ValueCounts:
    """counts: rows by value; a row counts once for each keyword of its list. rows: that match.

    missing: of those, the rows without a value.
    """

    counts: dict[Scalar, int] = field(default_factory=dict)
    rows: int = 0
    missing: int = 0
    size_bytes: int = 0
    explain: dict[str, Any] = field(default_factory=dict)

    def add(self, counted: Iterable[tuple[Scalar, int]], attribute: str) -> None:
        """Adds counts of other rows.

        Raises: InvalidRequest when there are more distinct values than travel in one reply.
        """
        counts = self.counts
        for value, count in counted:
            known = counts.get(value)
            if known is None:
                self.size_bytes += len(value.encode()) if isinstance(value, str) else VALUE_BYTES
                if len(counts) >= FACET_VALUES_MAX or self.size_bytes > FACET_VALUE_BYTES_MAX:
                    raise too_many_values(attribute)
            counts[value] = count + (known or 0)


def too_many_values(attribute: str) -> InvalidRequest:
    return InvalidRequest(
        f"{attribute!r} has too many distinct values under this filter to count them exactly; "
        "narrow the filter",
        field="attribute",
        limit=f"{FACET_VALUES_MAX} distinct values of {FACET_VALUE_BYTES_MAX // MIB} MiB",
    )


def count_values(
    snapshot: Snapshot, attribute: str, expression: Expression | None, *, explain: bool = False
) -> ValueCounts:
    """Returns the counts of one shard. Raises: InvalidRequest as `ValueCounts.add`."""
    total = ValueCounts()
    explained: list[dict[str, Any]] = []
    for view in snapshot.segments:
        passing = rows_passing(view, expression)
        if explain:
            explained.append(explain_passing(view, passing, "bitmaps", "counted by bitmaps"))
        if not passing.count:
            continue
        columns = view.reader.columns
        total.rows += passing.count
        total.missing += len(columns.missing(attribute, passing.rows))
        few = passing.count * TAIL_COST < columns.distinct_words(attribute)
        if few and passing.rows is not None:
            total.add(_counted_by_tails(view.reader, passing.rows, attribute), attribute)
        else:
            total.add(columns.value_counts(attribute, passing.rows), attribute)
    memtable_rows = 0
    for memtable in snapshot.memtables:
        rows = memtable_matches(memtable, expression)
        values = memtable.memtable.columns.values_of(attribute, rows)
        memtable_rows += len(rows)
        total.missing += sum(value is None for value in values)
        total.add(_counted(values), attribute)
    total.rows += memtable_rows
    if explain:
        total.explain = {
            "segments": explained,
            "memtable_rows": memtable_rows,
            "live_rows": snapshot.live,
        }
    return total


def _counted_by_tails(
    reader: SegmentReader, rows: BitMap, attribute: str
) -> Iterable[tuple[Scalar, int]]:
    tails = reader.tails(bitmaps.to_rows(rows).astype(np.int64))
    return _counted(decode_tail(tail)[1].get(attribute) for tail in tails)


def _counted(values: Iterable[AttributeValue | None]) -> Iterable[tuple[Scalar, int]]:
    counter: Counter[Scalar] = Counter()
    for value in values:
        if isinstance(value, list):
            counter.update(value)
        elif value is not None:
            counter[value] += 1
    return counter.items()
