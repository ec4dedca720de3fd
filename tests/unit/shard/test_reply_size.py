"""What a shard answers fits a frame, however large its rows are."""

from pathlib import Path

import numpy as np
import pytest

from shoal_cluster.domain.errors import InvalidRequest, Outcome
from shoal_cluster.domain.limits import FRAME_BYTES_MAX, SHARD_PAGE_BYTES_MAX
from shoal_cluster.domain.observation import ReplicaState
from shoal_cluster.shard.calls import (
    GetCall,
    RowsReply,
    ScrollCall,
    SearchCall,
    SearchReply,
    WriteCall,
    WriteKind,
)
from shoal_cluster.shard.host import ShardHost, require_ids_fit
from shoal_protos.frames import FrameType, encode_frame
from tests.unit.shard.nodes import DIMENSION, SCHEMA, SHARD, Shard, run, tail, vector, write
from tests.unit.shard.test_host import NAME, opened

LARGE = 250_000
NAMES = [f"p{i:03}".encode() for i in range(130)]
WHERE = {"collection": SCHEMA.id, "shard": SHARD}


async def with_large_rows(tmp_path: Path, names: list[bytes] = NAMES) -> ShardHost:
    """One segment and one memtable of rows of 250 kB."""
    host = await opened(await Shard(tmp_path).create())
    await host.promote(NAME)
    for no, start in enumerate(range(0, len(names), 26), start=1):
        some = names[start : start + 26]
        await write(
            host,
            WriteCall(
                **WHERE,
                client_id="client",
                request_no=no,
                kind=WriteKind.UPSERT,
                ids=some,
                tails=[tail(size=start + i, payload=b"x" * LARGE) for i in range(len(some))],
                body=np.ones((len(some), DIMENSION), np.float32).tobytes(),
            ),
        )
    return host


def fits(reply: RowsReply | SearchReply, body: bytes) -> bool:
    return len(encode_frame(FrameType.REPLY, 1, reply.to_wire(), body)) > 0


def test_a_scroll_page_ends_where_it_would_be_too_large_and_goes_on_there(tmp_path):
    async def scenario():
        host = await with_large_rows(tmp_path)
        found: list[bytes] = []
        pages = 0
        while True:
            after = found[-1] if found else b""
            page, body = await host.scroll(ScrollCall(**WHERE, after=after, limit=1000))
            page = RowsReply.from_wire(page.to_wire(), body)
            assert fits(page, body)
            if not page.ids:
                break
            assert len(body) <= SHARD_PAGE_BYTES_MAX
            assert page.tails == [
                tail(size=len(found) + i, payload=b"x" * LARGE) for i in range(len(page.ids))
            ]
            assert page.cut == (len(found) + len(page.ids) < len(NAMES))
            found += page.ids
            pages += 1
        assert found == NAMES
        assert pages == -(-len(NAMES) // (SHARD_PAGE_BYTES_MAX // (LARGE + 40)))
        await host.close_all()

    run(scenario())


def test_a_page_has_one_row_at_least(tmp_path, monkeypatch):
    async def scenario():
        host = await with_large_rows(tmp_path, NAMES[:3])
        monkeypatch.setattr("shoal_cluster.shard.host.SHARD_PAGE_BYTES_MAX", 1)
        for options in ({}, {"with_vector": True}, {"with_vector": True, "with_tails": False}):
            call = ScrollCall(**WHERE, after=b"", limit=9, **options)
            page, _ = await host.scroll(ScrollCall.from_wire(call.to_wire()))
            assert (page.ids, page.cut) == (NAMES[:1], True)
        await host.close_all()

    run(scenario())


def test_vectors_count_as_well(tmp_path, monkeypatch):
    async def scenario():
        host = await with_large_rows(tmp_path, NAMES[:9])
        monkeypatch.setattr("shoal_cluster.shard.host.SHARD_PAGE_BYTES_MAX", 4 * DIMENSION * 4)
        call = ScrollCall(**WHERE, after=b"", limit=9, with_vector=True, with_tails=False)
        page, body = await host.scroll(call)
        assert (page.ids, page.tails, len(body)) == (NAMES[:4], None, 4 * DIMENSION * 4)
        await host.close_all()

    run(scenario())


def test_a_get_says_where_it_was_cut_and_needs_no_cut_without_tails(tmp_path):
    async def scenario():
        host = await with_large_rows(tmp_path)
        got, body = await host.get(GetCall(**WHERE, ids=NAMES))
        assert fits(got, body) and got.cut and len(body) <= SHARD_PAGE_BYTES_MAX
        assert got.ids == NAMES[: len(got.ids)]
        call = GetCall(**WHERE, ids=NAMES, with_tails=False)
        got, body = await host.get(GetCall.from_wire(call.to_wire()))
        got = RowsReply.from_wire(got.to_wire(), body)
        assert (got.ids, got.tails, got.cut, body) == (NAMES, None, False, b"")
        await host.close_all()

    run(scenario())


def test_a_search_gives_what_fits_a_frame_and_refuses_more_naming_the_limit(tmp_path):
    async def scenario():
        host = await with_large_rows(tmp_path)
        assert host.reports()[0].state is ReplicaState.READY
        query = vector(1).tobytes()
        call = SearchCall(**WHERE, k=100, with_payload=True, with_vector=True)
        found, body = await host.search(call, query)
        assert fits(found, body) and len(body) < FRAME_BYTES_MAX
        assert len(SearchReply.from_wire(found.to_wire(), body).tails or ()) == 100
        with pytest.raises(InvalidRequest, match="ask for fewer hits") as refused:
            await host.search(SearchCall(**WHERE, k=130, with_payload=True), query)
        assert refused.value.field == "with_payload"
        assert refused.value.limit is not None and "bytes" in refused.value.limit
        assert refused.value.outcome is Outcome.NOT_APPLIED
        found, body = await host.search(SearchCall(**WHERE, k=130), query)
        assert (len(found.ids), body) == (130, b"")
        await host.close_all()

    run(scenario())


def test_ids_of_all_hits_fit_the_header_or_are_refused():
    require_ids_fit([b"x" * 40] * 256_000)
    with pytest.raises(InvalidRequest, match="fewer hits") as refused:
        require_ids_fit([b"x" * 60] * 256_000)
    assert refused.value.field == "k"
