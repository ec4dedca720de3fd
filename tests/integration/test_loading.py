"""A bulk load over sockets into a real cluster: SDK, command line, and going on after a break."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import shoal
from chaos.cluster import wait_until
from shoal.load_sources import rows_a_chunk
from shoal_cluster.bootstrap import RunningCluster
from shoal_cluster.cli.load import load_id_of
from shoal_cluster.cli.main import cli

DIMENSION = 1024
ROWS = 2 * rows_a_chunk(DIMENSION) + 100


class Interrupted(Exception):
    pass


@pytest.mark.timeout(180)
def test_a_load_is_interrupted_resumed_found_and_loaded_once(
    cluster: RunningCluster, client: shoal.Client, tmp_path: Path
) -> None:
    collection = client.create_collection(
        "loaded", dimension=DIMENSION, shards=2, metric="l2", recall_target=0.9
    )
    vectors = np.random.default_rng(3).standard_normal((ROWS, DIMENSION), dtype=np.float32)
    file = tmp_path / "vectors.npy"
    np.save(file, vectors)
    collection.upsert(ids=["5", "other"], vectors=np.zeros((2, DIMENSION), dtype=np.float32))
    name = load_id_of("loaded", file)

    def break_off(progress: shoal.LoadProgress) -> None:
        if progress.rows_staged:
            raise Interrupted

    with pytest.raises(Interrupted):
        client.load("loaded", file, load_id=name, progress=break_off)
    assert collection.count() == 2, "staged rows are seen by nobody"

    def run(*arguments: str) -> dict[str, object]:
        given = ["load", "loaded", str(file), "--address", cluster.grpc_address, "--json"]
        result = CliRunner().invoke(cli, [*given, *arguments])
        assert result.exit_code == 0, result.output
        found: dict[str, object] = json.loads(result.stdout)
        return found

    resumed = run()
    assert resumed["rows"] == ROWS and resumed["load_id"] == name
    assert resumed["rows_skipped"], "what was staged before the break was not sent again"
    assert collection.count(consistency="strong") == ROWS + 1
    assert collection.search(vectors[5], k=1).ids == ["5"], "the older point is replaced"
    hits = collection.search(vectors[ROWS - 1], k=1, exact=True)
    assert hits.ids == [str(ROWS - 1)]
    wait_until(
        lambda: all(
            shard.segments and not shard.memtable_rows
            for shard in client.status("loaded").collections[0].shards
        ),
        timeout_s=30,
        what="every row is in a segment",
    )
    collection.delete("7")
    assert run()["rows"] == ROWS
    assert collection.count() == ROWS, "committed once: what was deleted since stays deleted"
    with pytest.raises(shoal.Conflict, match="decided"):
        client.abort_load("loaded", name)
    client.drop_collection("loaded")
