"""What a bulk load is read from, chunk by chunk: arrays, or a file of .npy, .jsonl or .parquet.

The cut into chunks is a function of the source alone, so that an interrupted load finds the chunks
it has staged. A file is never in memory as a whole.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.batches import Batch, Payload, checked_ids, payload_to_json, split
from shoal.errors import InvalidRequest
from shoal.vectors import VectorsLike, to_vectors

CHUNK_ROWS_MAX = 8192
CHUNK_BYTES = 8 * 1024 * 1024
"""Vectors of a chunk; rows with large payloads make it shorter."""

CHUNK_BYTES_MAX = 24 * 1024 * 1024
"""Of everything in a chunk: below the 32 MiB of a request."""

ID_COLUMN, VECTOR_COLUMN, PAYLOAD_COLUMN = "id", "vector", "payload"

LoadSource = VectorsLike | str | os.PathLike[str]
"""Vectors, also mapped ones, or a file: .npy, .jsonl, .parquet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """rows_total: None when only reading to the end would tell."""

    batches: Iterator[Batch]
    rows_total: int | None


def chunks_of(
    source: LoadSource,
    *,
    ids: Sequence[str] | None,
    attributes: Sequence[Mapping[str, Any] | None] | None,
    payloads: Sequence[Payload] | None,
) -> Chunks:
    """Returns a source's rows in order, cut into chunks.

    ids: row numbers when absent. ids, attributes and payloads go with vectors and .npy files; rows
    of other files bring their own.

    Raises: InvalidRequest for what cannot be read; while reading too.
    """
    if not isinstance(source, str | os.PathLike):
        return _of_arrays(source, ids, attributes, payloads)
    path = Path(source)
    kind = path.suffix.lower()
    if kind == ".npy":
        return _of_arrays(_mapped(path), ids, attributes, payloads)
    if any(given is not None for given in (ids, attributes, payloads)):
        raise InvalidRequest(f"rows of {path.name} bring their own ids and attributes", field="ids")
    if kind == ".jsonl":
        return Chunks(batches=_of_json_lines(path), rows_total=None)
    if kind == ".parquet":
        return _of_parquet(path)
    raise InvalidRequest(
        f"{path.name} is of no kind that can be loaded",
        field="source",
        limit=".npy .jsonl .parquet",
    )


def _mapped(path: Path) -> npt.NDArray[np.generic]:
    try:
        array: npt.NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{path} cannot be read as an array: {error}", field="source"
        ) from error
    return array


def _of_arrays(
    vectors: VectorsLike,
    ids: Sequence[str] | None,
    attributes: Sequence[Mapping[str, Any] | None] | None,
    payloads: Sequence[Payload] | None,
) -> Chunks:
    array = vectors if isinstance(vectors, np.ndarray) else to_vectors(vectors, field="vectors")
    if array.ndim != 2 or array.size == 0:
        raise InvalidRequest(
            f"vectors has shape {array.shape}, it must be (n, dimension) and not empty",
            field="vectors",
        )
    for name, column in (("ids", ids), ("attributes", attributes), ("payloads", payloads)):
        if column is not None and len(column) != len(array):
            raise InvalidRequest(f"{name} has {len(column)} rows for {len(array)}", field=name)

    def batches() -> Iterator[Batch]:
        rows = rows_a_chunk(array.shape[1])
        for start in range(0, len(array), rows):
            stop = min(start + rows, len(array))
            named = (
                list(map(str, range(start, stop))) if ids is None else checked_ids(ids[start:stop])
            )
            batch = Batch(
                ids=named,
                vectors=to_vectors(array[start:stop], field="vectors"),
                attributes=None if attributes is None else attributes[start:stop],
                payloads=None if payloads is None else _json(payloads[start:stop], start),
            )
            yield from _small_enough(batch)

    return Chunks(batches=batches(), rows_total=len(array))


def _of_json_lines(path: Path) -> Iterator[Batch]:
    try:
        with path.open("rb") as lines:
            numbered = enumerate(lines, start=1)
            first = next(numbered, None)
            if first is None:
                raise InvalidRequest(f"{path.name} holds no rows", field="source")
            dimension = len(_row_of(*first, path)[VECTOR_COLUMN])
            rest = itertools.chain((first,), numbered)
            while chunk := list(itertools.islice(rest, rows_a_chunk(dimension))):
                rows = [_row_of(number, line, path) for number, line in chunk]
                yield from _small_enough(_batch_of_rows(rows, chunk[0][0]))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", field="source") from error


def _row_of(number: int, line: bytes, path: Path) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row[ID_COLUMN], str) or not isinstance(row[VECTOR_COLUMN], list):
            raise TypeError("id is no text, or vector no list")
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"line {number} of {path.name} is no row: {error!r}",
            field="source",
            limit='{"id": text, "vector": [numbers], "attributes": {…}, "payload": {…}}',
        ) from error
    found: Mapping[str, Any] = row
    return found


def _batch_of_rows(rows: Sequence[Mapping[str, Any]], first: int) -> Batch:
    payloads = [row.get(PAYLOAD_COLUMN) for row in rows]
    return Batch(
        ids=[row[ID_COLUMN] for row in rows],
        vectors=to_vectors([row[VECTOR_COLUMN] for row in rows], field=VECTOR_COLUMN),
        attributes=[row.get("attributes") for row in rows],
        payloads=_json(payloads, first) if any(payloads) else None,
    )


def _of_parquet(path: Path) -> Chunks:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InvalidRequest(
            "reading .parquet needs pyarrow: pip install 'shoal[parquet]'", field="source"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", field="source") from error
    if file.metadata.num_rows == 0:
        raise InvalidRequest(f"{path.name} holds no rows", field="source")

    def batches() -> Iterator[Batch]:
        # Record batches of this size, but shorter at the end of each row group: the file's own.
        tables = file.iter_batches(batch_size=CHUNK_ROWS_MAX)
        while True:
            try:
                table = next(tables, None)
            except (OSError, ValueError) as error:
                raise InvalidRequest(f"{path} cannot be read: {error}", field="source") from error
            if table is None:
                return
            yield from batches_of_table(table)

    return Chunks(batches=batches(), rows_total=file.metadata.num_rows)


def batches_of_table(table: Any) -> Iterator[Batch]:
    """Yields the rows of an Arrow table or batch: id, vector, perhaps payload, attributes."""
    names = list(table.schema.names)
    if ID_COLUMN not in names or VECTOR_COLUMN not in names:
        raise InvalidRequest(
            f"the columns are {names}", field="source", limit="columns id and vector, at least"
        )
    count = table.num_rows
    if count == 0:
        return
    vectors = _vectors_of(table.column(VECTOR_COLUMN))
    named = [name for name in names if name not in (ID_COLUMN, VECTOR_COLUMN, PAYLOAD_COLUMN)]
    attributes = None
    if named:
        columns = [table.column(name).to_pylist() for name in named]
        attributes = [
            {name: value for name, value in zip(named, row, strict=True) if value is not None}
            for row in zip(*columns, strict=True)
        ]
    payloads = None
    if PAYLOAD_COLUMN in names:
        payloads = _payloads_of(table.column(PAYLOAD_COLUMN))
    batch = Batch(
        ids=_ids_of(table.column(ID_COLUMN)),
        vectors=to_vectors(vectors, field=VECTOR_COLUMN),
        attributes=attributes,
        payloads=payloads,
    )
    rows = rows_a_chunk(vectors.shape[1])
    for start in range(0, count, rows):
        yield from _small_enough(batch.part(start, min(start + rows, count)))


def _vectors_of(column: Any) -> npt.NDArray[np.generic]:
    """Returns the rows of a column of lists, or of tensors with one axis, as an array (n, d)."""
    import pyarrow
    from pyarrow import compute, types

    if isinstance(column, pyarrow.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage  # of a tensor, be it Arrow's or Ray's: a list
    kind = column.type
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists) or not (
        types.is_floating(kind.value_type) or types.is_integer(kind.value_type)
    ):
        raise _no_column(VECTOR_COLUMN, f"{kind}", "lists of numbers")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise _no_column(VECTOR_COLUMN, "in part null", "lists of numbers")
    lengths = np.asarray(compute.list_value_length(column))
    others = np.flatnonzero(lengths != lengths[0])
    if others.size:
        found = f"of {lengths[0]} values in one row and of {lengths[others[0]]} in another"
        raise _no_column(VECTOR_COLUMN, found, "lists of one length")
    array: npt.NDArray[np.generic] = np.asarray(values).reshape(len(column), -1)
    return array


def _ids_of(column: Any) -> list[str]:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not _is_text(kind) and not types.is_integer(kind):
        raise _no_column(ID_COLUMN, f"{column.type}", "texts or whole numbers")
    if column.null_count:
        raise _no_column(ID_COLUMN, "in part null", "texts or whole numbers")
    return list(map(str, column.to_pylist()))


def _payloads_of(column: Any) -> list[bytes]:
    from pyarrow import types

    kind = column.type
    if not (
        _is_text(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_null(kind)
    ):
        raise _no_column(PAYLOAD_COLUMN, f"{kind}", "JSON as text or bytes")
    texts = column.to_pylist()
    return [text.encode() if isinstance(text, str) else text or b"" for text in texts]


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _no_column(name: str, found: str, limit: str) -> InvalidRequest:
    return InvalidRequest(f"the column {name} is {found}", field="source", limit=limit)


def rows_a_chunk(dimension: int) -> int:
    """Returns how many rows of so many values a chunk has."""
    return max(1, min(CHUNK_ROWS_MAX, CHUNK_BYTES // (4 * max(dimension, 1))))


def _small_enough(batch: Batch) -> Iterable[Batch]:
    if batch.payloads is None and batch.attributes is None:
        return (batch,)
    return split(batch, batch_size=CHUNK_ROWS_MAX, bytes_max=CHUNK_BYTES_MAX)


def _json(payloads: Sequence[Payload], first: int) -> list[bytes]:
    return [
        payload_to_json(payload, field=f"payloads[{number}]")
        for number, payload in enumerate(payloads, start=first)
    ]
