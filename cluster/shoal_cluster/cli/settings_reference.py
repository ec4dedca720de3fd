"""Writes docs/reference/settings.md: `python -m shoal_cluster.cli.settings_reference`."""

from pathlib import Path

from shoal_cluster.settings import settings_reference

REFERENCE = Path("docs/reference/settings.md")
"""Below the repository's root, where the command is to be run."""

if __name__ == "__main__":
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    REFERENCE.write_text(settings_reference())
