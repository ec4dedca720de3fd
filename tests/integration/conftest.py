"""One cluster for all tests that do not break it."""

from collections.abc import Iterator

import pytest

import shoal
from chaos import cluster as clusters
from shoal_cluster.bootstrap import RunningCluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with clusters.running(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[shoal.Client]:
    with shoal.Client(cluster.grpc_address, timeout_s=60.0) as connected:
        yield connected
