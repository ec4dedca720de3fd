"""The `meta` file: what a segment knows about itself, small enough to read before anything else."""

from dataclasses import dataclass

from shoal_cluster.bucket import envelope
from shoal_cluster.bucket.envelope import EnvelopeKind
from shoal_cluster.domain.errors import Conflict, Corrupt
from shoal_cluster.domain.schema import Metric, VectorStorage
from shoal_cluster.filtering import statistics
from shoal_cluster.filtering.statistics import SegmentStatistics
from shoal_cluster.index.calibration import RecallCurve
from shoal_cluster.index.families import Family
from shoal_cluster.segment.format import FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentMeta:
    """Facts fixed when the segment was built.

    sum: set checksum of all rows, dead ones included. family_reason: why the index family was
    chosen. schema_version: the collection schema the attributes were indexed with.
    """

    rows: int
    min_seq: int
    max_seq: int
    sum: int
    metric: Metric
    dimension: int
    storage: VectorStorage
    family: Family
    family_reason: str
    recall_curve: RecallCurve
    statistics: SegmentStatistics
    schema_version: int


def encode_meta(meta: SegmentMeta) -> bytes:
    """Returns the bytes of the file: an envelope of kind SEGMENT_META without payload."""
    return envelope.encode(
        EnvelopeKind.SEGMENT_META,
        {
            "format": FORMAT_VERSION,
            "rows": meta.rows,
            "min_seq": meta.min_seq,
            "max_seq": meta.max_seq,
            "sum": meta.sum,
            "metric": meta.metric.value,
            "dimension": meta.dimension,
            "storage": meta.storage.value,
            "family": meta.family.value,
            "family_reason": meta.family_reason,
            "recall_curve": meta.recall_curve.to_wire(),
            "statistics": statistics.to_wire(meta.statistics),
            "schema_version": meta.schema_version,
        },
    )


def decode_meta(body: bytes | memoryview, *, key: str) -> SegmentMeta:
    """Reverses `encode_meta`. key: where the body was found.

    Raises: Corrupt when the bytes are damaged; Conflict when a newer Shoal wrote them.
    """
    header = envelope.decode(body, EnvelopeKind.SEGMENT_META, key=key).header
    version = header.get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise Conflict(
            f"segment {key} has format {version}, this server reads up to {FORMAT_VERSION}; "
            "upgrade the server"
        )
    try:
        return SegmentMeta(
            rows=header["rows"],
            min_seq=header["min_seq"],
            max_seq=header["max_seq"],
            sum=header["sum"],
            metric=Metric(header["metric"]),
            dimension=header["dimension"],
            storage=VectorStorage(header["storage"]),
            family=Family(header["family"]),
            family_reason=header["family_reason"],
            recall_curve=RecallCurve.from_wire(header["recall_curve"]),
            statistics=statistics.from_wire(header["statistics"]),
            schema_version=header["schema_version"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise Corrupt(f"segment meta {key} lacks or contradicts itself in {error}") from error
