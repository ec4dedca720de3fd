"""What a collection is: its vectors, attributes, routing and versions. Pure values.

Changing `dimension`, `metric`, `storage`, `partition_by` or `shards` of a living collection is not
possible; `alter` may add attributes and change replicas, recall target, the share of searches that
are sampled, tier and descriptive versions.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import CollectionId

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,%d}" % (limits.NAME_LENGTH_MAX - 1))
_ATTRIBUTE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,%d}" % (limits.NAME_LENGTH_MAX - 1))


class Metric(enum.Enum):
    COSINE = "cosine"
    DOT = "dot"
    L2 = "l2"


class VectorStorage(enum.Enum):
    """How a value of a stored vector is kept. Keys are computed in float32 either way."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    """Values are rounded once, before they are acknowledged: every copy holds the same."""

    @property
    def value_bytes(self) -> int:
        return 4 if self is VectorStorage.FLOAT32 else 2


class MemoryTier(enum.Enum):
    """What of a segment is in memory (docs/design/index-families.md)."""

    FULL = "full"
    """Codes and vectors."""
    COMPACT = "compact"
    """Codes; the vectors' file is mapped and the page cache keeps what fits."""
    DISK = "disk"
    """Codes; rows to rescore are asked of the disk together, and nothing around them is read."""


class AttributeType(enum.Enum):
    KEYWORD = "keyword"
    KEYWORD_LIST = "keyword_list"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    TIMESTAMP = "timestamp"
    """Milliseconds since 1970-01-01 UTC, a signed 64-bit integer."""


RECALL_SAMPLE_SHARE_DEFAULT = 0.01

AttributeValue = str | list[str] | int | float | bool
"""Value of one attribute; the Python type follows the declared AttributeType."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingModel:
    """The model whose vectors a collection holds; vectors of another model are refused."""

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionSchema:
    """Everything about a collection that its shards need to know.

    attributes: declared attributes in declaration order. partition_by: a keyword attribute whose
    value chooses the shard, or None to choose by point id. version counts alterations from 1.
    recall_sample_share: of the searches, at most so many are repeated exactly to see their recall.
    """

    id: CollectionId
    name: str
    dimension: int
    metric: Metric
    attributes: Mapping[str, AttributeType] = field(default_factory=dict)
    partition_by: str | None = None
    shards: int = 1
    replicas: int = 1
    recall_target: float = 0.95
    model: EmbeddingModel | None = None
    chunking_rule: str = ""
    version: int = 1
    storage: VectorStorage = VectorStorage.FLOAT32
    tier: MemoryTier = MemoryTier.COMPACT
    recall_sample_share: float = RECALL_SAMPLE_SHARE_DEFAULT

    def to_wire(self) -> dict[str, Any]:
        """Returns a msgpack-able map; `from_wire` reverses it exactly.

        The default of recall_sample_share is left out: format version 1 began without it.
        """
        fields = {
            "id": self.id,
            "name": self.name,
            "dimension": self.dimension,
            "metric": self.metric.value,
            "attributes": [[name, kind.value] for name, kind in self.attributes.items()],
            "partition_by": self.partition_by,
            "shards": self.shards,
            "replicas": self.replicas,
            "recall_target": self.recall_target,
            "model": None if self.model is None else [self.model.name, self.model.version],
            "chunking_rule": self.chunking_rule,
            "version": self.version,
            "storage": self.storage.value,
            "tier": self.tier.value,
        }
        if self.recall_sample_share != RECALL_SAMPLE_SHARE_DEFAULT:
            fields["recall_sample_share"] = self.recall_sample_share
        return fields

    @staticmethod
    def from_wire(fields: Mapping[str, Any]) -> "CollectionSchema":
        model = fields["model"]
        return CollectionSchema(
            id=CollectionId(fields["id"]),
            name=fields["name"],
            dimension=fields["dimension"],
            metric=Metric(fields["metric"]),
            attributes={name: AttributeType(kind) for name, kind in fields["attributes"]},
            partition_by=fields["partition_by"],
            shards=fields["shards"],
            replicas=fields["replicas"],
            recall_target=fields["recall_target"],
            model=None if model is None else EmbeddingModel(name=model[0], version=model[1]),
            chunking_rule=fields["chunking_rule"],
            version=fields["version"],
            storage=VectorStorage(fields["storage"]),
            tier=MemoryTier(fields["tier"]),
            recall_sample_share=fields.get("recall_sample_share", RECALL_SAMPLE_SHARE_DEFAULT),
        )


def validate_schema(schema: CollectionSchema) -> None:
    """Checks a schema that came from outside.

    Raises: InvalidRequest naming the field and the limit (nothing was applied).
    """
    if not _NAME.fullmatch(schema.name):
        raise InvalidRequest(
            f"collection name {schema.name[:80]!r} may hold only letters, digits, '_' and '-', "
            "and must start with a letter or digit",
            field="name",
            limit=f"1 to {limits.NAME_LENGTH_MAX} characters of [A-Za-z0-9_-]",
        )
    _require_range("dimension", schema.dimension, limits.DIMENSION_MIN, limits.DIMENSION_MAX)
    _require_range("shards", schema.shards, 1, limits.SHARDS_MAX)
    _require_range("replicas", schema.replicas, 1, limits.REPLICAS_MAX)
    if not limits.RECALL_TARGET_MIN <= schema.recall_target <= limits.RECALL_TARGET_MAX:
        raise InvalidRequest(
            f"recall_target {schema.recall_target} is out of range",
            field="recall_target",
            limit=f"{limits.RECALL_TARGET_MIN} to {limits.RECALL_TARGET_MAX}",
        )
    if not 0 <= schema.recall_sample_share <= limits.RECALL_SAMPLE_SHARE_MAX:
        raise InvalidRequest(
            f"recall_sample_share {schema.recall_sample_share} is out of range",
            field="recall_sample_share",
            limit=f"0 to {limits.RECALL_SAMPLE_SHARE_MAX}",
        )
    if len(schema.attributes) > limits.ATTRIBUTES_MAX:
        raise InvalidRequest(
            f"{len(schema.attributes)} attributes declared",
            field="attributes",
            limit=f"{limits.ATTRIBUTES_MAX} attributes",
        )
    for name in schema.attributes:
        if not _ATTRIBUTE_NAME.fullmatch(name):
            raise InvalidRequest(
                f"attribute name {name[:80]!r} must start with a letter or '_' and may hold only "
                "letters, digits and '_'",
                field="attributes",
                limit=f"1 to {limits.NAME_LENGTH_MAX} characters of [A-Za-z0-9_]",
            )
    if schema.partition_by is not None:
        kind = schema.attributes.get(schema.partition_by)
        if kind is not AttributeType.KEYWORD:
            declared = "not declared" if kind is None else f"of type {kind.value}"
            raise InvalidRequest(
                f"partition_by names {schema.partition_by!r}, which is {declared}; "
                "it must be a declared keyword attribute",
                field="partition_by",
            )


def _require_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(
            f"{name} {value} is out of range", field=name, limit=f"{low} to {high}"
        )
