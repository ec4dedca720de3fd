"""`shoal plan`: what a collection will take, before it is created. Asks no cluster."""

import math
from typing import get_args

import click

from shoal.schema import StorageName, TierName
from shoal_cluster.cli.output import Table
from shoal_cluster.cli.session import Session, shoal_command
from shoal_cluster.domain import limits
from shoal_cluster.domain.schema import MemoryTier, VectorStorage
from shoal_cluster.index.cost_model import CostModel
from shoal_cluster.shard.footprint import Footprint, footprint

_GIB = 2**30


@click.command()
@click.option("--rows", type=click.IntRange(min=1), required=True, help="Points in all.")
@click.option(
    "--dimension",
    type=click.IntRange(limits.DIMENSION_MIN, limits.DIMENSION_MAX),
    required=True,
    help="Values in a vector.",
)
@click.option(
    "--storage", type=click.Choice(get_args(StorageName)), default="float32", show_default=True
)
@click.option("--tier", type=click.Choice(get_args(TierName)), help="Only this tier.  [all]")
@click.option(
    "--recall-target",
    type=click.FloatRange(limits.RECALL_TARGET_MIN, limits.RECALL_TARGET_MAX),
    default=0.95,
    show_default=True,
)
@click.option("--shards", type=click.IntRange(1, limits.SHARDS_MAX), default=1, show_default=True)
@click.option(
    "--replicas", type=click.IntRange(1, limits.REPLICAS_MAX), default=1, show_default=True
)
@shoal_command
def plan(
    session: Session,
    rows: int,
    dimension: int,
    storage: StorageName,
    tier: TierName | None,
    recall_target: float,
    shards: int,
    replicas: int,
) -> None:
    """Says what a collection will take in memory and on disk, by memory tier.

    Vectors, codes and the index over ids; without payloads, attributes and the ids themselves.
    """
    found = {
        each: footprint(
            math.ceil(rows / shards),
            CostModel(dimension=dimension, storage=VectorStorage(storage), tier=each),
            recall_target,
        )
        for each in ([MemoryTier(tier)] if tier else MemoryTier)
    }
    session.output.result(
        {each.value: _document(one, shards, replicas) for each, one in found.items()},
        Table(
            title=f"{rows:,} rows x {dimension}, {storage}, recall {recall_target:g}, "
            f"{shards} shards x {replicas} replicas",
            columns=(
                "tier",
                "memory a vector, bytes",
                "mapped a vector, bytes",
                "disk a vector, bytes",
                "memory in all, GiB",
                "disk in all, GiB",
                "index of the largest segments",
            ),
            rows=[
                (
                    each.value,
                    round(one.memory / one.rows),
                    round(one.mapped / one.rows),
                    round(one.disk / one.rows),
                    f"{one.memory * shards * replicas / _GIB:.2f}",
                    f"{one.disk * shards * replicas / _GIB:.2f}",
                    one.choice.family.value,
                )
                for each, one in found.items()
            ],
        ),
        *(f"{each.value}: {one.choice.reason}" for each, one in found.items()),
    )


def _document(one: Footprint, shards: int, replicas: int) -> dict[str, object]:
    copies = shards * replicas
    return {
        "memory_bytes_per_vector": round(one.memory / one.rows, 1),
        "mapped_bytes_per_vector": round(one.mapped / one.rows, 1),
        "disk_bytes_per_vector": round(one.disk / one.rows, 1),
        "memory_bytes": one.memory * copies,
        "mapped_bytes": one.mapped * copies,
        "disk_bytes": one.disk * copies,
        "segments_per_shard": one.segments,
        "family": one.choice.family.value,
        "reason": one.choice.reason,
    }
