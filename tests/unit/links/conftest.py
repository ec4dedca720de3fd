"""Fixtures: a place to link in."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.links.places import EVERYWHERE, SOCKETS, Place, make_place


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="shoal-") as path:
        yield Path(path)


@pytest.fixture(params=EVERYWHERE)
def place(request: pytest.FixtureRequest, directory: Path) -> Place:
    return make_place(request.param, directory)


@pytest.fixture(params=SOCKETS)
def sockets(request: pytest.FixtureRequest, directory: Path) -> Place:
    return make_place(request.param, directory)


@pytest.fixture
def memory(directory: Path) -> Place:
    return make_place("memory", directory)
