"""The figures that are compared from one version to the next, in one file: build/bench.json."""

import json
from pathlib import Path
from typing import Final

BENCH: Final = Path("build/bench.json")


def note_figures(**figures: float) -> None:
    """Adds figures of one bench to those of the others; what `make bench` measured stays."""
    known = json.loads(BENCH.read_text()) if BENCH.exists() else {}
    BENCH.parent.mkdir(parents=True, exist_ok=True)
    BENCH.write_text(json.dumps({**known, **figures}, indent=1) + "\n")
