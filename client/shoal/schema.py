"""What a collection is, as the SDK's user sees it, and its way to and from the wire."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from shoal.errors import Internal, InvalidRequest
from shoal_protos.v1 import collections_pb2, types_pb2

T = TypeVar("T")

MetricName = Literal["cosine", "dot", "l2"]
StorageName = Literal["float32", "float16"]
TierName = Literal["full", "compact", "disk"]
AttributeTypeName = Literal["keyword", "keyword_list", "int", "float", "bool", "timestamp"]

Model = tuple[str, str]
"""Name and version of an embedding model."""

METRICS: Mapping[str, types_pb2.Metric.ValueType] = {
    "cosine": types_pb2.METRIC_COSINE,
    "dot": types_pb2.METRIC_DOT,
    "l2": types_pb2.METRIC_L2,
}
ATTRIBUTE_TYPES: Mapping[str, types_pb2.AttributeType.ValueType] = {
    "keyword": types_pb2.ATTRIBUTE_TYPE_KEYWORD,
    "keyword_list": types_pb2.ATTRIBUTE_TYPE_KEYWORD_LIST,
    "int": types_pb2.ATTRIBUTE_TYPE_INT,
    "float": types_pb2.ATTRIBUTE_TYPE_FLOAT,
    "bool": types_pb2.ATTRIBUTE_TYPE_BOOL,
    "timestamp": types_pb2.ATTRIBUTE_TYPE_TIMESTAMP,
}
STORAGES: Mapping[str, types_pb2.VectorStorage.ValueType] = {
    "float32": types_pb2.VECTOR_STORAGE_FLOAT32,
    "float16": types_pb2.VECTOR_STORAGE_FLOAT16,
}
TIERS: Mapping[str, types_pb2.MemoryTier.ValueType] = {
    "full": types_pb2.MEMORY_TIER_FULL,
    "compact": types_pb2.MEMORY_TIER_COMPACT,
    "disk": types_pb2.MEMORY_TIER_DISK,
}
_STORAGE_NAMES: dict[int, StorageName] = {
    types_pb2.VECTOR_STORAGE_UNSPECIFIED: "float32",
    **{STORAGES[name]: name for name in get_args(StorageName)},
}
_TIER_NAMES: dict[int, TierName] = {
    types_pb2.MEMORY_TIER_UNSPECIFIED: "compact",
    **{TIERS[name]: name for name in get_args(TierName)},
}
_METRIC_NAMES: dict[int, MetricName] = {METRICS[name]: name for name in get_args(MetricName)}
_TYPE_NAMES: dict[int, AttributeTypeName] = {
    ATTRIBUTE_TYPES[name]: name for name in get_args(AttributeTypeName)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionSchema:
    """Everything a collection is.

    attributes: declared attributes in declaration order. partition_by: the keyword attribute whose
    value chooses a point's shard, None when the id does. id is never used for another collection;
    version counts alterations from 1. storage: how a value is kept; float16 halves what vectors
    take and rounds them when they are written. tier: what is in memory, the vectors too (full),
    codes alone with vectors in the page cache (compact), or codes alone with vectors on disk.
    recall_sample_share: of the searches, at most so many are repeated exactly in the background to
    see which recall users get; 0 is off.
    """

    name: str
    dimension: int
    metric: MetricName
    attributes: Mapping[str, AttributeTypeName] = field(default_factory=dict)
    partition_by: str | None = None
    shards: int = 1
    replicas: int = 1
    recall_target: float = 0.95
    model: Model | None = None
    chunking_rule: str = ""
    id: str = ""
    version: int = 0
    storage: StorageName = "float32"
    tier: TierName = "compact"
    recall_sample_share: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallEstimate:
    """The recall that searches reached which were repeated exactly, of those at the own target.

    filter_class: "none" without a filter, "wide" where a tenth of the rows or more passed it, else
    "narrow". The true mean lies between low and high in at least 95 of 100 cases.
    """

    filter_class: str
    samples: int
    recall: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionDescription:
    """A schema, and the live rows its shards last reported (`count` gives the exact number).

    recall: one estimate for each class of searches that was sampled, see recall_sample_share.
    """

    schema: CollectionSchema
    rows_live: int
    recall: tuple[RecallEstimate, ...] = ()


def model_to_proto(model: Model | None) -> types_pb2.EmbeddingModel | None:
    """Raises: InvalidRequest unless `model` is a pair of strings or None."""
    if model is None:
        return None
    match model:
        case (str() as name, str() as version):
            return types_pb2.EmbeddingModel(name=name, version=version)
    raise InvalidRequest(f"model {model!r} must be a pair (name, version) of str", field="model")


def declarations(
    attributes: Mapping[str, AttributeTypeName],
) -> list[collections_pb2.AttributeDeclaration]:
    """Raises: InvalidRequest listing the types there are."""
    declared = []
    for name, kind in attributes.items():
        if kind not in ATTRIBUTE_TYPES:
            raise InvalidRequest(
                f"attribute {name!r} is declared as {kind!r}, which is not a type",
                field=f"attributes.{name}",
                limit=f"one of {', '.join(ATTRIBUTE_TYPES)}",
            )
        declared.append(collections_pb2.AttributeDeclaration(name=name, type=ATTRIBUTE_TYPES[kind]))
    return declared


def schema_to_proto(schema: CollectionSchema) -> collections_pb2.CollectionSchema:
    """Raises: InvalidRequest for an unknown metric, storage, tier or attribute type."""
    return collections_pb2.CollectionSchema(
        name=schema.name,
        dimension=schema.dimension,
        metric=_known(METRICS, schema.metric, "metric"),
        attributes=declarations(schema.attributes),
        partition_by=schema.partition_by or "",
        shards=schema.shards,
        replicas=schema.replicas,
        recall_target=schema.recall_target,
        model=model_to_proto(schema.model),
        chunking_rule=schema.chunking_rule,
        storage=_known(STORAGES, schema.storage, "storage"),
        tier=tier_to_proto(schema.tier),
        recall_sample_share=schema.recall_sample_share,
    )


def tier_to_proto(tier: TierName) -> types_pb2.MemoryTier.ValueType:
    """Raises: InvalidRequest listing the tiers there are."""
    return _known(TIERS, tier, "tier")


def _known(numbers: Mapping[str, T], name: str, field: str) -> T:
    if name not in numbers:
        raise InvalidRequest(
            f"{field} {name!r} is not known", field=field, limit=f"one of {', '.join(numbers)}"
        )
    return numbers[name]


def schema_from_proto(message: collections_pb2.CollectionSchema) -> CollectionSchema:
    """Raises: Internal when the server speaks of an enum value this version does not know."""
    try:
        return _schema_from_proto(message)
    except KeyError as error:
        raise Internal(
            f"collection {message.name!r} has a metric, storage, tier or attribute type (number "
            f"{error}) that this version of the SDK does not know; install the server's version"
        ) from error


def description_from_proto(
    message: collections_pb2.DescribeCollectionResponse,
) -> CollectionDescription:
    """Raises: as `schema_from_proto`."""
    return CollectionDescription(
        schema=schema_from_proto(message.schema),
        rows_live=message.rows_live,
        recall=tuple(
            RecallEstimate(
                filter_class=each.filter_class,
                samples=each.samples,
                recall=each.recall,
                low=each.low,
                high=each.high,
            )
            for each in message.recall
        ),
    )


def _schema_from_proto(message: collections_pb2.CollectionSchema) -> CollectionSchema:
    model = (message.model.name, message.model.version) if message.HasField("model") else None
    return CollectionSchema(
        name=message.name,
        dimension=message.dimension,
        metric=_METRIC_NAMES[message.metric],
        attributes={each.name: _TYPE_NAMES[each.type] for each in message.attributes},
        partition_by=message.partition_by or None,
        shards=message.shards,
        replicas=message.replicas,
        recall_target=message.recall_target,
        model=model,
        chunking_rule=message.chunking_rule,
        id=message.id,
        version=message.version,
        storage=_STORAGE_NAMES[message.storage],
        tier=_TIER_NAMES[message.tier],
        recall_sample_share=message.recall_sample_share,
    )
