"""Link addresses: where a listener is, as text that travels in Ray calls and status tables.

unix:/run/shoal/shard-1.sock      processes of one node
tcp:10.0.0.7:7410, tcp:[::1]:0    processes of several nodes
memory:shard-1                    one process: simulation and tests
"""

from typing import Final, NewType

from shoal_cluster.domain.errors import InvalidRequest

LinkAddress = NewType("LinkAddress", str)
"""Made by `parse_address` only; text, so that it hashes fast and needs no conversion to travel."""

UNIX_PATH_BYTES_MAX: Final = 107
"""Linux's sockaddr_un.sun_path holds 108 bytes, the last of them zero."""

_PORT_MAX: Final = 65_535


def parse_address(text: str) -> LinkAddress:
    """Returns the checked address.

    Raises: InvalidRequest (NOT_APPLIED) with the field `link_address`.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.startswith("/"):
        if len(rest.encode()) > UNIX_PATH_BYTES_MAX:
            raise InvalidRequest(
                f"socket path '{rest}' has {len(rest.encode())} bytes; use a shorter directory",
                field="link_address",
                limit=f"{UNIX_PATH_BYTES_MAX} bytes",
            )
        return LinkAddress(text)
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if host and port.isascii() and port.isdigit() and (bracketed or ":" not in host):
            if int(port) > _PORT_MAX:
                raise InvalidRequest(
                    f"port {port} of '{text}' is too large",
                    field="link_address",
                    limit=str(_PORT_MAX),
                )
            return LinkAddress(text)
    if scheme == "memory" and rest:
        return LinkAddress(text)
    raise InvalidRequest(
        f"'{text}' is no link address; use unix:/path, tcp:host:port or tcp:[ipv6]:port",
        field="link_address",
    )


def unix_path(address: LinkAddress) -> str | None:
    """Returns the socket path of a unix address, None of any other."""
    return address[len("unix:") :] if address.startswith("unix:") else None


def tcp_endpoint(address: LinkAddress) -> tuple[str, int] | None:
    """Returns host and port of a tcp address, None of any other."""
    if not address.startswith("tcp:"):
        return None
    host, _, port = address[len("tcp:") :].rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def tcp_address(host: str, port: int) -> LinkAddress:
    """Returns the tcp address of host and port."""
    return parse_address(f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}")
