"""What must hold of every manifest; checked at commit, at load, in tests and by `shoal check`.

M-1 the sums of the segments add up to the manifest's sum.
M-2 dead rows and tombstones go together, and never exceed the rows.
M-3 segment ids are unique and no segment was made by a later epoch than the manifest's.
M-4 sequence numbers of segments do not pass floor_seq.
M-5 a child has the next version, an epoch and floors that do not go back, and names its parent.
M-6 the floor is of the manifest's epoch or an earlier one.
M-7 no bulk load is remembered twice, and no more are than a shard takes.
"""

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.keys import epoch_of_segment
from shoal_cluster.domain.limits import LOADS_MAX, LOADS_REMEMBERED
from shoal_cluster.domain.point import SUM_MODULUS
from shoal_cluster.manifest.manifest import Manifest


def violations(manifest: Manifest) -> list[str]:
    """Returns what a manifest breaks by itself, each line starting with the invariant's id."""
    found = []
    total = sum(segment.sum for segment in manifest.segments) % SUM_MODULUS
    if total != manifest.sum:
        found.append(f"M-1: segments sum to {total:016x}, manifest says {manifest.sum:016x}")
    for segment in manifest.segments:
        if (segment.dead > 0) != (segment.tombstones is not None):
            found.append(f"M-2: {segment.id} has {segment.dead} dead rows but tombstones disagree")
        if not 0 <= segment.dead <= segment.rows:
            found.append(f"M-2: {segment.id} has {segment.dead} dead of {segment.rows} rows")
        if epoch_of_segment(segment.id) > manifest.epoch:
            found.append(f"M-3: {segment.id} is from a later epoch than {manifest.epoch}")
        if segment.max_seq > manifest.floor_seq or segment.min_seq > segment.max_seq:
            found.append(
                f"M-4: {segment.id} holds seq {segment.min_seq}..{segment.max_seq}, "
                f"floor is {manifest.floor_seq}"
            )
    if manifest.floor_epoch > manifest.epoch:
        found.append(f"M-6: floor epoch {manifest.floor_epoch} is later than {manifest.epoch}")
    if not len(set(manifest.loads)) == len(manifest.loads) <= LOADS_REMEMBERED + LOADS_MAX:
        found.append(f"M-7: {len(manifest.loads)} loads are remembered, some of them twice")
    if len({segment.id for segment in manifest.segments}) != len(manifest.segments):
        found.append("M-3: a segment is listed twice")
    return found


def step_violations(parent: Manifest, child: Manifest) -> list[str]:
    """Returns what a step from one version to the next breaks."""
    found = []
    if child.version != parent.version + 1 or child.parent_put_id != parent.put_id:
        found.append(f"M-5: version {child.version} does not descend from {parent.version}")
    if child.epoch < parent.epoch:
        found.append(f"M-5: epoch went back from {parent.epoch} to {child.epoch}")
    if child.floor_slot < parent.floor_slot or child.floor_seq < parent.floor_seq:
        found.append(f"M-5: floor went back from slot {parent.floor_slot} to {child.floor_slot}")
    return found


def require(manifest: Manifest, parent: Manifest | None, *, where: str) -> None:
    """Raises Corrupt listing every violation; `where` names the object or the step."""
    found = violations(manifest)
    if parent is not None:
        found += step_violations(parent, manifest)
    if found:
        raise Corrupt(f"{where}: " + "; ".join(found))
