"""Checks one segment of a manifest, offline: files, tombstones, sums, and rows against indexes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.point import SUM_MODULUS, decode_tail, row_hash
from shoal_cluster.domain.schema import AttributeType, AttributeValue, CollectionSchema
from shoal_cluster.filtering.bitmaps import to_rows
from shoal_cluster.filtering.expression import (
    AnyOf,
    Comparison,
    Exists,
    Expression,
    Operator,
    describe,
    matches,
)
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.filtering.statistics import rule_out
from shoal_cluster.index.row_bits import rows_of_bits
from shoal_cluster.manifest.manifest import FileEntry, SegmentEntry
from shoal_cluster.segment import format as layout
from shoal_cluster.segment.deletes import alive_bits
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.segment_files import SegmentFiles
from shoal_cluster.shard.state import SegmentView, open_view

VALUES_CHECKED_MAX = 16
"""Values of an attribute that are compared row by row; each costs a pass over all payloads."""

_ROWS_AT_ONCE = 1024
"""Rows whose tails are decoded together: about 1 MiB of Python objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that does not hold. key: the object that has it. invariant: its id in a README."""

    key: str
    invariant: str
    message: str


async def open_for_check(
    files: SegmentFiles, entry: SegmentEntry, schema: CollectionSchema
) -> SegmentView | Problem:
    """Opens a segment whose files were found sound; a Problem when it cannot be opened."""
    try:
        reader = await files.open_reader(entry, schema)
    except Corrupt as error:
        return Problem(key=_file(entry, layout.META).key, invariant="S-3", message=error.message)
    try:
        dead = await files.tombstones(entry)
    except Corrupt as error:
        assert entry.tombstones is not None
        return Problem(key=entry.tombstones.key, invariant="M-2", message=error.message)
    return open_view(entry, reader, dead)


def check_segment(view: SegmentView, *, deep: bool) -> Iterator[Problem]:
    """Yields what contradicts the manifest entry or, when `deep`, the rows themselves."""
    entry, reader = view.entry, view.reader
    meta_key = _file(entry, layout.META).key
    base = entry.seq_base
    found = (reader.meta.rows, reader.meta.min_seq + base, reader.meta.max_seq + base)
    if found != (entry.rows, entry.min_seq, entry.max_seq):
        listed = (entry.rows, entry.min_seq, entry.max_seq)
        yield Problem(
            key=meta_key,
            invariant="M-4",
            message=f"meta says (rows, min_seq, max_seq) {found}, the manifest {listed}",
        )
    ids_key = _file(entry, layout.IDS).key
    seqs, hashes = reader.seqs, reader.row_hashes
    if (int(seqs.min()), int(seqs.max())) != (entry.min_seq, entry.max_seq):
        yield Problem(
            key=ids_key,
            invariant="M-4",
            message=f"rows have seq {seqs.min()}..{seqs.max()}, the manifest lists "
            f"{entry.min_seq}..{entry.max_seq}",
        )
    as_stored = int(reader.rebased(0).row_hashes.sum(dtype=np.uint64))
    total = int(hashes.sum(dtype=np.uint64))
    buried = int(hashes[to_rows(view.sealed_dead)].sum(dtype=np.uint64))
    if as_stored != reader.meta.sum or (total - buried) % SUM_MODULUS != entry.sum:
        yield Problem(
            key=ids_key,
            invariant="M-1",
            message=f"hashes sum to {as_stored:016x}, of the living rows to "
            f"{(total - buried) % SUM_MODULUS:016x}; meta says {reader.meta.sum:016x}, the "
            f"manifest {entry.sum:016x}",
        )
    if deep:
        yield from _check_rows(entry, reader)


def live_ids(view: SegmentView) -> list[bytes]:
    """Returns the ids of the rows that are not buried."""
    rows = rows_of_bits(alive_bits(view.reader.rows, view.sealed_dead), view.reader.rows)
    return view.reader.ids_of(rows)


def _check_rows(entry: SegmentEntry, reader: SegmentReader) -> Iterator[Problem]:
    """Recomputes from every row what the files say of it."""
    ids_key = _file(entry, layout.IDS).key
    attributes: list[dict[str, AttributeValue]] = []
    previous = b""
    wrong_hashes, out_of_order = BitMap(), BitMap()
    lost = BitMap()
    for start in range(0, reader.rows, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, reader.rows))
        try:
            tails = reader.tails(rows)
            attributes += [decode_tail(tail)[1] for tail in tails]
        except (Corrupt, ValueError, TypeError, IndexError) as error:
            yield Problem(
                key=_file(entry, layout.PAYLOAD).key,
                invariant="S-5",
                message=f"rows {start} and after do not decode: {error}",
            )
            return
        ids, seqs, hashes = reader.ids_of(rows), reader.seqs_of(rows), reader.hashes_of(rows)
        lost |= BitMap(rows[reader.lookup(ids) != rows].tolist())
        for row, point_id, tail in zip(rows.tolist(), ids, tails, strict=True):
            vector = reader.vector(row).tobytes()
            at = row - start
            if row_hash(point_id, int(seqs[at]), vector, tail) != hashes[at]:
                wrong_hashes.add(row)
            if row and point_id <= previous:
                out_of_order.add(row)
            previous = point_id
    for rows_found, invariant, message in (
        (wrong_hashes, "S-4", "rows whose id, seq, vector and payload do not give their hash"),
        (out_of_order, "S-2", "rows that are not in the order of ids"),
        (lost, "S-2", "rows that their ids do not lead to"),
    ):
        if rows_found:
            yield Problem(
                key=ids_key,
                invariant=invariant,
                message=f"{len(rows_found)} {message}, the first is {rows_found.min()}",
            )
    yield from _check_attributes(entry, reader, attributes)


def _check_attributes(
    entry: SegmentEntry, reader: SegmentReader, attributes: Sequence[Mapping[str, AttributeValue]]
) -> Iterator[Problem]:
    """Asks the attribute index for values that the payloads have, and compares."""
    key = _file(entry, layout.ATTRIBUTES).key
    for name, known in reader.statistics.items():
        if reader.evaluate(Exists(name)) != _rows_with(attributes, lambda row: name in row):  # noqa: B023
            yield Problem(
                key=key, invariant="F-1", message=f"the index of {name} has other rows than it"
            )
            continue
        for value in _distinct(attributes, name):
            if known.kind is AttributeType.KEYWORD_LIST:
                asked: Expression = AnyOf(name, (str(value),))
            else:
                asked = Comparison(name, Operator.EQ, value)
            if reader.evaluate(asked) != _rows_with(attributes, lambda row: matches(asked, row)):  # noqa: B023
                yield Problem(
                    key=key,
                    invariant="F-1",
                    message=f"the index and the payloads disagree about {describe(asked)}",
                )
            if rule_out(asked, reader.statistics, reader.rows) is not None:
                yield Problem(
                    key=_file(entry, layout.META).key,
                    invariant="F-3",
                    message=f"the statistics rule {describe(asked)} out, but rows match",
                )


def _rows_with(
    attributes: Sequence[Mapping[str, AttributeValue]],
    test: Callable[[Mapping[str, AttributeValue]], bool],
) -> BitMap:
    return BitMap([row for row, held in enumerate(attributes) if test(held)])


def _distinct(attributes: Sequence[Mapping[str, AttributeValue]], name: str) -> list[Scalar]:
    """Returns values of an attribute, spread over the rows, at most VALUES_CHECKED_MAX."""
    step = max(1, len(attributes) // VALUES_CHECKED_MAX)
    values: dict[tuple[type, Scalar], Scalar] = {}
    for held in attributes[::step]:
        value = held.get(name, [])
        for one in value if isinstance(value, list) else [value]:
            values[type(one), one] = one
    return list(values.values())[:VALUES_CHECKED_MAX]


def _file(entry: SegmentEntry, name: str) -> FileEntry:
    return next((file for file in entry.files if file.name == name), entry.files[0])
