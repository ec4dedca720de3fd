"""A build stays within what its planner counted with, and is ended where it does not."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from shoal_cluster.domain import limits
from shoal_cluster.domain.ids import SegmentId, Seq
from shoal_cluster.manifest.manifest import FileEntry, SegmentEntry
from shoal_cluster.shard.build_memory import bounded_memory, build_bytes
from shoal_cluster.shard.compaction import plan_compaction, plan_settling

ON_LINUX = sys.platform == "linux"


def entry(name: str, rows: int, *, dead: int = 0, payload_bytes: int = 0) -> SegmentEntry:
    payload = FileEntry(name="payload", key=name, size_bytes=payload_bytes, sha256="")
    return SegmentEntry(
        id=SegmentId(name),
        files=(payload,),
        rows=rows,
        min_seq=Seq(1),
        max_seq=Seq(1),
        tombstones=None,
        dead=dead,
        sum=0,
    )


def test_no_plan_asks_for_more_memory_than_a_builder_has():
    """As many rows as SEGMENT_ROWS_MAX of 4,096-d would take 33 GB."""
    segments = [entry(f"s{number}", 60_000) for number in range(8)]
    for dimension in (4, 384, 1536, 4096):
        for plan in (plan_compaction, plan_settling):
            chosen = plan(segments, dimension)
            assert build_bytes(chosen, dimension) <= limits.BUILD_MEMORY_BYTES_MAX
            assert sum(segment.live for segment in chosen) <= limits.SEGMENT_ROWS_MAX
    assert len(plan_compaction(segments, 384)) == 8
    assert plan_compaction(segments, 4096) == (), "four of them do not fit, and fewer do not pay"


def test_large_payloads_count():
    segments = [entry(f"s{number}", 5000, payload_bytes=600 * limits.MIB) for number in range(4)]
    assert plan_compaction([entry(f"s{number}", 5000) for number in range(4)], 4) != ()
    assert plan_compaction(segments, 4) == ()
    assert plan_settling(segments, 4) == ()


def test_a_mostly_dead_segment_of_too_large_rows_stays():
    assert plan_compaction([entry("s", 1_000_000, dead=510_000)], 1536) == ()
    assert plan_compaction([entry("s", 500_000, dead=300_000)], 1536) != ()


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


@pytest.mark.slow
def test_a_merge_takes_no_more_than_its_estimate():
    """The same measurement at 100,000 rows: tests/bench/build_memory.py."""
    if not ON_LINUX:
        return  # nothing there says what a process holds
    ran = in_a_process(
        "import sys; from tests.bench.build_memory import main; "
        "sys.argv[1:] = ['4000', '384', '8', '300']; main()"
    )
    measured = json.loads(ran.stdout)
    assert 4000 * 384 * 4 < measured["private"] < measured["estimate"], ran.stderr


def test_a_process_that_wants_more_is_refused_and_can_go_on():
    ran = in_a_process(
        "import numpy as np\n"
        "from shoal_cluster.shard.build_memory import bounded_memory\n"
        "with bounded_memory(64 << 20):\n"
        "    small = np.ones(16 << 20, dtype=np.uint8)\n"
        "    try:\n"
        "        np.ones(256 << 20, dtype=np.uint8)\n"
        "    except MemoryError:\n"
        "        print('refused')\n"
        "np.ones(256 << 20, dtype=np.uint8)\n"
        "print('as before')\n"
    )
    assert ran.stdout.split("\n")[:-1] == (["refused"] if ON_LINUX else []) + ["as before"]


def test_the_bound_leaves_this_process_alone():
    with bounded_memory(limits.BUILD_MEMORY_BYTES_MAX):
        assert len(np.ones(1 << 20)) == 1 << 20
