"""Stands around every RPC: size, admission, errors. The one place where requests enter.

Servicers only translate and delegate; they raise domain errors and never see an oversized,
malformed or surplus request. Anything else that escapes them is a bug: it is logged with an
incident id, the caller gets Internal with the id, and the coordinator goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message

from shoal_cluster.domain.errors import Internal, InvalidRequest, ShoalError
from shoal_cluster.domain.ids import IdGenerator
from shoal_cluster.domain.limits import REQUEST_BYTES_MAX
from shoal_cluster.edge.admission import Admission
from shoal_cluster.edge.status import refuse

log = structlog.get_logger(__name__)

TIMEOUT_DEFAULT_S = 30.0
TIMEOUT_MAX_S = 300.0
"""Nothing a client asks for may hold resources longer than this."""

TIMEOUT_MARGIN_S = 0.02
"""Left of the caller's deadline for the error to travel: a typed error beats DEADLINE_EXCEEDED."""

Request = TypeVar("Request", bound=Message)
Context = Any  # grpc.aio.ServicerContext; its type parameters help nobody here


class Refused:
    """A message that did not become a request, and why."""

    __slots__ = ("error",)

    def __init__(self, error: InvalidRequest) -> None:
        self.error = error


class Incoming(Generic[Request]):
    """A decoded request and its size on the wire."""

    __slots__ = ("request", "size_bytes")

    def __init__(self, request: Request, size_bytes: int) -> None:
        self.request = request
        self.size_bytes = size_bytes


def timeout_s(context: Context) -> float:
    """Returns how long the work may take, by the caller's deadline."""
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return TIMEOUT_DEFAULT_S
    # At least half of a very short deadline is for the work.
    return float(min(max(remaining_s - TIMEOUT_MARGIN_S, remaining_s / 2), TIMEOUT_MAX_S))


def decoding(
    parse: Callable[[bytes], Request],
) -> Callable[[bytes | memoryview], Incoming[Request] | Refused]:
    """Returns a deserializer that lets `Guard` answer for what cannot be decoded.

    gRPC would answer an exception here with a bare INTERNAL, which tells the caller nothing.
    """

    def decode(raw: bytes | memoryview) -> Incoming[Request] | Refused:
        if len(raw) > REQUEST_BYTES_MAX:
            return Refused(
                InvalidRequest(
                    f"the message has {len(raw)} bytes; send smaller batches",
                    limit=f"{REQUEST_BYTES_MAX} bytes a message",
                )
            )
        try:
            # Protobuf reads any buffer, though it says bytes.
            return Incoming(parse(cast(bytes, raw)), len(raw))
        except InvalidRequest as error:
            return Refused(error)
        except DecodeError as error:
            return Refused(
                InvalidRequest(
                    f"the message is not what the method takes, or nested too deep: {error}",
                    limit="100 nested messages",
                )
            )

    return decode


class Guard:
    """Registers services on a server, each method behind the same checks.

    decoders: for methods whose servicer takes something else than the message and answers with
    bytes. serialised: the same unary methods by gRPC path, as functions of bytes, for fast lanes.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        admission: Admission,
        ids: IdGenerator,
        decoders: Mapping[str, Callable[[bytes], Any]] | None = None,
    ) -> None:
        self._server = server
        self._admission = admission
        self._ids = ids
        self._decoders = decoders or {}
        self.serialised: dict[str, Callable[[bytes | memoryview, Context], Awaitable[bytes]]] = {}

    # What the generated `add_…Servicer_to_server` calls: this class stands in for the server.

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Ignored: the same handlers come by name, which is what is needed."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        guarded = {name: self._guarded(f"{service}/{name}", h) for name, h in handlers.items()}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, guarded),)
        )

    def _guarded(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        assert handler.request_deserializer is not None, f"{method}: generated code has one"
        own = self._decoders.get(method)
        decode = decoding(own or handler.request_deserializer)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._guard_stream(method, handler.stream_stream),  # type: ignore[arg-type]
                request_deserializer=decode,
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._guard_answers(method, handler.unary_stream),  # type: ignore[arg-type]
                request_deserializer=decode,
                response_serializer=handler.response_serializer,
            )
        assert handler.unary_unary is not None, f"{method}: no such kind of method yet"
        assert handler.response_serializer is not None, f"{method}: generated code has one"
        serialise = None if own else handler.response_serializer
        self.serialised[f"/{method}"] = self._guard_serialised(
            method, handler.unary_unary, decode, serialise
        )
        return grpc.unary_unary_rpc_method_handler(
            self._guard_unary(method, handler.unary_unary),
            request_deserializer=decode,
            response_serializer=serialise,
        )

    def _guard_unary(
        self, method: str, serve: Callable[[Any, Context], Awaitable[Message]]
    ) -> Callable[[Incoming[Any] | Refused, Context], Awaitable[Message]]:
        async def guarded(incoming: Incoming[Any] | Refused, context: Context) -> Message:
            try:
                return await self._serve(serve, incoming, context)
            except ShoalError as error:
                await refuse(context, error)
            except Exception as error:  # noqa: BLE001  # the shell's outermost frame
                await refuse(context, self._incident(method, error))

        return guarded

    def _guard_serialised(
        self,
        method: str,
        serve: Callable[[Any, Context], Awaitable[Any]],
        decode: Callable[[bytes | memoryview], Incoming[Any] | Refused],
        serialise: Callable[[Message], bytes] | None,
    ) -> Callable[[bytes | memoryview, Context], Awaitable[bytes]]:
        """serialise: None when the servicer answers with the future of bytes."""

        async def guarded(raw: bytes | memoryview, context: Context) -> bytes:
            assert serialise is not None
            try:
                return serialise(await self._serve(serve, decode(raw), context))
            except ShoalError:
                raise
            except Exception as error:  # the shell's outermost frame
                raise self._incident(method, error) from error

        def begun(raw: bytes | memoryview, context: Context) -> Awaitable[bytes]:
            incoming = decode(raw)
            if isinstance(incoming, Refused):
                raise incoming.error
            size_bytes = incoming.size_bytes
            self._admission.enter(size_bytes)
            try:
                future = asyncio.ensure_future(serve(incoming.request, context))
            except BaseException:
                self._admission.leave(size_bytes)
                raise
            future.add_done_callback(lambda _: self._admission.leave(size_bytes))
            return future

        return begun if serialise is None else guarded

    async def _serve(
        self,
        serve: Callable[[Any, Context], Awaitable[Message]],
        incoming: Incoming[Any] | Refused,
        context: Context,
    ) -> Message:
        if isinstance(incoming, Refused):
            raise incoming.error
        self._admission.enter(incoming.size_bytes)
        try:
            return await serve(incoming.request, context)
        finally:
            self._admission.leave(incoming.size_bytes)

    def _guard_answers(
        self,
        method: str,
        serve: Callable[[Any, Context], AsyncGenerator[Message, None]],
    ) -> Callable[[Incoming[Any] | Refused, Context], AsyncGenerator[Message, None]]:
        """Admits the work on each answer, not the time in which the caller reads them."""
        admission = self._admission

        async def guarded(
            incoming: Incoming[Any] | Refused, context: Context
        ) -> AsyncGenerator[Message, None]:
            try:
                if isinstance(incoming, Refused):
                    raise incoming.error
                async with contextlib.aclosing(serve(incoming.request, context)) as answers:
                    while True:
                        with admission.admit(incoming.size_bytes):
                            answer = await anext(answers, None)
                        if answer is None:
                            return
                        yield answer
            except ShoalError as error:
                await refuse(context, error)
            except Exception as error:  # noqa: BLE001  # the shell's outermost frame
                await refuse(context, self._incident(method, error))

        return guarded

    def _guard_stream(
        self,
        method: str,
        serve: Callable[[AsyncIterator[Any], Context], AsyncIterator[Message]],
    ) -> Callable[[AsyncIterator[Incoming[Any] | Refused], Context], AsyncIterator[Message]]:
        """Admission is the servicer's, per message: a stream may stay open for hours, idle."""

        async def guarded(
            incoming: AsyncIterator[Incoming[Any] | Refused], context: Context
        ) -> AsyncIterator[Message]:
            try:
                async for response in serve(_requests(incoming), context):
                    yield response
            except ShoalError as error:
                await refuse(context, error)
            except Exception as error:  # noqa: BLE001  # the shell's outermost frame
                await refuse(context, self._incident(method, error))

        return guarded

    def _incident(self, method: str, error: Exception) -> Internal:
        incident = self._ids.hex(6)
        log.error("request_failed_unexpectedly", incident=incident, method=method, exc_info=error)
        return Internal(
            f"a bug in the server ended the request; its log has the details under incident "
            f"{incident}"
        )


async def _requests(incoming: AsyncIterator[Incoming[Any] | Refused]) -> AsyncIterator[Any]:
    async for message in incoming:
        if isinstance(message, Refused):
            raise message.error
        yield message.request
