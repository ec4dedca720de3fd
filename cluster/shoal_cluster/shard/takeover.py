"""Becoming primary: claim an epoch in the manifest, fence the log, validate, serve.

Steps (docs/design/protocol.md, takeover):
1. read the newest manifest.
2. create the next version with epoch + 1. From here no older epoch can commit a manifest.
3. replay the log to its first empty slot n.
4. create a fence in slot n. From here no older epoch can append.
5. read the newest manifest again: the epoch must still be ours and its floor below n; otherwise we
   slept while others took over, sealed and collected the slots we think we replayed.
6. make what was replayed durable (local directories only).
7. apply the fence and serve; sequence numbers go on from the last replayed record.

Crash after 2: the epoch is burned, the old primary goes on appending until somebody fences it.
Crash after 4: the fence stays for ever; the next claimant replays over it.
"""

from dataclasses import replace

import structlog

from shoal_cluster.domain.errors import Conflict, NotFound
from shoal_cluster.domain.ids import Epoch, ManifestVersion, Seq, Slot
from shoal_cluster.shard.replica import Replica
from shoal_cluster.wal.record import RecordKind, WalRecord

_log = structlog.get_logger()

_CLAIM_ATTEMPTS_MAX = 4
"""A primary that is alive commits a manifest every second at most; losing four races is a rival."""


async def take_over(replica: Replica) -> Epoch:
    """Makes this replica's process the only one that can append to the shard.

    On return the replica's state holds every acknowledged write. The caller starts a Primary with
    the epoch, before anything else advances the replica (it holds `replica.advancing`).

    Raises: Conflict when somebody else is taking over (back off, then look again); Unavailable when
    the bucket does not answer (nothing is lost; try again).
    """
    epoch = await _claim_epoch(replica)
    fence = await _fence(replica, epoch)
    await _validate(replica, epoch, fence.slot)
    await replica.wal.make_durable()
    # Only now: a fence that fails the validation is no part of the shard's order.
    replica.state.apply(fence)
    _log.info("shard_taken_over", shard=replica.keys.shard, epoch=epoch, slot=fence.slot)
    return epoch


async def _validate(replica: Replica, epoch: Epoch, fence_slot: Slot) -> None:
    """Makes sure that nobody led, sealed and collected between our claim and our fence."""
    newest = await replica.manifests.newest()
    if newest is None or newest.epoch != epoch or newest.floor_slot >= fence_slot:
        raise Conflict(
            f"shard {replica.keys.shard}: epoch {epoch} was overtaken between claim and fence"
        )


async def _claim_epoch(replica: Replica) -> Epoch:
    epoch: Epoch | None = None
    for _ in range(_CLAIM_ATTEMPTS_MAX):
        manifest = await replica.manifests.newest()
        if manifest is None:
            raise NotFound(f"{replica.keys.prefix} holds no manifest: the shard was never created")
        if epoch is not None and manifest.epoch >= epoch:
            break
        epoch = Epoch(manifest.epoch + 1)
        claim = replace(
            manifest,
            version=ManifestVersion(manifest.version + 1),
            parent_put_id=manifest.put_id,
            put_id=replica.ports.ids.put_id(),
            epoch=epoch,
        )
        if await replica.manifests.commit(manifest, claim):
            return await _load_claim(replica, epoch)
        # Perhaps no rival: the old primary may have committed a seal in between.
    raise Conflict(f"shard {replica.keys.shard}: somebody else is claiming epoch {epoch}")


async def _load_claim(replica: Replica, epoch: Epoch) -> Epoch:
    loaded = await replica.load_manifest()
    if loaded.epoch != epoch:
        raise Conflict(
            f"shard {replica.keys.shard}: epoch {loaded.epoch} was claimed right after {epoch}"
        )
    return epoch


async def _fence(replica: Replica, epoch: Epoch) -> WalRecord:
    """Replays to the end of the log and puts a fence there; returns it, not yet applied."""
    while True:
        async for record in replica.wal.replay(Slot(replica.state.slot + 1)):
            await _accept_or_yield(replica, record, epoch)
        state = replica.state
        fence = WalRecord(
            slot=Slot(state.slot + 1),
            epoch=epoch,
            kind=RecordKind.FENCE,
            put_id=replica.ports.ids.put_id(),
            prev_put_id=state.last_put_id,
            first_seq=Seq(state.seq + 1),
            memtable_start=state.active.start_slot,
        )
        other = await replica.wal.append(fence, replica.wal.encode(fence))
        if other is None:
            return fence
        await _accept_or_yield(replica, other, epoch)


async def _accept_or_yield(replica: Replica, record: WalRecord, epoch: Epoch) -> None:
    if record.epoch > epoch:
        raise Conflict(
            f"shard {replica.keys.shard}: epoch {record.epoch} fenced the log before {epoch} did"
        )
    if record.slot > replica.state.slot:  # a manifest may have lifted us over it meanwhile
        await replica.accept(record)
    if replica.manifest is not None and replica.manifest.epoch > epoch:
        # We slept and were lifted to a later epoch's floor. A fence of ours at the true tail would
        # make the log's epochs go back (W-3), and nobody could take the shard over any more.
        raise Conflict(
            f"shard {replica.keys.shard}: epoch {replica.manifest.epoch} was claimed while {epoch} "
            "was on its way to the end of the log"
        )
