"""Checks vectors that came from outside and brings them into the form the index wants.

Writes and queries share these rules, so that whatever is stored can also be asked for. One pass
computes the squared lengths, which tell finite, zero and too long at once; only a block that fails
is looked at row by row.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import EmbeddingModel, Metric, VectorStorage

Norms = npt.NDArray[np.float64]

LENGTH_MAX = 1e18
"""For dot and l2: twice this, squared, still fits a float32 key (3.4e38). Cosine has no bound."""

_SQUARED_MAX = np.float32(LENGTH_MAX * LENGTH_MAX)

_SQUARED_SAFE_MIN, _SQUARED_SAFE_MAX = 1e-24, 1e36
"""Between these a float32 sum of squares keeps its precision; outside, float64 decides."""

_UNIT_TOLERANCE = 2e-6
"""Vectors this close to squared length 1 stay as they are, so that they are given back bit for bit.

A float32 vector that its model normalised is off by some 1e-7 times the square root of its length.
"""

_ONE = np.ones(1)
_ONE.flags.writeable = False


def prepare_vectors(
    vectors: Vectors, metric: Metric, *, field: Callable[[int], str]
) -> tuple[Vectors, Norms]:
    """Returns the vectors as stored, and the lengths the caller's vectors had.

    vectors: (n, dimension) float32, n ≥ 1, not changed. Under cosine the result has unit length;
    otherwise it is the argument itself, and all norms are 1. field: names row i in an error.

    Raises: InvalidRequest naming the first bad row: not finite, zero under cosine, or so long that
    keys would overflow (nothing was applied).
    """
    if len(vectors) == 1 and metric is Metric.COSINE:
        # A query on its own: the way below takes ten times as long for one row. A product that
        # overflows tells nobody, so that numpy need not be told to keep quiet.
        square = float(np.vdot(vectors, vectors))
        if _SQUARED_SAFE_MIN < square < _SQUARED_SAFE_MAX:
            if abs(square - 1) < _UNIT_TOLERANCE:
                return vectors, _ONE
            norm = math.sqrt(square)
            return vectors / np.float32(norm), np.array([norm])
    # An infinite or enormous value overflows here on purpose; the comparisons below see it.
    with np.errstate(over="ignore", invalid="ignore"):
        squared = np.einsum("ij,ij->i", vectors, vectors)
    if metric is not Metric.COSINE:
        if not (squared <= _SQUARED_MAX).all():
            _require_finite(vectors, field)
            row = int(np.argmin(squared <= _SQUARED_MAX))
            raise InvalidRequest(
                f"the vector is longer than {metric.value} can compare in float32; scale it down",
                field=field(row),
                limit=f"length {LENGTH_MAX:g}",
            )
        return vectors, np.ones(len(vectors))
    if not ((squared > _SQUARED_SAFE_MIN) & (squared < _SQUARED_SAFE_MAX)).all():
        return _normalise_in_double(vectors, field)
    norms = np.sqrt(squared)
    norms[np.abs(squared - 1) < _UNIT_TOLERANCE] = 1
    return vectors / norms[:, np.newaxis], norms.astype(np.float64)


def as_stored(vectors: Vectors, storage: VectorStorage, *, field: Callable[[int], str]) -> Vectors:
    """Returns the vectors as every copy of them will read: float32, rounded if stored narrower.

    vectors: as `prepare_vectors` returns them. Rounding here, before anything is acknowledged,
    makes log, memtable and segment agree on every value, and so on every key. field: as there.

    Raises: InvalidRequest when a value is too large to be stored (nothing was applied).
    """
    if storage is VectorStorage.FLOAT32:
        return vectors
    with np.errstate(over="ignore"):
        rounded = vectors.astype(np.float16)
    finite = np.isfinite(rounded)
    if not finite.all():
        row = int(np.argmin(finite.all(axis=1)))
        column = int(np.argmin(finite[row]))
        raise InvalidRequest(
            f"the vector holds {vectors[row, column]:g} at position {column}, which float16 cannot",
            field=field(row),
            limit=f"values up to {np.finfo(np.float16).max:g}",
        )
    return rounded.astype(np.float32)


def require_dimension(vectors: Vectors, dimension: int, collection: str, *, field: str) -> None:
    """Raises: InvalidRequest when the vectors have another length than the collection's."""
    if vectors.shape[1] != dimension:
        raise InvalidRequest(
            f"the vector has {vectors.shape[1]} values, collection {collection!r} has dimension "
            f"{dimension}",
            field=field,
            limit=f"dimension {dimension}",
        )


def require_model(
    named: EmbeddingModel | None, recorded: EmbeddingModel | None, collection: str
) -> None:
    """Raises: InvalidRequest when the request names another model than the collection records.

    A request that names none passes, and so does any against a collection that records none.
    """
    if named is not None and recorded is not None and named != recorded:
        raise InvalidRequest(
            f"the vectors are of model {named.name!r} version {named.version!r}, collection "
            f"{collection!r} holds {recorded.name!r} version {recorded.version!r}; vectors of "
            "different models cannot be compared",
            field="model",
        )


def _normalise_in_double(vectors: Vectors, field: Callable[[int], str]) -> tuple[Vectors, Norms]:
    """Normalises vectors with very small or very large values; rare, so clarity over speed."""
    _require_finite(vectors, field)
    wide = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    if not norms.all():
        raise InvalidRequest(
            "the vector is zero, which has no direction; cosine cannot compare it",
            field=field(int(np.argmin(norms))),
            limit="length above 0",
        )
    return np.ascontiguousarray((wide / norms[:, np.newaxis]).astype(np.float32)), norms


def _require_finite(vectors: Vectors, field: Callable[[int], str]) -> None:
    finite = np.isfinite(vectors)
    if finite.all():
        return
    row = int(np.argmin(finite.all(axis=1)))
    column = int(np.argmin(finite[row]))
    raise InvalidRequest(
        f"the vector holds {vectors[row, column]} at position {column}",
        field=field(row),
        limit="finite numbers",
    )
