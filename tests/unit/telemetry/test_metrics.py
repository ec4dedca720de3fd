"""What of a status reaches Prometheus, and how."""

import socket
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal_cluster.cli.metrics_reference import REFERENCE
from shoal_cluster.domain.errors import Conflict
from shoal_cluster.domain.ids import ServerId, ShardNumber
from shoal_cluster.domain.recall import FilterClass, RecallEstimate
from shoal_cluster.domain.status import (
    ActorStatus,
    ClusterStatus,
    CollectionStatus,
    ReplicaStatus,
    ShardStatus,
)
from shoal_cluster.telemetry.metrics import CATALOGUE, metrics_reference, serve_metrics
from tests.unit.query.fake_cluster import a_schema

ESTIMATE = RecallEstimate(filter_class=FilterClass.NARROW, samples=40, recall=0.975, trials=400.0)
STATUS = ClusterStatus(
    version="0",
    cluster_uuid="u",
    uptime_ms=1,
    bucket="b",
    age_ms=250,
    actors=(ActorStatus(id="server-0", kind="shard_server", pid=1, node="n", state="ready"),),
    collections=(
        CollectionStatus(
            schema=replace(a_schema(), name='a "quoted" name', recall_target=0.97),
            rows_live=7,
            recall=(ESTIMATE,),
            shards=(
                ShardStatus(
                    shard=ShardNumber(3),
                    segments=2,
                    memtable_rows=5,
                    replicas=(
                        ReplicaStatus(
                            server=ServerId("server-0"),
                            primary=True,
                            state="lagging",
                            staleness_ms=1500,
                            lag_seq=4,
                        ),
                    ),
                ),
            ),
        ),
    ),
)


class Scraped:
    """A served registry, and what a scrape of it gives."""

    def __init__(self, status: ClusterStatus | Exception) -> None:
        def read() -> ClusterStatus:
            if isinstance(status, Exception):
                raise status
            return status

        self._server = serve_metrics("127.0.0.1", 0, read)

    def __enter__(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/metrics"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def scrape(url: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return {
        family.name: [(sample.labels, sample.value) for sample in family.samples]
        for family in text_string_to_metric_families(text)
    }


def test_a_scrape_shows_every_metric_of_the_catalogue_with_its_labels() -> None:
    with Scraped(STATUS) as url:
        shown = scrape(url)
    assert shown.keys() == {gauge.name for gauge in CATALOGUE}
    for gauge in CATALOGUE:
        assert [set(labels) for labels, _ in shown[gauge.name]] == [set(gauge.labels)]


def test_recall_comes_with_its_interval_and_its_target() -> None:
    of_class = {"collection": 'a "quoted" name', "filter_class": "narrow"}
    with Scraped(STATUS) as url:
        shown = scrape(url)
    assert shown["shoal_live_recall"] == [(of_class, 0.975)]
    assert shown["shoal_live_recall_low"] == [(of_class, pytest.approx(ESTIMATE.low))]
    assert shown["shoal_live_recall_high"] == [(of_class, pytest.approx(ESTIMATE.high))]
    assert shown["shoal_live_recall_samples"] == [(of_class, 40)]
    assert shown["shoal_collection_recall_target"] == [({"collection": 'a "quoted" name'}, 0.97)]


def test_values_have_the_units_of_their_names() -> None:
    with Scraped(STATUS) as url:
        shown = scrape(url)
    assert [value for _, value in shown["shoal_replica_staleness_seconds"]] == [1.5]
    assert [value for _, value in shown["shoal_status_age_seconds"]] == [0.25]
    assert [value for _, value in shown["shoal_replica_lag_operations"]] == [4]
    assert [value for _, value in shown["shoal_replica_ready"]] == [0]


def test_a_scrape_without_a_status_fails_and_the_next_one_is_answered() -> None:
    with (
        Scraped(TimeoutError("the controller is busy")) as url,
        pytest.raises((urllib.error.HTTPError, ConnectionError)),
    ):
        scrape(url)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"127.0.0.1:{port}"):
            serve_metrics("127.0.0.1", port, lambda: STATUS)


def test_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text() == metrics_reference(), (
        "run: python -m shoal_cluster.cli.metrics_reference"
    )
