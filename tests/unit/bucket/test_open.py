"""A directory or URL opens the store it names, or says what is wrong with it."""

import asyncio
from pathlib import Path

import pytest

from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.object_store import ObjectStore
from shoal_cluster.bucket.open import open_store
from shoal_cluster.domain.errors import InvalidRequest


def test_path_and_file_url_open_the_same_directory(tmp_path: Path) -> None:
    place = tmp_path / "a bucket" / "inner"
    by_path = open_store(str(place))
    by_url = open_store(f"file://{str(place).replace(' ', '%20')}")
    assert isinstance(by_path, LocalStore) and isinstance(by_url, LocalStore)
    assert by_path.root == by_url.root == place
    assert place.is_dir()


def test_memory_url_opens_a_bucket_of_its_own() -> None:
    first, second = open_store("memory://"), open_store("memory://")
    assert isinstance(first, MemoryStore)
    asyncio.run(first.create("k", b"x"))
    assert asyncio.run(second.get("k")) is None


@pytest.mark.parametrize(
    "url", ["s3://bucket/prefix?region=eu-west-1", "gs://bucket/p", "az://c/p"]
)
def test_cloud_urls_open_object_stores(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    store = open_store(url)
    assert isinstance(store, ObjectStore)
    assert "?" not in store.url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty"),
        ("ftp://host/x", "scheme 'ftp'"),
        ("s3://", "s3://bucket"),
        ("file://elsewhere/x", "file:///"),
        ("s3://bucket?secret_access_key=x", "unknown option 'secret_access_key'"),
    ],
)
def test_bad_bucket_is_refused_naming_the_field(url: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        open_store(url)
    assert refused.value.field == "bucket"
