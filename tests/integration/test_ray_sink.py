"""The Ray Data sink on a real cluster: tasks that stage side by side, and one decision."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

import shoal
from shoal.ray import Datasink
from shoal_cluster import bootstrap
from shoal_cluster.bootstrap import RunningCluster

DIMENSION = 8
ROWS = 100


def block(first: int, dimension: int = DIMENSION) -> pa.Table:
    """Row i is i everywhere."""
    rows = np.arange(first, first + ROWS, dtype=np.float32)
    vectors = np.repeat(rows[:, np.newaxis], dimension, axis=1)
    return pa.table(
        {
            "id": [f"p{row:.0f}" for row in rows],
            "vector": pa.FixedShapeTensorArray.from_numpy_ndarray(vectors),
            "half": pa.array([int(row) // 50 for row in rows]),
            "payload": [f'{{"row": {row:.0f}}}' for row in rows],
        }
    )


@pytest.fixture
def ray_of_the_cluster(cluster: RunningCluster) -> Iterator[None]:
    """Tasks run where the cluster does; by itself Ray Data would start a Ray of its own."""
    bootstrap._connect_ray(cluster)
    yield
    # Actors of Ray Data's own outlive its driver; a Ray that stops waits half a minute for them.
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] != cluster.namespace:
            ray.kill(ray.get_actor(**actor))
    ray.shutdown()


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("ray_of_the_cluster")
def test_tasks_of_a_dataset_are_seen_together_and_a_failing_one_leaves_nothing(
    cluster: RunningCluster, client: shoal.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = client.create_collection(
        "from-ray", dimension=DIMENSION, shards=2, metric="l2", attributes={"half": "int"}
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    staged: list[list[str]] = []
    complete = Datasink.on_write_complete

    def counted(sink: Datasink, result: Any) -> None:
        staged.extend(result.write_returns)
        assert collection.count(consistency="strong") == 0, "staged rows are seen by nobody"
        complete(sink, result)

    monkeypatch.setattr(Datasink, "on_write_complete", counted)
    sink = Datasink(cluster.grpc_address, "from-ray", load_id="whole")
    ray.data.from_arrow([block(0), block(ROWS)]).write_datasink(sink)

    assert len(staged) == 2 and all(staged), "two tasks, with chunks of their own"
    assert sink.rows == collection.count(consistency="strong") == 2 * ROWS
    hit = collection.search([150.0] * DIMENSION, k=1, filter=shoal.F("half") == 3).hits[0]
    assert hit.id == "p150"
    (point,) = collection.get("p150")
    assert point.payload == {"row": 150}

    broken = Datasink(cluster.grpc_address, "from-ray", load_id="broken")
    with pytest.raises(shoal.InvalidRequest, match="dimension"):
        ray.data.from_arrow([block(2 * ROWS), block(3 * ROWS, DIMENSION + 1)]).write_datasink(
            broken
        )

    assert collection.count(consistency="strong") == 2 * ROWS
    with pytest.raises(shoal.Conflict, match="aborted"):
        client.load("from-ray", np.zeros((1, DIMENSION)), load_id="broken")
    client.drop_collection("from-ray")
