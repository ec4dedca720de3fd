"""Whether a bucket is free to be served: what `up` asks before it claims one.

Only a courtesy to people. If two clusters do serve one bucket, the catalog deposes the former and
fences keep every acknowledged write, whatever is decided here; so nothing here compares the clocks
of two machines, and no lease has to be renewed.
"""

import socket
from pathlib import Path

from shoal_cluster.control.catalog import Owner

_MACHINE_ID = Path("/etc/machine-id")


def host_identity() -> str:
    """Returns what tells machines apart: host name and, where there is one, the machine's id.

    Host names alone repeat ("localhost"), and so do the ids of copied disks. Containers have host
    names of their own, which is right: the loopback address of each is another one.
    """
    try:
        machine = _MACHINE_ID.read_text().strip()
    except OSError:
        machine = ""
    return f"{socket.gethostname()}/{machine}"


def objection(owner: Owner | None, *, host: str, answers: bool, take_over: bool) -> str | None:
    """Returns why a bucket should not be claimed, or None when it may be.

    owner: who claimed it last and has not given it up. answers: whether a cluster that serves the
    bucket answers at the owner's address, asked from this machine, `host`. take_over: the operator
    vouches for a cluster that cannot be asked.
    """
    if owner is None:
        return None
    if answers:
        return f"is being served by another cluster at {owner.address}. Stop that one first"
    if owner.host == host or take_over:
        return None
    return (
        f"was last served by a cluster on another machine, {owner.host.split('/')[0]!r}, whose "
        f"gRPC address {owner.address} does not tell this one whether it still runs. Stop it there "
        "with `shoal down`; if it or its machine is gone for good, `shoal up --take-over` serves "
        "the bucket from here, and should it still run, it is shut out and loses nothing that it "
        "acknowledged"
    )
