"""Which rows of a segment a read is about: those that live and match its filter."""

from dataclasses import dataclass
from typing import Any

from pyroaring import BitMap

from shoal_cluster.filtering import bitmaps
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.statistics import rule_out
from shoal_cluster.index.row_bits import flags_of_bits
from shoal_cluster.shard.state import SegmentView


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """rows: None stands for every row of the segment. ruled_out: why no row was looked at."""

    count: int
    rows: BitMap | None
    ruled_out: str | None = None


def rows_passing(view: SegmentView, expression: Expression | None) -> Passing:
    """Returns the rows that live and match; a filter that statistics rule out is not evaluated."""
    reader = view.reader
    if not view.live:
        return Passing(count=0, rows=BitMap(), ruled_out="every row is dead")
    rows: BitMap | None = None
    if expression is not None:
        reason = rule_out(expression, reader.statistics, reader.rows)
        if reason is not None:
            return Passing(count=0, rows=BitMap(), ruled_out=reason)
        rows = reader.evaluate(expression)
    if view.alive is not None:
        alive = bitmaps.from_mask(flags_of_bits(view.alive, reader.rows))
        rows = alive if rows is None else rows & alive
    return Passing(count=reader.rows if rows is None else len(rows), rows=rows)


def explain_passing(view: SegmentView, passing: Passing, plan: str, reason: str) -> dict[str, Any]:
    """Returns what `explain` says of a segment that was read exactly; as in search.py."""
    entry: dict[str, Any] = {
        "segment": view.entry.id,
        "rows": view.reader.rows,
        "live": view.live,
        "pruned": passing.ruled_out is not None,
        "reason": passing.ruled_out or reason,
    }
    if passing.ruled_out is None:
        entry |= {
            "plan": plan,
            "expected_recall": 1.0,
            "rows_passing": passing.count,
            "rows_scanned": passing.count,
        }
    return entry
