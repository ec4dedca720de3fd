"""How an error kind travels over gRPC: the status table that SDK and server share."""

from collections.abc import Mapping

import grpc

ERROR_DETAIL_KEY = "shoal-error-bin"
"""Binary trailing metadata that holds a serialized ErrorDetail."""

STATUS_OF_KIND: Mapping[str, grpc.StatusCode] = {
    "invalid_request": grpc.StatusCode.INVALID_ARGUMENT,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "permission_denied": grpc.StatusCode.PERMISSION_DENIED,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "already_exists": grpc.StatusCode.ALREADY_EXISTS,
    "conflict": grpc.StatusCode.ABORTED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "not_primary": grpc.StatusCode.UNAVAILABLE,
    "indeterminate": grpc.StatusCode.UNKNOWN,
    "corrupt": grpc.StatusCode.DATA_LOSS,
    "internal": grpc.StatusCode.INTERNAL,
}
"""The table at the top of types.proto."""
