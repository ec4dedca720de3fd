"""What the demo measured, what it should have been, and how both are shown."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shoal_cluster.cli.demo.traffic import Latency
from shoal_cluster.cli.output import Table

RECALL_TARGET = 0.98
MRR_EXPECTED = 0.496
"""Exact cosine search over this data (data/debian_packages/README.md)."""
MRR_TOLERANCE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """recall_filtered: recall@10 by filter. filter_rows: rows each filter lets through."""

    recall_plain: float
    recall_filtered: Mapping[str, float]
    filter_rows: Mapping[str, int]
    mrr_known_item: float
    mrr_depth: int

    @property
    def recall_filtered_min(self) -> float:
        return min(self.recall_filtered.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Durable and visible rows; `not_indexed` of them are searched exactly from memory."""

    rows_acknowledged: int
    load_seconds: float
    not_indexed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutageFigures:
    """failed_queries: of all three phases. takeover_seconds: from the kill to the first write that
    a shard led by the killed server acknowledged. replica_back_seconds: to all replicas ready."""

    killed_server: str
    killed_leads: int
    failed_queries: int
    first_failure: str
    recall: float
    takeover_seconds: float
    replica_back_seconds: float
    before: Latency
    during: Latency
    after: Latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """What a new cluster found in the bucket. write_kept: the write made during the outage."""

    restart_seconds: float
    rows_counted: int
    ids_missing: int
    vectors_differing: int
    write_kept: bool
    recall_plain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Everything measured in one run."""

    rows_given: int
    loading: Loading
    quality: Quality
    outage: OutageFigures
    restart: Restart
    total_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One thing that has to hold."""

    name: str
    measured: str
    wanted: str
    holds: bool


def targets_of(figures: Figures) -> list[Target]:
    """Returns what must hold for the demo to end with status 0."""
    quality, outage, restart = figures.quality, figures.outage, figures.restart
    acknowledged = figures.loading.rows_acknowledged
    wanted_recall = f">= {RECALL_TARGET}"
    return [
        Target(
            name="rows acknowledged",
            measured=f"{acknowledged:,}",
            wanted=f"{figures.rows_given:,}",
            holds=acknowledged == figures.rows_given,
        ),
        Target(
            name="recall@10 plain",
            measured=f"{quality.recall_plain:.4f}",
            wanted=wanted_recall,
            holds=quality.recall_plain >= RECALL_TARGET,
        ),
        *(
            Target(
                name=f"recall@10 {name} ({quality.filter_rows[name]:,} rows)",
                measured=f"{recall:.4f}",
                wanted=wanted_recall,
                holds=recall >= RECALL_TARGET,
            )
            for name, recall in quality.recall_filtered.items()
        ),
        Target(
            name=f"MRR of known items, depth {quality.mrr_depth}",
            measured=f"{quality.mrr_known_item:.4f}",
            wanted=f"{MRR_EXPECTED} +- {MRR_TOLERANCE}",
            holds=abs(quality.mrr_known_item - MRR_EXPECTED) <= MRR_TOLERANCE,
        ),
        Target(
            name="queries failed around the kill",
            measured=f"{outage.failed_queries:,}",
            wanted="0",
            holds=outage.failed_queries == 0,
        ),
        Target(
            name="rows after restart",
            measured=f"{restart.rows_counted:,}",
            wanted=f"{acknowledged:,}",
            holds=restart.rows_counted == acknowledged,
        ),
        Target(
            name="ids missing after restart",
            measured=f"{restart.ids_missing:,}",
            wanted="0",
            holds=restart.ids_missing == 0,
        ),
        Target(
            name="vectors changed after restart",
            measured=f"{restart.vectors_differing:,}",
            wanted="0",
            holds=restart.vectors_differing == 0,
        ),
        Target(
            name="write during the outage kept",
            measured="yes" if restart.write_kept else "no",
            wanted="yes",
            holds=restart.write_kept,
        ),
    ]


def document_of(figures: Figures) -> dict[str, Any]:
    """Returns the figures as JSON: the headline keys flat, the rest below."""
    loading, quality = figures.loading, figures.quality
    outage, restart = figures.outage, figures.restart
    targets = targets_of(figures)
    return {
        "rows_acknowledged": loading.rows_acknowledged,
        "rows_after_restart": restart.rows_counted,
        "recall_plain": round(quality.recall_plain, 4),
        "recall_filtered_min": round(quality.recall_filtered_min, 4),
        "mrr_known_item": round(quality.mrr_known_item, 4),
        "failed_queries_during_kill": outage.failed_queries,
        "replica_back_seconds": round(outage.replica_back_seconds, 2),
        "takeover_seconds": round(outage.takeover_seconds, 2),
        "p50_ms": round(outage.before.p50_ms, 2),
        "p99_ms": round(outage.before.p99_ms, 2),
        "before": _latency(outage.before),
        "during": _latency(outage.during),
        "after": _latency(outage.after),
        "recall_during_kill": round(outage.recall, 4),
        "killed_server": outage.killed_server,
        "killed_server_led_shards": outage.killed_leads,
        "first_failure": outage.first_failure,
        "recall_filtered": {
            name: {"recall": round(recall, 4), "rows": quality.filter_rows[name]}
            for name, recall in quality.recall_filtered.items()
        },
        "mrr_depth": quality.mrr_depth,
        "load_seconds": round(loading.load_seconds, 2),
        "load_rows_per_second": round(_rate(loading)),
        "rows_not_indexed": loading.not_indexed,
        "restart_seconds": round(restart.restart_seconds, 2),
        "ids_missing_after_restart": restart.ids_missing,
        "vectors_differing_after_restart": restart.vectors_differing,
        "write_during_kill_kept": restart.write_kept,
        "recall_plain_after_restart": round(restart.recall_plain, 4),
        "total_seconds": round(figures.total_seconds, 1),
        "targets": [asdict(target) for target in targets],
        "passed": all(target.holds for target in targets),
    }


def tables_of(figures: Figures) -> list[Table]:
    """Returns the final tables: targets, then everything else that was measured."""
    outage, loading, restart = figures.outage, figures.loading, figures.restart
    return [
        Table(
            title="Targets",
            columns=("what", "measured", "wanted", ""),
            rows=[
                (target.name, target.measured, target.wanted, "ok" if target.holds else "MISSED")
                for target in targets_of(figures)
            ],
        ),
        Table(
            title=f"Queries, ms (SIGKILL of {outage.killed_server}, "
            f"which led {outage.killed_leads} shards)",
            columns=("phase", "queries", "p50", "p99"),
            rows=[
                (phase, latency.queries, f"{latency.p50_ms:.1f}", f"{latency.p99_ms:.1f}")
                for phase, latency in (
                    ("before", outage.before),
                    ("during", outage.during),
                    ("after", outage.after),
                )
            ],
        ),
        Table(
            title="Also measured",
            columns=("what", "value"),
            rows=[
                ("load", f"{_rate(loading):,.0f} rows/s, {loading.load_seconds:.1f} s"),
                ("rows searched from memory, not indexed", f"{loading.not_indexed:,}"),
                ("recall@10 of the queries during the outage", f"{outage.recall:.4f}"),
                ("first write to a shard the killed server led", _s(outage.takeover_seconds)),
                ("all replicas back and ready", _s(outage.replica_back_seconds)),
                ("stop and start from the bucket", _s(restart.restart_seconds)),
                ("recall@10 plain after restart", f"{restart.recall_plain:.4f}"),
                ("the whole demo", _s(figures.total_seconds)),
            ],
        ),
    ]


def _rate(loading: Loading) -> float:
    return loading.rows_acknowledged / max(loading.load_seconds, 1e-9)


def _latency(latency: Latency) -> dict[str, float]:
    return {
        "queries": latency.queries,
        "p50_ms": round(latency.p50_ms, 2),
        "p99_ms": round(latency.p99_ms, 2),
    }


def _s(duration_s: float) -> str:
    return f"{duration_s:.1f} s"
