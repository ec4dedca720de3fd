"""Mistakes in becoming a primary, and in ceasing to be one."""

from dataclasses import replace
from typing import Any

from shoal_cluster.domain.errors import Conflict
from shoal_cluster.domain.ids import Epoch, ManifestVersion, Slot
from shoal_cluster.manifest.version_log import VersionLog
from shoal_cluster.shard import takeover
from shoal_cluster.shard.primary import Primary
from shoal_cluster.shard.replica import Replica
from tests.simulation.mutants.registry import Patch, mutant


@mutant("does not look again after fencing")
def no_validation_after_fencing() -> list[Patch]:
    async def broken(replica: Replica, epoch: Epoch, fence_slot: Slot) -> None:
        return None

    return [(takeover, "_validate", broken)]


@mutant("takes over without a new epoch")
def epoch_reused() -> list[Patch]:
    async def broken(replica: Replica) -> Epoch:
        manifest = await replica.load_manifest()
        return Epoch(max(1, manifest.epoch))

    return [(takeover, "_claim_epoch", broken)]


@mutant("a fenced primary believes that it still leads")
def fenced_primary_goes_on() -> list[Patch]:
    async def broken(self: Primary, record: Any) -> None:
        return None

    return [(Primary, "meet", broken)]


@mutant("a takeover replays what was written, but not which requests wrote it")
def takeover_forgets_requests() -> list[Patch]:
    async def broken(replica: Replica, record: Any, epoch: Epoch) -> None:
        # Steps over the record without applying what it says.
        state = replica.state
        if record.slot == state.slot + 1:
            state.apply(replace(record, batch=replace(record.batch, requests=())))

    return [(takeover, "_accept_or_yield", broken)]


@mutant("a manifest version that somebody else took counts as committed")
def manifest_conflict_ignored() -> list[Patch]:
    commit = VersionLog.commit

    async def broken(self: VersionLog, number: int, put_id: bytes, fields: Any) -> bool:
        await commit(self, number, put_id, fields)
        return True

    return [(VersionLog, "commit", broken)]


@mutant("a claimant that was lifted over a later reign goes on and fences")
def claim_outlived() -> list[Patch]:
    async def broken(replica: Replica, record: Any, epoch: Epoch) -> None:
        if record.epoch > epoch:
            raise Conflict("fenced by a later epoch")
        if record.slot > replica.state.slot:
            await replica.accept(record)

    return [(takeover, "_accept_or_yield", broken)]


@mutant("a commit does not look for the marker that says its version was there and is gone")
def no_manifest_boundary_check() -> list[Patch]:
    async def broken(self: VersionLog) -> int:
        return ManifestVersion(-1)

    return [(VersionLog, "floor", broken)]
