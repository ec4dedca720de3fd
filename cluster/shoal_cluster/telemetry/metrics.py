"""The metrics catalogue: what of the cluster's state is shown to Prometheus, and under which names.

Everything comes from one `ClusterStatus`, read when Prometheus asks, so that metrics, `shoal
status` and `shoal collection describe` never disagree. docs/reference/metrics.md is generated from
this module.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from shoal_cluster.domain.errors import Conflict
from shoal_cluster.domain.status import ClusterStatus

Sample = tuple[tuple[str, ...], float]
"""The values of a metric's labels, and its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge:
    """One metric. read: its samples, label values in the order of `labels`."""

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[ClusterStatus], Iterable[Sample]]


def _recall(part: str) -> Callable[[ClusterStatus], Iterator[Sample]]:
    def read(status: ClusterStatus) -> Iterator[Sample]:
        for collection in status.collections:
            for estimate in collection.recall:
                labels = (collection.schema.name, estimate.filter_class.value)
                yield labels, float(getattr(estimate, part))

    return read


def _recall_target(status: ClusterStatus) -> Iterator[Sample]:
    for collection in status.collections:
        yield (collection.schema.name,), collection.schema.recall_target


def _rows(status: ClusterStatus) -> Iterator[Sample]:
    for collection in status.collections:
        yield (collection.schema.name,), collection.rows_live


def _shards(field: str) -> Callable[[ClusterStatus], Iterator[Sample]]:
    def read(status: ClusterStatus) -> Iterator[Sample]:
        for collection in status.collections:
            for shard in collection.shards:
                yield (collection.schema.name, str(shard.shard)), float(getattr(shard, field))

    return read


def _replicas(field: str, unit: float = 1.0) -> Callable[[ClusterStatus], Iterator[Sample]]:
    def read(status: ClusterStatus) -> Iterator[Sample]:
        for collection in status.collections:
            for shard in collection.shards:
                for replica in shard.replicas:
                    labels = (collection.schema.name, str(shard.shard), replica.server)
                    yield labels, getattr(replica, field) * unit

    return read


def _replicas_ready(status: ClusterStatus) -> Iterator[Sample]:
    for collection in status.collections:
        for shard in collection.shards:
            for replica in shard.replicas:
                labels = (collection.schema.name, str(shard.shard), replica.server)
                yield labels, float(replica.state == "ready")


def _actors(field: str) -> Callable[[ClusterStatus], Iterator[Sample]]:
    def read(status: ClusterStatus) -> Iterator[Sample]:
        for actor in status.actors:
            yield (actor.kind, actor.id), float(getattr(actor, field))

    return read


_OF_CLASS: Final = ("collection", "filter_class")
_OF_SHARD: Final = ("collection", "shard")
_OF_REPLICA: Final = ("collection", "shard", "server")
_OF_ACTOR: Final = ("kind", "actor")

CATALOGUE: Final = (
    Gauge(
        name="shoal_live_recall",
        help="Mean recall of sampled searches, repeated exactly at the same position.",
        labels=_OF_CLASS,
        read=_recall("recall"),
    ),
    Gauge(
        name="shoal_live_recall_low",
        help="Lower end of the interval that holds the true recall 95 times in 100.",
        labels=_OF_CLASS,
        read=_recall("low"),
    ),
    Gauge(
        name="shoal_live_recall_high",
        help="Upper end of that interval.",
        labels=_OF_CLASS,
        read=_recall("high"),
    ),
    Gauge(
        name="shoal_live_recall_samples",
        help="Searches behind the estimate.",
        labels=_OF_CLASS,
        read=_recall("samples"),
    ),
    Gauge(
        name="shoal_collection_recall_target",
        help="Recall that the collection declares.",
        labels=("collection",),
        read=_recall_target,
    ),
    Gauge(
        name="shoal_collection_rows",
        help="Live rows, as the shards last reported.",
        labels=("collection",),
        read=_rows,
    ),
    Gauge(
        name="shoal_shard_segments",
        help="Segments that a search of the shard looks into.",
        labels=_OF_SHARD,
        read=_shards("segments"),
    ),
    Gauge(
        name="shoal_shard_memtable_rows",
        help="Rows that are visible and not yet in a segment.",
        labels=_OF_SHARD,
        read=_shards("memtable_rows"),
    ),
    Gauge(
        name="shoal_replica_ready",
        help="1 when the replica is ready to answer, else 0.",
        labels=_OF_REPLICA,
        read=_replicas_ready,
    ),
    Gauge(
        name="shoal_replica_lag_operations",
        help="Operations behind the primary.",
        labels=_OF_REPLICA,
        read=_replicas("lag_seq"),
    ),
    Gauge(
        name="shoal_replica_staleness_seconds",
        help="Since the replica was last known to be at the log's tail.",
        labels=_OF_REPLICA,
        read=_replicas("staleness_ms", 0.001),
    ),
    Gauge(
        name="shoal_replica_memory_bytes",
        help="Held in memory for the replica, mapped files apart.",
        labels=_OF_REPLICA,
        read=_replicas("memory_bytes"),
    ),
    Gauge(
        name="shoal_replica_failures",
        help="Times in a row that something in the replica's background failed.",
        labels=_OF_REPLICA,
        read=_replicas("failures"),
    ),
    Gauge(
        name="shoal_actor_memory_bytes",
        help="Resident memory of a process of the cluster.",
        labels=_OF_ACTOR,
        read=_actors("memory_bytes"),
    ),
    Gauge(
        name="shoal_actor_restarts",
        help="Times the process was started again.",
        labels=_OF_ACTOR,
        read=_actors("restarts"),
    ),
    Gauge(
        name="shoal_status_age_seconds",
        help="Age of the report that these metrics were made from.",
        labels=(),
        read=lambda status: [((), status.age_ms / 1000)],
    ),
)


class StatusMetrics(Collector):
    """Reads a status whenever it is collected; read: may be called from any thread."""

    def __init__(self, read: Callable[[], ClusterStatus]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status = self._read()
        for gauge in CATALOGUE:
            family = GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels)
            for labels, value in gauge.read(status):
                family.add_metric(labels, value)
            yield family


def serve_metrics(host: str, port: int, read: Callable[[], ClusterStatus]) -> WSGIServer:
    """Serves `/metrics` on threads of its own until the returned server is shut down.

    Raises: Conflict when the address cannot be listened on.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusMetrics(read))
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise Conflict(
            f"cannot serve metrics at {host}:{port}: {error.strerror}; choose another port",
            field="metrics_port",
        ) from error
    return server


def metrics_reference() -> str:
    """Returns docs/reference/metrics.md."""
    rows = "\n".join(
        f"| `{gauge.name}` | {', '.join(f'`{label}`' for label in gauge.labels)} | {gauge.help} |"
        for gauge in CATALOGUE
    )
    return (
        "# Metrics\n\n"
        "<!-- Generated from cluster/shoal_cluster/telemetry/metrics.py by\n"
        "     `python -m shoal_cluster.cli.metrics_reference`; do not edit. -->\n\n"
        "`shoal up --metrics-port 9464` has the controller serve them at `/metrics`, for "
        "Prometheus. All are gauges,\n"
        "made from the same report as `shoal status` when they are asked for.\n\n"
        "| metric | labels | meaning |\n"
        "|---|---|---|\n"
        f"{rows}\n"
    )
