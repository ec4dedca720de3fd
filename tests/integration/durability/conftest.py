"""What these tests change of the harness is put back, also when a test fails."""

from collections.abc import Iterator

import pytest

from tests.unit.shard import nodes


@pytest.fixture(autouse=True)
def cluster_uuid_of_the_harness() -> Iterator[None]:
    """SmallBucket gives its nodes the identity of its own bucket."""
    uuid = nodes.CLUSTER_UUID
    yield
    nodes.CLUSTER_UUID = uuid
