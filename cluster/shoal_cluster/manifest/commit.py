"""Reads and commits the manifests of one shard."""

from shoal_cluster.bucket.envelope import EnvelopeKind
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import Epoch, ManifestVersion, Seq, Slot
from shoal_cluster.domain.keys import ShardKeys, padded
from shoal_cluster.manifest import invariants
from shoal_cluster.manifest.manifest import Manifest
from shoal_cluster.manifest.version_log import Version, VersionLog

FIRST_PUT_ID = bytes(16)
"""Put id of version 0: every creator writes the same bytes, so all of them succeed."""


def decode_manifest(version: Version, *, key: str) -> Manifest:
    """Returns a stored version as a manifest that keeps its invariants.

    Raises: Corrupt naming `key` and what is broken.
    """
    try:
        manifest = Manifest.from_wire(version.number, version.put_id, version.fields)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise Corrupt(f"manifest {key} lacks or contradicts itself in {error}") from error
    invariants.require(manifest, None, where=f"manifest {key}")
    return manifest


class Manifests:
    """The manifest versions of one shard."""

    def __init__(self, store: Store, keys: ShardKeys, clock: Clock) -> None:
        self._keys = keys
        self.versions = VersionLog(
            store,
            versions=keys.manifests,
            floors=keys.floors,
            kind=EnvelopeKind.MANIFEST,
            floor_kind=EnvelopeKind.MANIFEST_FLOOR,
            clock=clock,
        )

    async def newest(self) -> Manifest | None:
        """Returns the newest manifest, or None for a shard that was never created.

        Raises: Corrupt naming what is broken; Unavailable.
        """
        version = await self.versions.newest()
        if version is None:
            return None
        return decode_manifest(version, key=f"{self._keys.manifests}{padded(version.number)}")

    async def newest_number(self) -> int | None:
        """Returns the newest version's number without reading it: one LIST."""
        return await self.versions.newest_number()

    async def create_first(self) -> None:
        """Creates version 0 of an empty shard; every creator writes the same bytes."""
        manifest = Manifest(
            version=ManifestVersion(0),
            parent_put_id=FIRST_PUT_ID,
            put_id=FIRST_PUT_ID,
            epoch=Epoch(0),
            floor_slot=Slot(0),
            floor_epoch=Epoch(0),
            floor_seq=Seq(0),
            floor_put_id=bytes(16),
            segments=(),
            dedup=[0, []],
            schema_version=0,
            sum=0,
        )
        await self.versions.commit(0, FIRST_PUT_ID, manifest.to_wire())

    async def commit(self, parent: Manifest, child: Manifest) -> bool:
        """Commits `child` after `parent`; False when somebody else took that version.

        Raises: Corrupt when the step breaks an invariant (nothing was written).
        """
        invariants.require(child, parent, where=f"commit of manifest {child.version}")
        return await self.versions.commit(child.version, child.put_id, child.to_wire())
