"""The bucket's own object: which cluster it belongs to, in which format, and that it was probed.

Created once, when an empty place is first used, after the conformance probe held; read and checked
on every start.
"""

from dataclasses import dataclass
from typing import Any

from shoal_cluster.bucket.conformance import probe
from shoal_cluster.bucket.create import create
from shoal_cluster.bucket.envelope import EnvelopeKind, decode, encode, put_id_of
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Conflict
from shoal_cluster.domain.ids import IdGenerator
from shoal_cluster.domain.keys import CATALOG_PREFIX, CLUSTER_KEY, COLLECTIONS_PREFIX

CREATE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketIdentity:
    """cluster_uuid: 16 bytes. conformance: what the probe measured when the bucket was made."""

    cluster_uuid: bytes
    conformance: dict[str, Any]


async def open_identity(
    store: Store, second: Store, *, clock: Clock, ids: IdGenerator
) -> BucketIdentity:
    """Returns the bucket's identity, after making and probing it when the bucket is empty.

    second: another handle on the same place, for the probe's races.

    Raises: Conflict when the store is unfit, when a newer Shoal wrote the bucket, or when the place
    holds our objects without the `cluster` object; Corrupt when that object is damaged.
    """
    body = await store.get(CLUSTER_KEY)
    if body is None:
        for prefix in (CATALOG_PREFIX, COLLECTIONS_PREFIX):
            if await store.list(prefix):
                raise Conflict(
                    f"the place holds objects under {prefix} but no {CLUSTER_KEY!r} object: it is "
                    "not a whole bucket. Nothing was changed; restore that object, or choose "
                    "another place",
                    field="bucket",
                )
        body = await _create(store, second, clock=clock, ids=ids)
    header = decode(body, EnvelopeKind.CLUSTER, key=CLUSTER_KEY).header
    return BucketIdentity(cluster_uuid=header["cluster_uuid"], conformance=header["conformance"])


def encode_identity(put_id: bytes, cluster_uuid: bytes, conformance: dict[str, Any]) -> bytes:
    """Returns the `cluster` object's bytes."""
    header = {"put_id": put_id, "cluster_uuid": cluster_uuid, "conformance": conformance}
    return encode(EnvelopeKind.CLUSTER, header)


async def _create(store: Store, second: Store, *, clock: Clock, ids: IdGenerator) -> bytes:
    found = await probe(store, second, clock=clock, ids=ids)
    put_id = ids.put_id()
    body = encode_identity(put_id, ids.put_id(), found)
    other = await create(
        store,
        CLUSTER_KEY,
        body,
        put_id=put_id,
        read_put_id=put_id_of,
        clock=clock,
        deadline_s=clock.monotonic_s() + CREATE_TIMEOUT_S,
    )
    return body if other is None else other
