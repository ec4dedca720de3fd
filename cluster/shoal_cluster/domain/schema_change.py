"""What `alter` may do to a living collection. Pure: the controller commits the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from shoal_cluster.domain.errors import Conflict, InvalidRequest
from shoal_cluster.domain.schema import (
    AttributeType,
    CollectionSchema,
    EmbeddingModel,
    MemoryTier,
    validate_schema,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaChange:
    """None means: stays as it is. if_version: refuse unless the schema has this version."""

    name: str
    add_attributes: Mapping[str, AttributeType] = field(default_factory=dict)
    replicas: int | None = None
    recall_target: float | None = None
    chunking_rule: str | None = None
    model: EmbeddingModel | None = None
    if_version: int | None = None
    tier: MemoryTier | None = None
    recall_sample_share: float | None = None


def apply_change(schema: CollectionSchema, change: SchemaChange) -> CollectionSchema:
    """Returns the altered schema, one version up; the same schema when nothing would change.

    Raises: Conflict when the schema is not of `if_version`, or another model is recorded already;
    InvalidRequest naming the field when the result is not a valid schema (nothing was applied).
    """
    if change.if_version is not None and change.if_version != schema.version:
        raise Conflict(
            f"collection {schema.name!r} has version {schema.version}, not {change.if_version}; "
            "describe it and decide again",
            field="if_version",
        )
    if change.model is not None and schema.model not in (None, change.model):
        raise Conflict(
            f"collection {schema.name!r} holds vectors of another model already; create a new "
            "collection for the new model",
            field="model",
        )
    for name, kind in change.add_attributes.items():
        declared = schema.attributes.get(name)
        if declared not in (None, kind):
            raise InvalidRequest(
                f"attribute {name!r} is declared {declared.value if declared else ''} already; "
                "a type never changes, declare another name",
                field="add_attributes",
            )
    altered = replace(
        schema,
        attributes={**schema.attributes, **change.add_attributes},
        replicas=schema.replicas if change.replicas is None else change.replicas,
        recall_target=(
            schema.recall_target if change.recall_target is None else change.recall_target
        ),
        chunking_rule=(
            schema.chunking_rule if change.chunking_rule is None else change.chunking_rule
        ),
        model=schema.model if change.model is None else change.model,
        tier=schema.tier if change.tier is None else change.tier,
        recall_sample_share=(
            schema.recall_sample_share
            if change.recall_sample_share is None
            else change.recall_sample_share
        ),
    )
    if altered == schema:
        return schema
    validate_schema(altered)
    return replace(altered, version=schema.version + 1)
