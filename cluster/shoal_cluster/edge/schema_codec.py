"""Translates schemas, request names, models and sessions between protobuf and the domain."""

from collections.abc import Mapping, Sequence

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import CollectionId, Epoch, Seq, ShardNumber
from shoal_cluster.domain.limits import SHARDS_MAX
from shoal_cluster.domain.recall import RecallEstimate
from shoal_cluster.domain.request import RequestName, validate_request_name
from shoal_cluster.domain.schema import (
    RECALL_SAMPLE_SHARE_DEFAULT,
    AttributeType,
    CollectionSchema,
    EmbeddingModel,
    MemoryTier,
    Metric,
    VectorStorage,
    validate_schema,
)
from shoal_cluster.domain.schema_change import SchemaChange
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.query.plan import Freshness
from shoal_protos.v1 import collections_pb2 as collections_pb
from shoal_protos.v1 import types_pb2 as pb

RECALL_TARGET_DEFAULT = 0.95

MODEL_BYTES_MAX = 256
CHUNKING_RULE_BYTES_MAX = 1024
"""Recorded and shown, never interpreted; bounded because every topology carries them."""

_METRICS: Mapping[int, Metric] = {
    pb.METRIC_COSINE: Metric.COSINE,
    pb.METRIC_DOT: Metric.DOT,
    pb.METRIC_L2: Metric.L2,
}
_METRIC_NUMBERS = {metric: number for number, metric in _METRICS.items()}

_STORAGES: Mapping[int, VectorStorage] = {
    pb.VECTOR_STORAGE_UNSPECIFIED: VectorStorage.FLOAT32,
    pb.VECTOR_STORAGE_FLOAT32: VectorStorage.FLOAT32,
    pb.VECTOR_STORAGE_FLOAT16: VectorStorage.FLOAT16,
}
_STORAGE_NUMBERS = {storage: number for number, storage in _STORAGES.items()}

_TIERS: Mapping[int, MemoryTier] = {
    pb.MEMORY_TIER_UNSPECIFIED: MemoryTier.COMPACT,
    pb.MEMORY_TIER_FULL: MemoryTier.FULL,
    pb.MEMORY_TIER_COMPACT: MemoryTier.COMPACT,
    pb.MEMORY_TIER_DISK: MemoryTier.DISK,
}
_TIER_NUMBERS = {tier: number for number, tier in _TIERS.items()}

_ATTRIBUTE_TYPES: Mapping[int, AttributeType] = {
    pb.ATTRIBUTE_TYPE_KEYWORD: AttributeType.KEYWORD,
    pb.ATTRIBUTE_TYPE_KEYWORD_LIST: AttributeType.KEYWORD_LIST,
    pb.ATTRIBUTE_TYPE_INT: AttributeType.INT,
    pb.ATTRIBUTE_TYPE_FLOAT: AttributeType.FLOAT,
    pb.ATTRIBUTE_TYPE_BOOL: AttributeType.BOOL,
    pb.ATTRIBUTE_TYPE_TIMESTAMP: AttributeType.TIMESTAMP,
}
_ATTRIBUTE_TYPE_NUMBERS = {kind: number for number, kind in _ATTRIBUTE_TYPES.items()}

_CONSISTENCIES: Mapping[int, Consistency] = {
    pb.CONSISTENCY_UNSPECIFIED: Consistency.SESSION,
    pb.CONSISTENCY_EVENTUAL: Consistency.EVENTUAL,
    pb.CONSISTENCY_SESSION: Consistency.SESSION,
    pb.CONSISTENCY_STRONG: Consistency.STRONG,
}


def decode_schema(message: collections_pb.CollectionSchema) -> CollectionSchema:
    """Returns a schema to create; id and version are the server's to choose.

    Raises: InvalidRequest naming the field and the limit.
    """
    metric = _METRICS.get(message.metric)
    if metric is None:
        raise InvalidRequest(
            "no metric is named", field="metric", limit=", ".join(metric.value for metric in Metric)
        )
    schema = CollectionSchema(
        id=CollectionId(""),
        name=message.name,
        dimension=message.dimension,
        metric=metric,
        attributes=decode_declarations(message.attributes, field="attributes"),
        partition_by=message.partition_by or None,
        shards=message.shards or 1,
        replicas=message.replicas or 1,
        recall_target=(
            message.recall_target if message.HasField("recall_target") else RECALL_TARGET_DEFAULT
        ),
        model=decode_model(message.model) if message.HasField("model") else None,
        chunking_rule=_bounded_text(
            message.chunking_rule, CHUNKING_RULE_BYTES_MAX, field="chunking_rule"
        ),
        storage=_decode_storage(message.storage),
        tier=_decode_tier(message.tier),
        recall_sample_share=(
            message.recall_sample_share
            if message.HasField("recall_sample_share")
            else RECALL_SAMPLE_SHARE_DEFAULT
        ),
    )
    validate_schema(schema)
    return schema


def _decode_storage(number: int) -> VectorStorage:
    storage = _STORAGES.get(number)
    if storage is None:
        raise InvalidRequest(
            f"storage {number} is not known",
            field="storage",
            limit=", ".join(storage.value for storage in VectorStorage),
        )
    return storage


def _decode_tier(number: int) -> MemoryTier:
    tier = _TIERS.get(number)
    if tier is None:
        raise InvalidRequest(
            f"tier {number} is not known",
            field="tier",
            limit=", ".join(tier.value for tier in MemoryTier),
        )
    return tier


def decode_declarations(
    messages: Sequence[collections_pb.AttributeDeclaration], *, field: str
) -> dict[str, AttributeType]:
    declared: dict[str, AttributeType] = {}
    for i, message in enumerate(messages):
        kind = _ATTRIBUTE_TYPES.get(message.type)
        if kind is None:
            raise InvalidRequest(
                f"attribute {message.name[:80]!r} has no type",
                field=f"{field}[{i}].type",
                limit=", ".join(kind.value for kind in AttributeType),
            )
        if message.name in declared:
            raise InvalidRequest(
                f"attribute {message.name[:80]!r} is declared twice", field=f"{field}[{i}].name"
            )
        declared[message.name] = kind
    return declared


def encode_schema(schema: CollectionSchema) -> collections_pb.CollectionSchema:
    return collections_pb.CollectionSchema(
        name=schema.name,
        dimension=schema.dimension,
        metric=_METRIC_NUMBERS[schema.metric],  # type: ignore[arg-type]  # an enum number is an int
        attributes=[
            collections_pb.AttributeDeclaration(
                name=name,
                type=_ATTRIBUTE_TYPE_NUMBERS[kind],  # type: ignore[arg-type]
            )
            for name, kind in schema.attributes.items()
        ],
        partition_by=schema.partition_by or "",
        shards=schema.shards,
        replicas=schema.replicas,
        recall_target=schema.recall_target,
        model=(
            None
            if schema.model is None
            else pb.EmbeddingModel(name=schema.model.name, version=schema.model.version)
        ),
        chunking_rule=schema.chunking_rule,
        id=schema.id,
        version=schema.version,
        storage=_STORAGE_NUMBERS[schema.storage],  # type: ignore[arg-type]
        tier=_TIER_NUMBERS[schema.tier],  # type: ignore[arg-type]
        recall_sample_share=schema.recall_sample_share,
    )


def encode_recall(estimate: RecallEstimate) -> collections_pb.RecallEstimate:
    return collections_pb.RecallEstimate(
        filter_class=estimate.filter_class.value,
        samples=estimate.samples,
        recall=estimate.recall,
        low=estimate.low,
        high=estimate.high,
    )


def decode_change(message: collections_pb.AlterCollectionRequest) -> SchemaChange:
    """Returns what to change. Raises: InvalidRequest naming the field and the limit."""
    return SchemaChange(
        name=message.name,
        add_attributes=decode_declarations(message.add_attributes, field="add_attributes"),
        replicas=message.replicas if message.HasField("replicas") else None,
        recall_target=message.recall_target if message.HasField("recall_target") else None,
        chunking_rule=(
            _bounded_text(message.chunking_rule, CHUNKING_RULE_BYTES_MAX, field="chunking_rule")
            if message.HasField("chunking_rule")
            else None
        ),
        model=decode_model(message.model) if message.HasField("model") else None,
        if_version=message.if_version if message.HasField("if_version") else None,
        tier=_decode_tier(message.tier) if message.tier else None,
        recall_sample_share=(
            message.recall_sample_share if message.HasField("recall_sample_share") else None
        ),
    )


def decode_model(message: pb.EmbeddingModel) -> EmbeddingModel:
    if not message.name:
        raise InvalidRequest("the embedding model has no name", field="model.name")
    return EmbeddingModel(
        name=_bounded_text(message.name, MODEL_BYTES_MAX, field="model.name"),
        version=_bounded_text(message.version, MODEL_BYTES_MAX, field="model.version"),
    )


def decode_request_name(message: pb.RequestId) -> RequestName:
    """Raises: InvalidRequest when a write has no usable name, so that no retry would be safe."""
    return validate_request_name(RequestName(message.client_id, message.request_no))


def decode_freshness(consistency: int, session: pb.SessionToken) -> Freshness:
    level = _CONSISTENCIES.get(consistency)
    if level is None:
        raise InvalidRequest(f"unknown consistency {consistency}", field="consistency")
    if level is not Consistency.SESSION or not session.positions:
        return Freshness(consistency=level)
    if len(session.positions) > SHARDS_MAX:
        raise InvalidRequest(
            f"the session names {len(session.positions)} positions",
            field="session.positions",
            limit=f"{SHARDS_MAX} shards",
        )
    return Freshness(
        consistency=level,
        token={
            ShardNumber(position.shard): Position(Epoch(position.epoch), Seq(position.seq))
            for position in session.positions
        },
        collection_id=session.collection_id,
    )


def fill_token(
    message: pb.SessionToken, schema: CollectionSchema, positions: Mapping[ShardNumber, Position]
) -> None:
    message.collection_id = schema.id
    for shard, position in positions.items():
        message.positions.add(shard=shard, epoch=position.epoch, seq=position.seq)


def whole_ms(duration_ms: float) -> int:
    """Returns a duration for a uint64 field; a replica that never reached its tail is capped."""
    return int(min(max(duration_ms, 0.0), 2.0**53))


def _bounded_text(text: str, bytes_max: int, *, field: str) -> str:
    size_bytes = len(text.encode())
    if size_bytes > bytes_max:
        raise InvalidRequest(
            f"{field} has {size_bytes} bytes", field=field, limit=f"{bytes_max} bytes"
        )
    return text
