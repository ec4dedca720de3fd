"""Link addresses: what is one, what is not, and what a part of one is."""

import pytest

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.links.address import (
    UNIX_PATH_BYTES_MAX,
    parse_address,
    tcp_address,
    tcp_endpoint,
    unix_path,
)


@pytest.mark.parametrize(
    ("text", "path", "endpoint"),
    [
        ("unix:/run/a.sock", "/run/a.sock", None),
        ("tcp:127.0.0.1:0", None, ("127.0.0.1", 0)),
        ("tcp:node-7.internal:65535", None, ("node-7.internal", 65535)),
        ("tcp:[::1]:7410", None, ("::1", 7410)),
        ("memory:shard-1", None, None),
    ],
)
def test_addresses_have_a_path_or_an_endpoint(
    text: str, path: str | None, endpoint: tuple[str, int] | None
) -> None:
    address = parse_address(text)
    assert address == text
    assert unix_path(address) == path
    assert tcp_endpoint(address) == endpoint
    if endpoint is not None:
        assert tcp_address(*endpoint) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "unix:relative.sock",
        "tcp:host",
        "tcp::7410",
        "tcp:host:",
        "tcp:host:port",
        "tcp:host:-1",
        "tcp:host:65536",
        "tcp:::1:7410",
        "tcp:host:²",
        "memory:",
        "http://host:1",
        "unix:/" + "x" * UNIX_PATH_BYTES_MAX,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_address(text)
    assert caught.value.field == "link_address"


def test_the_longest_socket_path_passes() -> None:
    parse_address("unix:/" + "x" * (UNIX_PATH_BYTES_MAX - 1))
