"""`shoal status`: nodes, actors, collections, shards, replicas."""

import re
from typing import Any

import click
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from shoal_cluster.cli.output import Table, mib, seconds
from shoal_cluster.cli.session import Session, client_options, shoal_command
from shoal_protos.v1 import admin_pb2
from shoal_protos.v1.types_pb2 import MemoryTier, VectorStorage

_NODE_ID_SHOWN = 12
"""Ray's node ids have 56 hex digits; twelve tell nodes apart."""


@click.command()
@click.argument("collection", default="")
@client_options
@shoal_command
def status(session: Session, collection: str) -> None:
    """Shows what runs and what it holds; COLLECTION limits it to one."""
    with session.connect() as client:
        report = client.status(collection)
    session.output.result(
        document_of(report),
        f"cluster {report.cluster_uuid}, version {report.version}, bucket {report.bucket}, "
        f"up {seconds(report.uptime_ms)}; as of {report.age_ms} ms ago",
        *status_tables(report),
    )


def status_tables(report: admin_pb2.StatusResponse) -> list[Table]:
    """Returns the report as tables for people."""
    return [
        _nodes(report),
        _actors(report),
        _collections(report),
        _shards(report),
        _replicas(report),
        *_failures(report),
    ]


def _nodes(report: admin_pb2.StatusResponse) -> Table:
    return Table(
        title="Nodes",
        columns=("node", "address", "state", "cpus", "memory used", "memory"),
        rows=[
            (
                node.id[:_NODE_ID_SHOWN],
                node.address,
                node.state,
                node.cpus,
                mib(node.memory_used_bytes),
                mib(node.memory_bytes),
            )
            for node in report.nodes
        ],
    )


def _actors(report: admin_pb2.StatusResponse) -> Table:
    return Table(
        title="Actors",
        columns=("actor", "kind", "pid", "node", "state", "up", "restarts", "memory", "address"),
        rows=[
            (
                actor.id,
                actor.kind,
                str(actor.pid),
                actor.node[:_NODE_ID_SHOWN],
                actor.state,
                seconds(actor.uptime_ms),
                actor.restarts,
                mib(actor.memory_bytes),
                actor.address,
            )
            for actor in report.actors
        ],
    )


def _collections(report: admin_pb2.StatusResponse) -> Table:
    return Table(
        title="Collections",
        columns=(
            "collection",
            "dimension",
            "storage",
            "tier",
            "shards",
            "replicas",
            "rows",
            "recall target",
        ),
        rows=[
            (
                each.schema.name,
                each.schema.dimension,
                _enum_text(VectorStorage.Name(each.schema.storage)),
                _enum_text(MemoryTier.Name(each.schema.tier)),
                each.schema.shards,
                each.schema.replicas,
                each.rows_live,
                f"{each.schema.recall_target:g}",
            )
            for each in report.collections
        ],
    )


def _shards(report: admin_pb2.StatusResponse) -> Table:
    return Table(
        title="Shards",
        columns=(
            "collection",
            "shard",
            "primary",
            "replicas",
            "epoch",
            "seq",
            "rows",
            "not indexed",
            "segments",
            "manifest",
        ),
        rows=[
            (
                each.schema.name,
                shard.shard,
                _primary(shard),
                _present(shard, each.schema.replicas),
                shard.epoch,
                shard.seq,
                shard.rows_live,
                shard.memtable_rows,
                shard.segments,
                shard.manifest_version,
            )
            for each in report.collections
            for shard in each.shards
        ],
    )


def _replicas(report: admin_pb2.StatusResponse) -> Table:
    return Table(
        title="Replicas",
        columns=(
            "collection",
            "shard",
            "server",
            "role",
            "state",
            "behind",
            "rows",
            "memory",
            "mapped",
            "bytes a row",
        ),
        rows=[
            (
                each.schema.name,
                shard.shard,
                replica.server,
                _role(replica),
                replica.state,
                replica.lag_seq,
                replica.rows,
                mib(replica.memory_bytes),
                mib(replica.mapped_bytes),
                round(replica.memory_bytes / replica.rows) if replica.rows else 0,
            )
            for each in report.collections
            for shard in each.shards
            for replica in shard.replicas
        ],
    )


def _failures(report: admin_pb2.StatusResponse) -> list[Table]:
    """Returns what fails, as a table of its own: reasons are long, and mostly there are none."""
    rows = [
        (each.schema.name, shard.shard, replica.server, replica.failures, replica.reason)
        for each in report.collections
        for shard in each.shards
        for replica in shard.replicas
        if replica.reason
    ]
    columns = ("collection", "shard", "server", "failures", "reason")
    return [Table(title="Failures", columns=columns, rows=rows)] if rows else []


def _primary(shard: admin_pb2.ShardStatus) -> str:
    leading = [
        replica.server
        for replica in shard.replicas
        if replica.role == admin_pb2.REPLICA_ROLE_PRIMARY
    ]
    return leading[0] if leading else "(none)"


def _present(shard: admin_pb2.ShardStatus, wanted: int) -> str:
    """Returns how many replicas serve, of how many the collection should have."""
    ready = sum(replica.state == "ready" for replica in shard.replicas)
    return f"{ready} of {wanted}"


def _role(replica: admin_pb2.ReplicaStatus) -> str:
    return _enum_text(admin_pb2.ReplicaRole.Name(replica.role))


def _enum_text(name: str) -> str:
    """Returns the value's own word: "full" of MEMORY_TIER_FULL."""
    return name.rpartition("_")[2].lower()


def document_of(message: Message) -> dict[str, Any]:
    """Returns a message as JSON: fields and enums by name, 64-bit hashes as hex, absent as null.

    protobuf's own JSON turns every 64-bit integer into a string; sequence numbers and sizes stay
    below 2**53 here, so they go out as numbers. Only fixed64 holds hashes.
    """
    return {field.name: _field(message, field.name) for field in message.DESCRIPTOR.fields}


def _field(message: Message, name: str) -> Any:
    field = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if field.is_repeated:
        return [_value(field, each) for each in value]
    if field.has_presence and not message.HasField(name):
        return None
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    """field: a FieldDescriptor, of the pure or the compiled protobuf."""
    if field.message_type is not None:
        return document_of(value)
    if field.enum_type is not None:
        # By convention every value of enum ReplicaRole starts with REPLICA_ROLE_.
        prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", field.enum_type.name).upper() + "_"
        name: str = field.enum_type.values_by_number[value].name
        return name.removeprefix(prefix).lower()
    return f"{value:016x}" if field.type == FieldDescriptor.TYPE_FIXED64 else value
