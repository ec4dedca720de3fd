"""The shell around the services: errors, limits, admission, health, ports."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shoal_cluster.domain.errors import KINDS, Conflict, InvalidRequest, Outcome, Overloaded
from shoal_cluster.edge.admission import Admission
from shoal_cluster.edge.guard import timeout_s
from shoal_cluster.edge.points import decode_upsert
from shoal_cluster.edge.rows_codec import decode_attributes
from shoal_cluster.edge.server import SERVICES, Services, start_server
from shoal_cluster.edge.status import STATUS_OF_KIND
from shoal_protos.v1 import points_pb2, search_pb2, types_pb2
from shoal_protos.v1.search_pb2_grpc import SearchStub
from tests.unit.edge.loopback import CountingIds, detail_of, loopback, run
from tests.unit.query.fake_cluster import a_schema

REQUEST = search_pb2.SearchRequest(
    collection="docs", vectors=np.ones(4, np.float32).tobytes(), dimension=4, k=1
)


CONDITION = points_pb2.UpsertCondition


def upsert_with(conditions: list[Any]) -> points_pb2.UpsertRequest:
    return points_pb2.UpsertRequest(
        collection="docs",
        request_id=types_pb2.RequestId(client_id="client", request_no=1),
        rows=types_pb2.Rows(ids=["a", "b"], vectors=bytes(32), dimension=4),
        conditions=conditions,
    )


STALENESS_MS = 77


class Scripted:
    """A Searching that fails as told, or waits."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.timeouts_s: list[float] = []
        self.cancelled = False

    async def begin(
        self, template: Any, queries: Any, *, timeout_s: float, finish: Callable[[Any], Any]
    ) -> Any:
        self.timeouts_s.append(timeout_s)
        if self.error is not None:
            raise self.error
        self.entered.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return search_pb2.SearchResponse(staleness_ms=STALENESS_MS).SerializeToString()


def test_every_kind_of_error_has_a_status() -> None:
    assert set(STATUS_OF_KIND) == set(KINDS)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_error_travels_with_all_its_fields(kind: str) -> None:
    async def scenario() -> None:
        error = KINDS[kind](
            "the süß message", field="points[3].vector", limit="1 to 2", retry_after_ms=70
        )
        async with loopback(searching=Scripted(error)) as at:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await SearchStub(at.channel).Search(REQUEST)
            assert caught.value.code() is STATUS_OF_KIND[kind]
            assert caught.value.details() == "the süß message"
            detail = detail_of(caught.value)
            assert (detail.kind, detail.message) == (kind, "the süß message")
            assert (detail.field, detail.limit) == ("points[3].vector", "1 to 2")
            assert detail.retry_after_ms == 70
            maybe = error.outcome is Outcome.MAYBE_APPLIED
            assert (detail.outcome == types_pb2.OUTCOME_MAYBE_APPLIED) == maybe

    run(scenario())


@pytest.mark.parametrize("letter", ["x", "é", "𝄞"])
def test_a_very_long_message_still_arrives(letter: str) -> None:
    async def scenario() -> None:
        error = Conflict(letter * 50_000, field=letter * 5000, limit=letter * 5000)
        async with loopback(searching=Scripted(error)) as at:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await SearchStub(at.channel).Search(REQUEST)
            assert caught.value.code() is grpc.StatusCode.ABORTED
            assert detail_of(caught.value).message.endswith("…")
            # gRPC drops at random what lies between its soft limit of 8 KiB and 16 KiB.
            details = (caught.value.details() or "").encode()
            escaped = sum(1 if 32 <= byte < 127 else 3 for byte in details)
            assert escaped + 4 / 3 * detail_of(caught.value).ByteSize() < 8000

    run(scenario())


def test_a_bug_is_internal_with_an_incident_and_the_server_goes_on() -> None:
    async def scenario() -> None:
        scripted = Scripted(ZeroDivisionError("secret"))
        async with loopback(searching=scripted) as at:
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await SearchStub(at.channel).Search(REQUEST)
                assert caught.value.code() is grpc.StatusCode.INTERNAL
                assert "incident 0000" in detail_of(caught.value).message
                assert "secret" not in detail_of(caught.value).message

    run(scenario())


def test_a_message_above_the_limit_is_refused_by_name() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            request = search_pb2.SearchRequest(collection="docs", vectors=bytes(33 << 20))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await SearchStub(at.channel).Search(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert detail_of(caught.value).limit == "33554432 bytes a message"

    run(scenario())


def nested(depth: int) -> types_pb2.Filter:
    filter = types_pb2.Filter(exists=types_pb2.Existence(attribute="section"))
    for _ in range(depth):
        outer = types_pb2.Filter()
        outer.negation.CopyFrom(filter)
        filter = outer
    return filter


def test_garbage_and_deep_filters_are_typed_errors() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            search = at.channel.unary_unary("/shoal.v1.Search/Search")
            for raw, field in [
                (b"\xff\xff\xff\xff", ""),
                (search_pb2.SearchRequest(filter=nested(40)).SerializeToString(), "filter.not"),
                (search_pb2.SearchRequest(filter=types_pb2.Filter()).SerializeToString(), "filter"),
            ]:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await search(raw)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert detail_of(caught.value).field.startswith(field)
            # Deeper than protobuf itself parses. Built by hand: its own encoder refuses as well.
            deep = b""
            for _ in range(150):
                deep = bytes([66]) + _varint(len(deep)) + deep
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await search(bytes([50]) + _varint(len(deep)) + deep)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(scenario())


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vectors": bytes(7)}, "vectors"),
        ({"dimension": 0}, "dimension"),
        ({"dimension": 5000}, "dimension"),
        ({"k": 0}, "k"),
        ({"vectors": b""}, "vectors"),
    ],
)
def test_malformed_searches_name_their_field(changes: dict[str, Any], field: str) -> None:
    async def scenario() -> None:
        async with loopback() as at:
            at.cluster.add_collection(a_schema(), [["a"]])
            request = search_pb2.SearchRequest()
            request.CopyFrom(REQUEST)
            for name, value in changes.items():
                setattr(request, name, value)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await SearchStub(at.channel).Search(request)
            assert detail_of(caught.value).field == field

    run(scenario())


def test_requests_above_the_bound_are_overloaded_and_the_others_finish() -> None:
    async def scenario() -> None:
        scripted = Scripted()
        admission = Admission(requests_max=1)
        async with loopback(admission, searching=scripted) as at:
            stub = SearchStub(at.channel)
            first = asyncio.ensure_future(stub.Search(REQUEST))
            await scripted.entered.wait()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Search(REQUEST)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert detail_of(caught.value).retry_after_ms == 100
            first.cancel()
            while admission.requests:
                await asyncio.sleep(0.002)
            assert scripted.cancelled, "a caller that leaves ends the work"

    run(scenario())


def test_admission_counts_bytes_but_takes_one_message_of_any_size() -> None:
    admission = Admission(bytes_max=10)
    with admission.admit(50), pytest.raises(Overloaded):
        admission.enter(1)
    with admission.admit(6), admission.admit(4), pytest.raises(Overloaded):
        admission.enter(1)
    assert admission.requests == 0


def test_the_callers_deadline_bounds_the_work() -> None:
    async def scenario() -> None:
        scripted = Scripted(Conflict("x"))
        async with loopback(searching=scripted) as at:
            for timeout in (None, 2.0, 10_000):
                with pytest.raises(grpc.aio.AioRpcError):
                    await SearchStub(at.channel).Search(REQUEST, timeout=timeout)
            default, short, long = scripted.timeouts_s
            assert default == 30.0 and 1.5 < short < 1.99 and long == 300.0

    run(scenario())


def test_a_short_deadline_leaves_half_of_itself_for_the_work() -> None:
    class Context:
        def time_remaining(self) -> float:
            return 0.01

    assert timeout_s(Context()) == 0.005


def test_health_follows_the_servers_state() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            stub = health_pb2_grpc.HealthStub(at.channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            for service in ("", *SERVICES):
                check = health_pb2.HealthCheckRequest(service=service)
                assert (await stub.Check(check)).status == serving
            await at.server.set_serving(False)
            assert (await stub.Check(check)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await at.server.set_serving(True)
            assert (await stub.Check(check)).status == serving

    run(scenario())


def test_reflection_lists_the_services() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            stub = reflection_pb2_grpc.ServerReflectionStub(at.channel)

            async def ask() -> Any:
                yield reflection_pb2.ServerReflectionRequest(list_services="")

            [answer] = [reply async for reply in stub.ServerReflectionInfo(ask())]
            names = {service.name for service in answer.list_services_response.service}
            assert names >= {*SERVICES, "grpc.health.v1.Health"}

    run(scenario())


def test_a_port_in_use_is_a_conflict_that_names_it() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            nothing: Any = None
            services = Services(
                control=nothing,
                searching=nothing,
                reading=nothing,
                exploring=nothing,
                writing=nothing,
                loading=nothing,
                status=nothing,
            )
            with pytest.raises(Conflict, match="in use") as caught:
                await start_server(at.server.address, services, ids=CountingIds())
            assert at.server.address in caught.value.message
            # The first server is unharmed.
            stub = health_pb2_grpc.HealthStub(at.channel)
            await stub.Check(health_pb2.HealthCheckRequest())

    run(scenario())


def test_close_lets_requests_in_flight_finish() -> None:
    async def scenario() -> None:
        scripted = Scripted()
        async with loopback(searching=scripted) as at:
            call = asyncio.ensure_future(SearchStub(at.channel).Search(REQUEST))
            await scripted.entered.wait()
            closing = asyncio.ensure_future(at.server.close(drain_s=10))
            await asyncio.sleep(0)
            scripted.error = None
            scripted.release.set()
            assert (await call).staleness_ms == STALENESS_MS
            await closing

    run(scenario())


COLUMN = types_pb2.AttributeColumn
WORDS = types_pb2.KeywordValues


@pytest.mark.parametrize(
    "columns",
    [
        [COLUMN(name="section")],
        [COLUMN(name="section", keyword=WORDS(values=["x"]))],
        [COLUMN(name="section", rows=[2], keyword=WORDS(values=["x"]))],
        [COLUMN(name="section", rows=[0, 0], keyword=WORDS(values=["x", "y"]))],
        [
            COLUMN(name="section", keyword=WORDS(values=["x", "y"])),
            COLUMN(name="section", rows=[1], keyword=WORDS(values=["z"])),
        ],
        [
            COLUMN(
                name="section",
                keyword_list=types_pb2.KeywordListValues(values=["x"], lengths=[1, 1]),
            )
        ],
    ],
)
def test_columns_that_do_not_fit_the_batch_are_refused(columns: list[Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_attributes(columns, 2)
    assert caught.value.field == "attributes.section"


@pytest.mark.parametrize(
    ("conditions", "field"),
    [
        ([CONDITION(if_absent=True)], "conditions"),
        ([CONDITION(if_absent=True), CONDITION()], "conditions[1]"),
        ([CONDITION(if_absent=True), CONDITION(if_absent=False)], "conditions[1].if_absent"),
    ],
)
def test_conditions_hold_for_every_point_or_for_none(conditions: list[Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_upsert(upsert_with(conditions))
    assert caught.value.field == field


def test_conditions_become_sequence_numbers() -> None:
    mixed = decode_upsert(upsert_with([CONDITION(if_absent=True), CONDITION(if_seq=9)]))
    assert (mixed.if_absent, mixed.if_seqs) == (False, [0, 9])
    absent = decode_upsert(upsert_with([CONDITION(if_absent=True)] * 2))
    assert (absent.if_absent, absent.if_seqs) == (True, None)
    none = decode_upsert(upsert_with([]))
    assert (none.if_absent, none.if_seqs) == (False, None)
