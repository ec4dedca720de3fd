"""Writes docs/reference/metrics.md: `python -m shoal_cluster.cli.metrics_reference`."""

from pathlib import Path

from shoal_cluster.telemetry.metrics import metrics_reference

REFERENCE = Path("docs/reference/metrics.md")
"""Below the repository's root, where the command is to be run."""

if __name__ == "__main__":
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    REFERENCE.write_text(metrics_reference())
