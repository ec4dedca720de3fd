"""How an error ends an RPC: its gRPC status, and its details in the trailing metadata."""

from typing import NoReturn

from grpc.aio import ServicerContext

from shoal_cluster.domain.errors import Outcome, ShoalError
from shoal_protos.status import ERROR_DETAIL_KEY, STATUS_OF_KIND
from shoal_protos.v1 import types_pb2 as pb

MESSAGE_BYTES_MAX, FIELD_BYTES_MAX, STATUS_MESSAGE_BYTES_MAX = 2400, 300, 900
"""gRPC bounds all metadata of a reply to 8 KiB, and drops an error that exceeds it. Details travel
in base64 (4/3 of 3,000 bytes), the status message percent-encoded (up to 3 times its bytes)."""

_OUTCOMES = {
    Outcome.NOT_APPLIED: pb.OUTCOME_NOT_APPLIED,
    Outcome.MAYBE_APPLIED: pb.OUTCOME_MAYBE_APPLIED,
}


def detail_of(error: ShoalError) -> pb.ErrorDetail:
    return pb.ErrorDetail(
        kind=error.kind,
        message=_shortened(error.message, MESSAGE_BYTES_MAX),
        outcome=_OUTCOMES[error.outcome],
        field=_shortened(error.field or "", FIELD_BYTES_MAX),
        limit=_shortened(error.limit or "", FIELD_BYTES_MAX),
        retry_after_ms=error.retry_after_ms,
    )


async def refuse(context: "ServicerContext[object, object]", error: ShoalError) -> NoReturn:
    """Ends the RPC with an error. Raises what gRPC uses to unwind the servicer."""
    detail = detail_of(error)
    await context.abort(
        STATUS_OF_KIND[error.kind],
        _shortened(detail.message, STATUS_MESSAGE_BYTES_MAX),
        ((ERROR_DETAIL_KEY, detail.SerializeToString()),),
    )
    raise AssertionError("abort raises")


def _shortened(text: str, bytes_max: int) -> str:
    # Lone surrogates (a name from a local file, say) are not UTF-8, which protobuf demands.
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= bytes_max:
        return encoded.decode()
    return encoded[: bytes_max - 3].decode("utf-8", "ignore") + "…"
