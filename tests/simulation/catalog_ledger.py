"""What was acknowledged about collections that come and go, held against the catalog at rest."""

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.control.catalog import Catalog, CatalogLog
from tests.simulation.bucket import WatchedObjects
from tests.simulation.world import SeededIds, SimulatedClock, World

ABSENT, CREATED, ALTERED = "absent", "created", "altered"
EXTRA = "extra"
"""The attribute that the alteration of a collection declares."""


class CatalogLedger:
    """Of each collection, by name, the states that it may be in. One change of it at a time."""

    def __init__(self) -> None:
        self._possible: dict[str, set[str]] = {}

    def sent(self, name: str, state: str) -> None:
        """Somebody asked for the change; until it is acknowledged it may take effect or not."""
        self._possible.setdefault(name, {ABSENT}).add(state)

    def acknowledged(self, name: str, state: str) -> None:
        self._possible[name] = {state}

    async def judge(self, world: World, objects: WatchedObjects) -> set[str]:
        """Notes every collection that is not as it should be; returns the ids of those there are.

        Call at rest.
        """
        clock = SimulatedClock(world.loop, offset_s=0.0, rate=1.0)
        log = CatalogLog(MemoryStore(objects), clock, SeededIds(world.rng("ledger")))
        catalog = await log.read()
        for name, possible in self._possible.items():
            found = _state_of(catalog, name)
            if found not in possible:
                world.violate(
                    f"acknowledged change of the catalog lost: collection {name} is {found}, "
                    f"should be {' or '.join(sorted(possible))}"
                )
        return set(catalog.collections)


def _state_of(catalog: Catalog, name: str) -> str:
    record = catalog.by_name(name)
    if record is None:
        return ABSENT
    return ALTERED if EXTRA in record.schema.attributes else CREATED
