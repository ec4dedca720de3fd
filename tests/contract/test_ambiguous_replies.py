"""What obstore says when S3 misbehaves on a put, and that `create` finds the truth every time."""

import asyncio
from collections.abc import Iterator

import pytest

from shoal_cluster.bucket.create import create
from shoal_cluster.bucket.envelope import EnvelopeKind, encode, put_id_of
from shoal_cluster.bucket.object_store import ObjectStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Indeterminate, PermissionDenied, Unavailable
from tests.contract.misbehaving_s3 import MisbehavingS3, Misbehaviour, misbehaving_s3

OURS, THEIRS = b"o" * 16, b"t" * 16
BODY = encode(EnvelopeKind.WAL, {"put_id": OURS}, b"rows")
RIVAL = encode(EnvelopeKind.WAL, {"put_id": THEIRS}, b"other rows")
CREATE_TIMEOUT_S = 0.3
STORED_WITHOUT_REPLY = (
    Misbehaviour.APPLY_THEN_500,
    Misbehaviour.APPLY_THEN_DROP,
    Misbehaviour.APPLY_THEN_STALL,
)
NOT_STORED = (Misbehaviour.CONFLICT_NOT_STORED, Misbehaviour.DROP, Misbehaviour.THROTTLE)


@pytest.fixture
def server(aws_environment: None) -> Iterator[MisbehavingS3]:
    with misbehaving_s3() as server:
        server.rival = RIVAL
        yield server


def open_store(server: MisbehavingS3) -> ObjectStore:
    return ObjectStore.from_url(server.url, create_timeout_s=CREATE_TIMEOUT_S)


async def create_ours(store: ObjectStore, *, patience_s: float = 10.0) -> bytes | None:
    clock = SystemClock()
    return await create(
        store,
        "wal/1",
        BODY,
        put_id=OURS,
        read_put_id=put_id_of,
        clock=clock,
        deadline_s=clock.monotonic_s() + patience_s,
    )


@pytest.mark.parametrize("how", STORED_WITHOUT_REPLY)
def test_put_applied_without_a_clear_reply_is_found_to_be_ours(
    server: MisbehavingS3, how: Misbehaviour
) -> None:
    server.misbehaviours = [how]
    assert asyncio.run(create_ours(open_store(server))) is None
    assert list(server.objects.values()) == [BODY]
    assert server.puts == 1


@pytest.mark.parametrize("how", NOT_STORED)
def test_put_that_was_not_stored_is_put_again(server: MisbehavingS3, how: Misbehaviour) -> None:
    server.misbehaviours = [how]
    assert asyncio.run(create_ours(open_store(server))) is None
    assert list(server.objects.values()) == [BODY]
    assert server.puts == 2


def test_put_that_a_rival_overtook_returns_the_rivals_body(server: MisbehavingS3) -> None:
    server.misbehaviours = [Misbehaviour.RIVAL_THEN_CONFLICT]
    assert asyncio.run(create_ours(open_store(server))) == RIVAL
    assert list(server.objects.values()) == [RIVAL]


@pytest.mark.parametrize("how", [*STORED_WITHOUT_REPLY, *NOT_STORED])
def test_single_attempt_is_unresolved_and_sends_one_put(
    server: MisbehavingS3, how: Misbehaviour
) -> None:
    """A retry inside the client would turn our own success into "exists"."""
    server.misbehaviours = [how]
    outcome = asyncio.run(open_store(server).create("wal/1", BODY))
    assert outcome is PutOutcome.UNRESOLVED
    assert server.puts == 1


def test_many_bad_answers_in_a_row_are_resolved(server: MisbehavingS3) -> None:
    server.misbehaviours = [*NOT_STORED, Misbehaviour.APPLY_THEN_DROP]
    assert asyncio.run(create_ours(open_store(server))) is None
    assert list(server.objects.values()) == [BODY]


def test_refused_credentials_are_a_refusal_and_not_a_doubt(server: MisbehavingS3) -> None:
    server.misbehaviours = [Misbehaviour.FORBID]
    with pytest.raises(PermissionDenied, match="credentials"):
        asyncio.run(create_ours(open_store(server)))
    assert server.objects == {}


def test_refusal_after_a_doubt_stays_a_doubt_until_read_back(server: MisbehavingS3) -> None:
    server.misbehaviours = [Misbehaviour.DROP, Misbehaviour.FORBID]
    assert asyncio.run(create_ours(open_store(server))) is None
    assert server.puts == 3


def test_put_never_stored_is_indeterminate_at_the_deadline(server: MisbehavingS3) -> None:
    server.misbehaviours = [Misbehaviour.THROTTLE] * 100
    with pytest.raises(Indeterminate, match="wal/1"):
        asyncio.run(create_ours(open_store(server), patience_s=0.2))


def test_absent_bucket_is_unavailable_and_no_absent_key(moto_url: str) -> None:
    """A 404 for the bucket taken for a 404 of the key would pass for an empty WAL."""
    store = ObjectStore.from_url("s3://no-such-bucket/prefix" + moto_url)

    async def test() -> None:
        for call in (
            store.create("a", b"x"),
            store.get("a"),
            store.get_range("a", 0, 1),
            store.list("a/"),
            store.delete("a"),
        ):
            with pytest.raises(Unavailable, match=r"bucket|NoSuchBucket"):
                await call

    asyncio.run(test())
