"""The SDK over fast lanes against the real edge: FL-1 to FL-4 of docs/design/fast-lane.md."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from shoal import lanes as sdk_lanes
from shoal_cluster.domain.errors import KINDS, Conflict
from shoal_cluster.edge import fast_lane
from shoal_cluster.edge.server import Services, start_server
from shoal_cluster.edge.tickets import LIFETIME_MS, Tickets
from tests.unit.edge.loopback import CountingIds, Loopback, loopback, run
from tests.unit.edge.test_server import Scripted
from tests.unit.query.fake_cluster import a_schema

VECTOR = np.ones(4, np.float32)


class Wiretap:
    """Counts what passes over lanes and over gRPC, and can break lanes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over_lanes: list[str] = []
        self.break_before: list[str] = []
        self.break_after: list[str] = []
        self.unanswered: set[str] = set()
        handlers = fast_lane.lane_handlers

        def tap_all(methods: Any, clock: Any) -> Any:
            return handlers(
                {path: self._tap(path, serve) for path, serve in methods.items()}, clock
            )

        monkeypatch.setattr(fast_lane, "lane_handlers", tap_all)
        self.server: Any = None

    def _tap(self, path: str, serve: Any) -> Any:
        async def tap(raw: Any, context: Any) -> bytes:
            method = path.rpartition("/")[2]
            self.over_lanes.append(method)
            if self.break_before:
                self.break_before.pop()
                self.break_lanes()
            response: bytes = await serve(raw, context)
            if method in self.unanswered:
                await asyncio.Event().wait()
            if self.break_after:
                self.break_after.pop()
                self.break_lanes()
            return response

        return tap

    def break_lanes(self) -> None:
        for link in list(self.server.lanes._listener._links):
            link.abort()


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Wiretap:
    return Wiretap(monkeypatch)


@contextlib.asynccontextmanager
async def served(tap: Wiretap, **services: Any) -> AsyncIterator[Loopback]:
    async with loopback(**services) as at:
        tap.server = at.server
        at.cluster.add_collection(a_schema(shards=2), [["a", "b"], ["b", "a"]])
        yield at


def both(scenario: Callable[["Asked"], Any]) -> Callable[[Wiretap], None]:
    """Runs a scenario with the asyncio client and with the blocking one, in a thread."""

    def test(tap: Wiretap, transport: str = "auto") -> None:
        async def main() -> None:
            async with served(tap) as at:
                async with shoal.AsyncClient(at.server.address, timeout_s=10) as client:
                    await scenario(Asked(at, tap, client=client))
            tap.over_lanes.clear()
            async with served(tap) as at:
                with shoal.Client(at.server.address, timeout_s=10) as client:
                    await scenario(Asked(at, tap, blocking=client))

        run(main())

    return test


class Asked:
    """One of the two clients, with the same calls."""

    def __init__(
        self,
        at: Loopback,
        tap: Wiretap,
        *,
        client: shoal.AsyncClient | None = None,
        blocking: shoal.Client | None = None,
    ) -> None:
        self.at, self.tap, self._client, self._blocking = at, tap, client, blocking

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self._client is not None:
            return await getattr(self._client.collection("docs"), method)(*arguments, **options)
        assert self._blocking is not None
        collection = self._blocking.collection("docs")
        return await asyncio.to_thread(getattr(collection, method), *arguments, **options)

    async def upsert(self, *ids: str) -> Any:
        return await self.call("upsert", ids=list(ids), vectors=np.ones((len(ids), 4), np.float32))


async def writes_and_reads(asked: Asked) -> None:
    await asked.upsert("p1", "p2")
    hits = await asked.call("search", VECTOR, k=2)
    assert sorted(hits.ids) == ["p1", "p2"]
    assert await asked.call("count") == 2
    await asked.call("delete", "p1")
    assert [point.id for point in (await asked.call("get", ["p1", "p2"])).points] == ["p2"]
    assert asked.tap.over_lanes == ["Upsert", "Search", "Count", "Delete", "Get"]


test_calls_travel_over_a_lane = both(writes_and_reads)


async def breaks_before(asked: Asked) -> None:
    await asked.upsert("p1")
    asked.tap.break_before.append("once")
    assert (await asked.call("search", VECTOR, k=2)).ids == ["p1"]
    asked.tap.break_before.append("once")
    assert len((await asked.upsert("p2")).seqs) == 1
    assert await asked.call("count") == 2


test_a_lane_that_breaks_is_no_failure = both(breaks_before)


async def breaks_after(asked: Asked) -> None:
    await asked.upsert("p1")
    writes = len(asked.tap.over_lanes)
    asked.tap.break_after.append("once")
    result = await asked.call(
        "upsert", ids=["p2"], vectors=np.ones((1, 4), np.float32), if_absent=True
    )
    assert len(result.seqs) == 1, "the retry is the same request: it does not meet its own write"
    assert asked.tap.over_lanes[writes:].count("Upsert") >= 1
    assert await asked.call("count") == 2


test_a_write_whose_answer_is_lost_is_applied_once = both(breaks_after)


async def is_not_answered(asked: Asked) -> None:
    await asked.upsert("p1")
    asked.tap.unanswered.update({"Upsert", "Search"})
    with pytest.raises(shoal.Indeterminate) as caught:
        await asked.call("upsert", ids=["p2"], vectors=np.ones((1, 4), np.float32), timeout_s=0.3)
    assert caught.value.outcome == "maybe_applied"
    with pytest.raises(shoal.Unavailable):
        await asked.call("search", VECTOR, k=2, timeout_s=0.3)
    asked.tap.unanswered.clear()
    assert await asked.call("count") == 2, "the client goes on, and the write was applied"


test_a_write_without_an_answer_says_that_it_may_be_applied = both(is_not_answered)


async def sees_errors(asked: Asked) -> None:
    with pytest.raises(shoal.InvalidRequest) as caught:
        await asked.call("search", np.ones(5, np.float32), k=2)
    assert (caught.value.field, caught.value.limit) == ("vectors[0]", "dimension 4")
    assert asked.tap.over_lanes == ["Search"], "refused over the lane, and not asked again"


test_errors_arrive_with_all_their_fields = both(sees_errors)


RETRIED = {"overloaded", "unavailable", "not_primary", "indeterminate"}


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_a_read_that_was_ended_without_a_result_did_nothing(tap: Wiretap, transport: Any) -> None:
    async def scenario() -> None:
        error = KINDS["indeterminate"]("it was cancelled while it was served")
        async with loopback(searching=Scripted(error)) as at:
            async with shoal.AsyncClient(
                at.server.address, timeout_s=0.3, transport=transport
            ) as client:
                with pytest.raises(shoal.Unavailable) as caught:
                    await client.collection("docs").search(VECTOR, k=1)
                assert caught.value.outcome == "not_applied"

    run(scenario())


@pytest.mark.parametrize("kind", sorted(set(KINDS) - RETRIED))
def test_every_kind_of_error_is_the_same_over_both(tap: Wiretap, kind: str) -> None:
    async def scenario() -> None:
        error = KINDS[kind]("the süß message", field="a[3]", limit="1 to 2", retry_after_ms=7)
        async with loopback(searching=Scripted(error)) as at:
            seen = []
            for transport in ("auto", "grpc"):
                async with shoal.AsyncClient(at.server.address, transport=transport) as client:
                    with pytest.raises(shoal.ShoalError) as caught:
                        await client.collection("docs").search(VECTOR, k=1)
                    seen.append((type(caught.value), vars(caught.value)))
            assert seen[0] == seen[1]
            assert tap.over_lanes

    run(scenario())


def test_a_bug_is_internal_with_an_incident_and_the_lane_goes_on(tap: Wiretap) -> None:
    async def scenario() -> None:
        async with served(tap, searching=Scripted(ZeroDivisionError("secret"))) as at:
            async with shoal.AsyncClient(at.server.address) as client:
                for _ in range(2):
                    with pytest.raises(shoal.Internal, match="incident 0000") as caught:
                        await client.collection("docs").search(VECTOR, k=1)
                    assert "secret" not in caught.value.message
        assert tap.over_lanes == ["Search", "Search"]

    run(scenario())


def test_an_answer_that_fits_no_frame_comes_over_grpc(
    tap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with served(tap) as at:
            async with shoal.AsyncClient(at.server.address) as client:
                docs = client.collection("docs")
                await docs.upsert(ids=["p1"], vectors=VECTOR[np.newaxis])
                monkeypatch.setattr(fast_lane, "REPLY_BYTES_MAX", 10)
                assert (await docs.search(VECTOR, k=1)).ids == ["p1"]
        assert tap.over_lanes == ["Upsert", "Search"]

    run(scenario())


def test_admission_counts_calls_of_both_transports(tap: Wiretap) -> None:
    async def scenario() -> None:
        from shoal_cluster.edge.admission import Admission

        scripted = Scripted()
        admission = Admission(requests_max=1)
        async with loopback(admission=admission, searching=scripted) as at:
            async with (
                shoal.AsyncClient(at.server.address, timeout_s=20) as over_lane,
                shoal.AsyncClient(at.server.address, timeout_s=0.3, transport="grpc") as over_grpc,
            ):
                # Ask for the ticket first: it is a request as well.
                with contextlib.suppress(shoal.ShoalError):
                    await over_lane.collection("docs").count()
                waiting = asyncio.ensure_future(over_lane.collection("docs").search(VECTOR, k=1))
                await asyncio.wait_for(scripted.entered.wait(), 5)
                assert admission.requests == 1
                with pytest.raises(shoal.Overloaded):
                    await over_grpc.collection("docs").count()
                waiting.cancel()
                await asyncio.wait([waiting])
                async with asyncio.timeout(5):
                    while admission.requests:
                        await asyncio.sleep(0.001)
                assert scripted.cancelled, "cancelling the call cancels the work"

    run(scenario())


def test_a_deadline_travels_over_a_lane(tap: Wiretap) -> None:
    async def scenario() -> None:
        scripted = Scripted()
        async with loopback(searching=scripted) as at:
            async with shoal.AsyncClient(at.server.address, timeout_s=0.3) as client:
                with pytest.raises(shoal.Unavailable):
                    await client.collection("docs").search(VECTOR, k=1)
        assert scripted.timeouts_s and all(0 < given <= 0.3 for given in scripted.timeouts_s)

    run(scenario())


def test_without_lanes_everything_goes_over_grpc(
    tap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port is blocked: connecting to it goes unanswered until the SDK gives up."""

    async def scenario() -> None:
        async with served(tap) as at:
            opened: list[float] = []

            def blocked(*_: Any, **__: Any) -> Any:
                opened.append(1)
                raise TimeoutError("blocked")

            monkeypatch.setattr(sdk_lanes.socket, "create_connection", blocked)
            with shoal.Client(at.server.address, timeout_s=10) as client:
                docs = client.collection("docs")
                await asyncio.to_thread(docs.upsert, ids=["p1"], vectors=VECTOR[np.newaxis])
                for _ in range(5):
                    assert (await asyncio.to_thread(docs.search, VECTOR, k=1)).ids == ["p1"]
        assert len(opened) == 1, "not tried again for a while"
        assert tap.over_lanes == []

    run(scenario())


def test_transport_grpc_opens_no_lane(tap: Wiretap) -> None:
    async def scenario() -> None:
        async with served(tap) as at:
            async with shoal.AsyncClient(at.server.address, transport="grpc") as client:
                await client.collection("docs").count()
            with pytest.raises(shoal.InvalidRequest, match="transport 'fast' is not known"):
                shoal.Client(at.server.address, transport="fast")  # type: ignore[arg-type]
        assert tap.over_lanes == []

    run(scenario())


def test_a_unix_socket_is_used_when_it_is_there(tap: Wiretap, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with loopback() as at:
            services = Services(
                control=at.control,
                searching=Scripted(Conflict("here")),
                reading=None,  # type: ignore[arg-type]
                exploring=None,  # type: ignore[arg-type]
                writing=None,  # type: ignore[arg-type]
                loading=None,  # type: ignore[arg-type]
                status=at.control,
            )
            path = tmp_path / "lanes"
            server = await start_server(
                "127.0.0.1:0", services, ids=CountingIds(), lane_socket=str(path)
            )
            server.lanes._listener  # noqa: B018  the port must not be what is used:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(sdk_lanes.socket, "create_connection", None)
                with shoal.Client(server.address) as client:
                    with pytest.raises(shoal.Conflict, match="here"):
                        await asyncio.to_thread(client.collection("docs").search, VECTOR, k=1)
            assert tap.over_lanes == ["Search"]
            await server.close(drain_s=0)
            assert not path.exists()

    run(scenario())


def test_threads_have_a_connection_each_and_the_rest_goes_over_grpc(
    tap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(sdk_lanes, "LANES_MAX", 2)
        async with served(tap) as at:
            with shoal.Client(at.server.address, timeout_s=10) as client:
                docs = client.collection("docs")
                await asyncio.to_thread(docs.upsert, ids=["p1"], vectors=VECTOR[np.newaxis])
                start = threading.Barrier(6)

                def ask() -> list[str]:
                    start.wait(10)
                    return list(docs.search(VECTOR, k=1).ids)

                answers = await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(6)))
                assert answers == [["p1"]] * 6
                assert at.server.lanes.open_lanes <= 2

    run(scenario())


class SteppedClock:
    now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s


def test_a_ticket_opens_lanes_until_it_expires_and_no_other_name_does() -> None:
    clock = SteppedClock()
    tickets = Tickets(clock, CountingIds())  # type: ignore[arg-type]
    ticket = tickets.issue()
    assert tickets.secret_of(ticket.name) == ticket.secret
    expiry, _, nonce = ticket.name.partition(".")
    longer = f"{int(expiry, 16) + 1:x}.{nonce}"
    assert tickets.secret_of(longer) != ticket.secret, "a stretched ticket has another secret"
    for name in ("", ".", "server-0", f"{expiry}.", f".{nonce}", "zz.aa"):
        assert tickets.secret_of(name) is None
    clock.now_s += LIFETIME_MS / 1000 + 0.002
    assert tickets.secret_of(ticket.name) is None


def test_the_secrets_of_two_coordinators_differ() -> None:
    ids = CountingIds()
    one, two = Tickets(SteppedClock(), ids), Tickets(SteppedClock(), ids)  # type: ignore[arg-type]
    ticket = one.issue()
    assert two.secret_of(ticket.name) != ticket.secret
