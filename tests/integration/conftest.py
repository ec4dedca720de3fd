"""One cluster for all tests that do not break it."""

from collections.abc import Iterator

import pytest

import shoal
from chaos import cluster as clusters
from shoal_cluster.bootstrap import RunningCluster


@pytest.fixture(scope="session")
def metrics_port() -> int:
    return clusters.free_port()


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, metrics_port: int
) -> Iterator[RunningCluster]:
    with clusters.running(tmp_path_factory.mktemp("cluster"), metrics_port=metrics_port) as running:
        yield running


@pytest.fixture(scope="session")
def metrics_url(cluster: RunningCluster, metrics_port: int) -> str:
    return f"http://127.0.0.1:{metrics_port}/metrics"


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[shoal.Client]:
    with shoal.Client(cluster.grpc_address, timeout_s=60.0) as connected:
        yield connected
