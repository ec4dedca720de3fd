"""Searches are sampled where they are answered, and `describe` shows what they reached."""

import numpy as np

import shoal
from chaos.cluster import wait_until
from shoal import F

DIMENSION = 16


def test_describe_shows_the_recall_that_searches_reach(client: shoal.Client) -> None:
    made = client.create_collection(
        "sampled",
        dimension=DIMENSION,
        attributes={"color": "keyword"},
        shards=2,
        recall_sample_share=1.0,
    )
    vectors = np.random.default_rng(1).standard_normal((300, DIMENSION)).astype(np.float32)
    colors = [{"color": ("red", "green")[row % 2]} for row in range(300)]
    made.upsert(ids=[f"p{row}" for row in range(300)], vectors=vectors, attributes=colors)
    assert client.describe_collection("sampled").recall == ()

    def estimates() -> dict[str, shoal.RecallEstimate] | None:
        for query in vectors[:5]:
            made.search(query)
            made.search(query, filter=F("color") == "red")
        found = {each.filter_class: each for each in made.describe().recall}
        return found if {"none", "wide"} <= found.keys() else None

    seen = wait_until(estimates, timeout_s=30, what="both kinds of searches were sampled")
    for each in seen.values():
        assert each.samples > 0 and each.low < each.recall == each.high == 1.0
    assert {each.filter_class for each in client.status("sampled").collections[0].recall}

    altered = client.alter_collection("sampled", recall_sample_share=0.0)
    assert altered.recall_sample_share == 0.0
    client.drop_collection("sampled")
