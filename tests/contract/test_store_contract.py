"""What every Store promises, run against every store there is."""

import asyncio
import hashlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from shoal_cluster.bucket.conformance import probe
from shoal_cluster.bucket.create import create, create_file_once
from shoal_cluster.bucket.envelope import EnvelopeKind, encode, put_id_of
from shoal_cluster.bucket.store import ObjectEntry, PutOutcome, Store
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import SystemIdGenerator

CREATED, UNRESOLVED = PutOutcome.CREATED, PutOutcome.UNRESOLVED


LONG_KEYS = ("x" * 201, "/".join(["x" * 100] * 9))


def run(*stores: Store, test: Coroutine[Any, Any, None]) -> None:
    async def close_after() -> None:
        try:
            await test
        finally:
            for store in stores:
                await store.close()

    asyncio.run(close_after())


def test_created_object_is_read_back_through_any_handle(handles: tuple[Store, Store]) -> None:
    async def test() -> None:
        first, second = handles
        body = bytes(range(256)) * 50
        assert await first.create("c/1/wal/00000001", body) is CREATED
        assert await first.get("c/1/wal/00000001") == body
        assert await second.get("c/1/wal/00000001") == body

    run(*handles, test=test())


def test_absent_key_reads_as_none(store: Store) -> None:
    async def test() -> None:
        assert await store.get("a/b") is None
        assert await store.get_range("a/b", 0, 10) is None
        assert await store.get_range("a/b", 5, 0) is None

    run(store, test=test())


def test_missed_key_is_seen_as_soon_as_it_is_created(handles: tuple[Store, Store]) -> None:
    async def test() -> None:
        first, second = handles
        for number in range(5):
            key = f"wal/{number}"
            assert await first.get(key) is None
            assert await second.get(key) is None
            assert await first.create(key, b"x") is CREATED
            assert await second.get(key) == b"x"
            assert ObjectEntry(key, 1) in await second.list("wal/")

    run(*handles, test=test())


def test_create_of_existing_key_changes_nothing(handles: tuple[Store, Store]) -> None:
    async def test() -> None:
        first, second = handles
        assert await first.create("a/b", b"first") is CREATED
        assert await first.create("a/b", b"second") is UNRESOLVED
        assert await second.create("a/b", b"first") is UNRESOLVED
        assert await second.get("a/b") == b"first"

    run(*handles, test=test())


def test_empty_and_large_objects_keep_their_bytes(store: Store) -> None:
    async def test() -> None:
        large = hashlib.shake_128(b"large").digest(9 * 1024 * 1024 + 1)
        assert await store.create("empty", b"") is CREATED
        assert await store.create("large", large) is CREATED
        assert await store.get("empty") == b""
        assert await store.get_range("empty", 0, 4) == b""
        assert await store.get("large") == large
        assert await store.get_range("large", 5_000_000, 1_000_000) == large[5_000_000:6_000_000]

    run(store, test=test())


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 10, b"0123456789"),
        (3, 4, b"3456"),
        (8, 100, b"89"),
        (10, 5, b""),
        (99, 1, b""),
        (2, 0, b""),
    ],
)
def test_range_ends_where_the_object_ends(
    store: Store, start: int, length: int, expected: bytes
) -> None:
    async def test() -> None:
        await store.create("a/b", b"0123456789")
        assert await store.get_range("a/b", start, length) == expected

    run(store, test=test())


def test_file_is_created_with_its_contents_once(store: Store, tmp_path: Path) -> None:
    async def test() -> None:
        body = hashlib.shake_128(b"file").digest(5 * 1024 * 1024 + 3)
        path, other = tmp_path / "segment", tmp_path / "other"
        path.write_bytes(body)
        other.write_bytes(b"")
        assert await store.create_file("seg/1/vectors", path) is CREATED
        assert await store.create_file("seg/1/vectors", other) is UNRESOLVED
        assert await store.create_file("seg/1/empty", other) is CREATED
        assert await store.get("seg/1/vectors") == body
        assert await store.get("seg/1/empty") == b""

    run(store, test=test())


def test_create_file_once_takes_its_own_object_for_success(store: Store, tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "segment"
        path.write_bytes(b"vectors" * 1000)
        for _ in range(2):
            await create_file_once(
                store,
                "seg/1/vectors",
                path,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                size_bytes=7000,
                clock=SystemClock(),
                deadline_s=None,
            )
        assert await store.get("seg/1/vectors") == path.read_bytes()

    run(store, test=test())


def test_listing_shows_exactly_what_is_under_the_prefix(handles: tuple[Store, Store]) -> None:
    async def test() -> None:
        first, second = handles
        keys = ["a/b/1", "a/b/2", "a/b/c/3", "a/bc/4", "z"]
        for size, key in enumerate(keys):
            await first.create(key, b"x" * size)
        for store in handles:
            assert sorted(await store.list("a/b/"), key=lambda entry: entry.key) == [
                ObjectEntry("a/b/1", 0),
                ObjectEntry("a/b/2", 1),
                ObjectEntry("a/b/c/3", 2),
            ]
            assert sorted(entry.key for entry in await store.list("")) == keys
        assert await second.list("absent/") == []

    run(*handles, test=test())


@pytest.mark.slow
def test_listing_is_complete_over_several_pages(store: Store) -> None:
    async def test() -> None:
        keys = [f"wal/{number:020}" for number in range(1010)]
        for start in range(0, len(keys), 16):
            await asyncio.gather(*(store.create(key, b"x") for key in keys[start : start + 16]))
        assert sorted(entry.key for entry in await store.list("wal/")) == keys

    run(store, test=test())


def test_deleted_object_is_gone_and_deleting_again_is_no_error(
    handles: tuple[Store, Store],
) -> None:
    async def test() -> None:
        first, second = handles
        await first.create("a/b", b"x")
        await first.create("a/c", b"y")
        await first.delete("a/b")
        await first.delete("a/b")
        await second.delete("never/was")
        assert await second.get("a/b") is None
        assert await second.list("a/") == [ObjectEntry("a/c", 1)]

    run(*handles, test=test())


@pytest.mark.parametrize(
    "key",
    [
        *LONG_KEYS,
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/.tmp-1",
        "a b",
        "ä",
        "a\0",
        "a\\b",
    ],
)
def test_key_that_some_store_would_bend_is_refused(store: Store, key: str) -> None:
    async def test() -> None:
        for call in (
            store.create(key, b"x"),
            store.get(key),
            store.get_range(key, 0, 1),
            store.delete(key),
        ):
            with pytest.raises(InvalidRequest, match=r"key|limit"):
                await call
        with pytest.raises(InvalidRequest):
            await store.list(key + "x")

    run(store, test=test())


def test_local_path_when_given_holds_the_bytes(store: Store) -> None:
    async def test() -> None:
        await store.create("a/b", b"mapped")
        path = store.local_path("a/b")
        assert path is None or path.read_bytes() == b"mapped"

    run(store, test=test())


def test_make_durable_accepts_any_prefix(store: Store) -> None:
    async def test() -> None:
        await store.create("a/b/c", b"x")
        for prefix in ("", "a/", "a/b/", "absent/"):
            await store.make_durable(prefix)
        assert await store.get("a/b/c") == b"x"

    run(store, test=test())


def test_of_racing_creates_exactly_one_wins_and_all_know_it(handles: tuple[Store, Store]) -> None:
    async def put(store: Store, key: str, put_id: bytes) -> bytes | None:
        clock = SystemClock()
        return await create(
            store,
            key,
            encode(EnvelopeKind.PROBE, {"put_id": put_id}),
            put_id=put_id,
            read_put_id=put_id_of,
            clock=clock,
            deadline_s=clock.monotonic_s() + 10.0,
        )

    async def test() -> None:
        ids = SystemIdGenerator()
        for number in range(5):
            put_ids = [ids.put_id() for _ in range(6)]
            key = f"wal/{number}"
            others = await asyncio.gather(
                *(put(handles[at % 2], key, put_id) for at, put_id in enumerate(put_ids))
            )
            stored = await handles[0].get(key)
            assert stored is not None
            winner = put_ids.index(put_id_of(stored))
            assert [other is None for other in others] == [at == winner for at in range(6)]
            assert {other for other in others if other is not None} == {stored}

    run(*handles, test=test())


def test_conformance_probe_accepts_the_store_and_cleans_up(handles: tuple[Store, Store]) -> None:
    async def test() -> None:
        record = await probe(*handles, clock=SystemClock(), ids=SystemIdGenerator(), rounds=3)
        assert record["rounds"] == 3
        assert record["racers"] == 8
        won = record["won"]
        assert isinstance(won, list) and sum(won) == 3
        assert await handles[0].list("probe/") == []

    run(*handles, test=test())
