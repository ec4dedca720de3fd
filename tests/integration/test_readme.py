"""The README keeps its promises: its example prints what it says, its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_cluster.bootstrap import RunningCluster

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:7700"
"""Where the README's cluster listens; the tests' own has a port of its own."""


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"README must have one {language} block, it has {len(found)}"
    return str(found[0])


@pytest.mark.ray
@pytest.mark.slow
def test_example_prints_what_the_readme_says(cluster: RunningCluster) -> None:
    example = block("python")
    assert example.count(ADDRESS) == 1
    ran = subprocess.run(
        [sys.executable, "-c", example.replace(ADDRESS, cluster.grpc_address)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "client", ROOT / "protos"))),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stderr == ""
    assert ran.stdout == block("text")


def test_links_lead_to_files() -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
