"""The name of one write, by which a retry is recognised."""

from typing import NamedTuple

from shoal_cluster.domain.errors import InvalidRequest

CLIENT_ID_BYTES_MAX = 64
"""A uuid in hexadecimal has 32; shards keep the ids of their last 256 clients."""

REQUEST_NO_MAX = (1 << 63) - 1
"""Fits a signed 64-bit integer, which every language has."""


class RequestName(NamedTuple):
    """Chosen by the client; sending a write again under the same name cannot apply it twice."""

    client_id: str
    request_no: int

    def part(self, suffix: str) -> "RequestName":
        """Returns the name of a write that the coordinator adds to this one.

        Shards remember names per client, so the suffix goes into the client's part: `a1b2/w1`.
        """
        return RequestName(f"{self.client_id}/{suffix}", self.request_no)


def validate_request_name(name: RequestName) -> RequestName:
    """Returns the name if it came in the form a client may use.

    Raises: InvalidRequest naming the field and the limit (nothing was applied).
    """
    size_bytes = len(name.client_id.encode())
    if not 1 <= size_bytes <= CLIENT_ID_BYTES_MAX:
        raise InvalidRequest(
            f"client_id has {size_bytes} bytes; send a unique id made when the client starts",
            field="request_id.client_id",
            limit=f"1 to {CLIENT_ID_BYTES_MAX} bytes",
        )
    if "/" in name.client_id:
        raise InvalidRequest(
            f"client_id {name.client_id!r} holds '/', which marks the coordinator's own writes",
            field="request_id.client_id",
        )
    if not 1 <= name.request_no <= REQUEST_NO_MAX:
        raise InvalidRequest(
            f"request_no {name.request_no} is out of range",
            field="request_id.request_no",
            limit=f"1 to {REQUEST_NO_MAX}",
        )
    return name
