"""Vectors on their way to and from the wire: little-endian float32, contiguous."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shoal.errors import InvalidRequest

Vector = npt.NDArray[np.float32]
"""float32 of shape (dimension,)."""

Vectors = npt.NDArray[np.float32]
"""float32 of shape (n, dimension)."""

VectorLike = npt.NDArray[np.generic] | Sequence[float]
"""One vector: an array of shape (dimension,) or a list of numbers."""

VectorsLike = npt.NDArray[np.generic] | Sequence[VectorLike]
"""Several vectors: an array of shape (n, dimension) or a list of vectors of equal length."""

WIRE_DTYPE = np.dtype("<f4")


def to_vector(value: VectorLike, *, field: str) -> Vector:
    """Returns one vector as the wire wants it.

    Raises: InvalidRequest for anything that is not a non-empty one-dimensional array of numbers.
    """
    return _to_array(value, axes=1, field=field)


def to_vectors(value: VectorsLike, *, field: str) -> Vectors:
    """Returns several vectors as the wire wants them; at least one, all of one length.

    Raises: InvalidRequest for anything that is not a non-empty two-dimensional array of numbers.
    """
    return _to_array(value, axes=2, field=field)


def from_wire(vectors: bytes, dimension: int, count: int) -> Vectors:
    """Returns `count` received vectors as a read-only (count, dimension) array, without a copy."""
    return np.frombuffer(vectors, dtype=WIRE_DTYPE).reshape(count, dimension)


def _to_array(value: object, *, axes: int, field: str) -> npt.NDArray[np.float32]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidRequest(
            f"{field} is not an array of numbers, or its vectors differ in length: {error}",
            field=field,
        ) from error
    # Floats and integers of any width; not bool, complex, text or objects.
    if array.dtype.kind not in "fiu":
        raise InvalidRequest(
            f"{field} holds {array.dtype}, it must hold numbers (and vectors of equal length)",
            field=field,
        )
    if array.ndim != axes or array.size == 0:
        wanted = "(dimension,)" if axes == 1 else "(n, dimension)"
        raise InvalidRequest(
            f"{field} has shape {array.shape}, it must be {wanted} and not empty", field=field
        )
    if array.dtype == WIRE_DTYPE:
        return np.ascontiguousarray(array)
    # A float64 too large for float32 becomes inf, which the server refuses by name.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=WIRE_DTYPE)
