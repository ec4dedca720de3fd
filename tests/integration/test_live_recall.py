"""Searches are sampled where they are answered, and `describe` shows what they reached."""

import urllib.request

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

import shoal
from chaos.cluster import wait_until
from shoal import F

DIMENSION = 16


def test_describe_shows_the_recall_that_searches_reach(
    client: shoal.Client, metrics_url: str
) -> None:
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

    shown = gauges(metrics_url)
    for each in seen.values():
        labels = (("collection", "sampled"), ("filter_class", each.filter_class))
        assert shown["shoal_live_recall", labels] == 1.0
        assert 0.0 < shown["shoal_live_recall_low", labels] < 1.0
        assert shown["shoal_live_recall_samples", labels] >= each.samples
    assert shown["shoal_collection_rows", (("collection", "sampled"),)] == 300

    altered = client.alter_collection("sampled", recall_sample_share=0.0)
    assert altered.recall_sample_share == 0.0
    client.drop_collection("sampled")


def gauges(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Returns what `/metrics` shows, by name and labels in their order."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
