"""The name of one write, by which a retry is recognised."""

from typing import NamedTuple

from shoal_cluster.domain.errors import InvalidRequest

CLIENT_ID_BYTES_MAX = 64
"""A uuid in hexadecimal has 32; shards keep the ids of their last 1,024 clients."""

PARTS_MAX = 1 << 14
"""Writes of one kind that the coordinator may add to a request on one shard: more than the passes
of a delete by filter."""

REQUEST_NO_MAX = (1 << 63) // PARTS_MAX - 1
"""So that the number of a part fits a signed 64-bit integer, which every language has. A million
requests a second reach it after 17 years."""


class RequestName(NamedTuple):
    """Chosen by the client; sending a write again under the same name cannot apply it twice."""

    client_id: str
    request_no: int

    def part(self, kind: str, number: int) -> "RequestName":
        """Returns the name of a write that the coordinator adds to this one.

        Shards remember names per client. The parts of one kind are a client of their own, `a1b2/w`,
        so that however many they are they push out nothing else, and their numbers keep the order
        of the requests.
        """
        assert 0 <= number < PARTS_MAX, f"part {number} of request {self.request_no}"
        return RequestName(f"{self.client_id}/{kind}", self.request_no * PARTS_MAX + number)


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
