"""`shoal collection`: create, list, describe, alter, drop."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast, get_args

import click

import shoal
from shoal.schema import AttributeTypeName, MetricName, Model, StorageName, TierName
from shoal_cluster.cli.output import Table
from shoal_cluster.cli.session import Session, client_options, shoal_command
from shoal_cluster.domain.limits import (
    RECALL_SAMPLE_SHARE_MAX,
    RECALL_TARGET_MAX,
    RECALL_TARGET_MIN,
)


def _parse_attributes(
    _context: click.Context, _parameter: click.Parameter, values: Sequence[str]
) -> dict[str, AttributeTypeName]:
    """Reads attributes given as NAME:TYPE."""
    kinds = get_args(AttributeTypeName)
    attributes: dict[str, AttributeTypeName] = {}
    for value in values:
        name, _, kind = value.rpartition(":")
        if not name or kind not in kinds:
            raise click.BadParameter(
                f"{value!r} must be NAME:TYPE, the type one of {', '.join(kinds)}"
            )
        if name in attributes:
            raise click.BadParameter(f"attribute {name!r} is declared twice")
        attributes[name] = cast(AttributeTypeName, kind)
    return attributes


def _parse_model(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> Model | None:
    """Reads a model given as NAME:VERSION; the name itself may hold colons."""
    if value is None:
        return None
    name, _, version = value.rpartition(":")
    if not name or not version:
        raise click.BadParameter(f"{value!r} must be NAME:VERSION")
    return name, version


_recall_option = click.option(
    "--recall-target",
    type=click.FloatRange(RECALL_TARGET_MIN, RECALL_TARGET_MAX),
    help="Share of the true nearest neighbours a search must find.",
)
_sample_option = click.option(
    "--recall-sample-share",
    type=click.FloatRange(0, RECALL_SAMPLE_SHARE_MAX),
    help="Share of the searches repeated exactly to see which recall they reach; 0 is off.",
)
_model_option = click.option(
    "--model",
    metavar="NAME:VERSION",
    callback=_parse_model,
    help="Embedding model; vectors of another are refused.",
)
_tier_option = click.option(
    "--tier",
    type=click.Choice(get_args(TierName)),
    help="What is in memory: vectors too (full), codes with vectors in the page cache (compact, "
    "the default), codes with vectors on disk (disk).",
)
_chunking_option = click.option("--chunking-rule", help="How documents were cut, in your words.")


@click.group()
def collection() -> None:
    """Creates, shows, alters and drops collections."""


@collection.command()
@click.argument("collection_name", metavar="COLLECTION")
@click.option("--dimension", type=int, required=True, help="Values in a vector.")
@click.option(
    "--metric", type=click.Choice(get_args(MetricName)), default="cosine", show_default=True
)
@click.option(
    "--attribute",
    "attributes",
    metavar="NAME:TYPE",
    multiple=True,
    callback=_parse_attributes,
    help="Repeatable.",
)
@click.option("--partition-by", help="Keyword attribute whose value chooses the shard.")
@click.option("--shards", type=int, default=1, show_default=True)
@click.option("--replicas", type=int, default=1, show_default=True, help="Copies of each shard.")
@click.option(
    "--storage",
    type=click.Choice(get_args(StorageName)),
    default="float32",
    show_default=True,
    help="How a value is kept; float16 rounds it when it is written.",
)
@_tier_option
@_recall_option
@_sample_option
@_model_option
@_chunking_option
@client_options
@shoal_command
def create(
    session: Session,
    collection_name: str,
    dimension: int,
    metric: MetricName,
    attributes: Mapping[str, AttributeTypeName],
    partition_by: str | None,
    shards: int,
    replicas: int,
    storage: StorageName,
    tier: TierName | None,
    recall_target: float | None,
    recall_sample_share: float | None,
    model: Model | None,
    chunking_rule: str | None,
) -> None:
    """Creates a collection."""
    optional = _given(
        tier=tier,
        recall_target=recall_target,
        recall_sample_share=recall_sample_share,
        chunking_rule=chunking_rule,
    )
    with session.connect() as client:
        client.create_collection(
            collection_name,
            dimension=dimension,
            metric=metric,
            attributes=attributes,
            partition_by=partition_by,
            shards=shards,
            replicas=replicas,
            storage=storage,
            model=model,
            **optional,
        )
        described = client.describe_collection(collection_name)
    _show(session, described)


@collection.command("list")
@client_options
@shoal_command
def list_collections(session: Session) -> None:
    """Lists the collections."""
    with session.connect() as client:
        schemas = client.list_collections()
    session.output.result(
        [asdict(schema) for schema in schemas],
        Table(
            title="Collections",
            columns=(
                "name",
                "dimension",
                "metric",
                "shards",
                "replicas",
                "recall target",
                "partition by",
                "model",
            ),
            rows=[
                (
                    schema.name,
                    schema.dimension,
                    schema.metric,
                    schema.shards,
                    schema.replicas,
                    schema.recall_target,
                    schema.partition_by or "(point id)",
                    _model_text(schema.model),
                )
                for schema in schemas
            ],
        ),
    )


@collection.command()
@click.argument("collection_name", metavar="COLLECTION")
@client_options
@shoal_command
def describe(session: Session, collection_name: str) -> None:
    """Shows a collection's schema, about how many rows it holds, and the recall searches reach."""
    with session.connect() as client:
        described = client.describe_collection(collection_name)
    _show(session, described)


@collection.command()
@click.argument("collection_name", metavar="COLLECTION")
@click.option(
    "--add-attribute",
    "attributes",
    metavar="NAME:TYPE",
    multiple=True,
    callback=_parse_attributes,
    help="Repeatable.",
)
@click.option("--replicas", type=int, help="Copies of each shard.")
@_tier_option
@_recall_option
@_sample_option
@_model_option
@_chunking_option
@click.option("--if-version", type=int, help="Only if the schema has this version.")
@client_options
@shoal_command
def alter(
    session: Session,
    collection_name: str,
    attributes: Mapping[str, AttributeTypeName],
    replicas: int | None,
    tier: TierName | None,
    recall_target: float | None,
    recall_sample_share: float | None,
    model: Model | None,
    chunking_rule: str | None,
    if_version: int | None,
) -> None:
    """Changes what the options name; the rest stays."""
    with session.connect() as client:
        client.alter_collection(
            collection_name,
            add_attributes=attributes,
            replicas=replicas,
            recall_target=recall_target,
            chunking_rule=chunking_rule,
            model=model,
            tier=tier,
            recall_sample_share=recall_sample_share,
            if_version=if_version,
        )
        described = client.describe_collection(collection_name)
    _show(session, described)


@collection.command()
@click.argument("collection_name", metavar="COLLECTION")
@click.option("--yes", is_flag=True, help="Do not ask. Needed when stdin is not a terminal.")
@client_options
@shoal_command
def drop(session: Session, collection_name: str, yes: bool) -> None:
    """Removes a collection and everything in it."""
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("dropping removes every row; confirm with --yes")
        click.confirm(
            f"Remove collection {collection_name!r} and all its rows?", abort=True, err=True
        )
    with session.connect() as client:
        client.drop_collection(collection_name)
    session.output.result({"dropped": collection_name}, f"collection {collection_name!r} dropped")


def _given(**options: Any) -> dict[str, Any]:
    """Leaves out what was not given, so that the SDK's default applies."""
    return {name: value for name, value in options.items() if value is not None}


def _model_text(model: Model | None) -> str:
    return "-" if model is None else ":".join(model)


def _recall_fact(estimate: shoal.RecallEstimate) -> tuple[str, str]:
    kind = estimate.filter_class
    return (
        "recall reached" if kind == "none" else f"recall reached, {kind} filters",
        f"{estimate.recall:.4f} ({estimate.low:.4f} to {estimate.high:.4f}, "
        f"{estimate.samples:,} samples)",
    )


def _show(session: Session, described: shoal.CollectionDescription) -> None:
    schema = described.schema
    facts: list[tuple[str, str | int | float]] = [
        ("rows", f"about {described.rows_live:,}"),
        ("dimension", str(schema.dimension)),
        ("metric", schema.metric),
        ("shards", str(schema.shards)),
        ("replicas", str(schema.replicas)),
        ("partition by", schema.partition_by or "(point id)"),
        ("recall target", f"{schema.recall_target:g}"),
        *(_recall_fact(each) for each in described.recall),
        ("searches sampled", f"{schema.recall_sample_share:.4g}"),
        ("vector storage", schema.storage),
        ("memory tier", schema.tier),
        ("model", _model_text(schema.model)),
        ("chunking rule", schema.chunking_rule or "-"),
        ("schema version", str(schema.version)),
        ("id", schema.id),
        *((f"attribute {name}", kind) for name, kind in schema.attributes.items()),
    ]
    session.output.result(
        asdict(described),
        Table(title=f"Collection {schema.name}", columns=("property", "value"), rows=facts),
    )
