"""Makes each kind of store, as two handles to one empty bucket."""

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from shoal_cluster.bucket.faults import FaultStore
from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.object_store import ObjectStore
from shoal_cluster.bucket.store import Store
from tests.contract.fakes import VirtualClock

STORES = ("local", "memory", "fault_without_faults", "s3")
_prefix_numbers = count()


@pytest.fixture(scope="session")
def aws_environment() -> Iterator[None]:
    """Credentials for servers on loopback that check none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield


@pytest.fixture(scope="session")
def moto_url(aws_environment: None) -> Iterator[str]:
    """URL options of an S3 server on loopback that has the bucket `shoal-test`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="shoal-test")
    client.close()
    yield f"?endpoint={endpoint}&allow_http=true&region=us-east-1"
    server.stop()


@pytest.fixture(params=STORES)
def handles(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Store]:
    """Two handles to one empty bucket."""
    kind = request.param
    if kind == "local":
        return LocalStore(tmp_path / "bucket"), LocalStore(tmp_path / "bucket")
    if kind == "s3":
        options = request.getfixturevalue("moto_url")
        url = f"s3://shoal-test/run/{next(_prefix_numbers)}{options}"
        return ObjectStore.from_url(url), ObjectStore.from_url(url)
    objects: dict[str, bytes] = {}
    if kind == "memory":
        return MemoryStore(objects), MemoryStore(objects)
    first, second = (
        FaultStore(MemoryStore(objects), rng=random.Random(seed), clock=VirtualClock())
        for seed in (1, 2)
    )
    return first, second


@pytest.fixture
def store(handles: tuple[Store, Store]) -> Store:
    return handles[0]
