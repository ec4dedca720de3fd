"""Rules that hold for every test: no Ray in unit tests, reproducible property tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings

UNIT = Path(__file__).parent / "unit"

# No deadline per example: two busy cores stall any example now and then. A failing example prints
# the line that replays it.
settings.register_profile(
    "default",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _refuse_ray(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a unit test starts Ray: move it to tests/integration")


@pytest.fixture(autouse=True)
def no_ray_in_unit_tests(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Refuses `import ray` inside a unit test, and `ray.init` where it was imported before."""
    if UNIT in request.node.path.parents:
        ray = sys.modules.get("ray")
        if ray is not None:
            monkeypatch.setattr(ray, "init", _refuse_ray)
        # None in sys.modules makes the import system raise ImportError for the name.
        monkeypatch.setitem(sys.modules, "ray", None)
    yield
