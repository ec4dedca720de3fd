"""What a search of a segment costs in each family, and the family and codes a segment gets. Pure.

Costs are nanoseconds of one thread, measured (docs/design/index-families.md names the command);
only their ratios decide. Before a segment is built nobody knows how deep its codes must be rescored
and how many lists must be scanned for a target: `expect_effort` is what real embeddings needed.
Once it is built its own recall curve says so, and the same costs choose among its settings.

The metric plays no part: inner products and squared distances take the same kernels and the same
codes, and cosine is the former.
"""

import math
from dataclasses import dataclass
from typing import Final

from shoal_cluster.domain.schema import MemoryTier, VectorStorage
from shoal_cluster.index.families import CodeShape, Effort, Family

FLAT_ROWS_MAX: Final = 1_024
"""One seal's worth: such a segment builds in a tenth of the time without codes, and fewer rows do
not train 16 centroids well (FAISS asks for 624)."""

FLAT_VALUES_MAX: Final = 576_000
"""Rows × dimension (1,500 × 384) that one scan covers in 70 µs, about what a code scan and its
rescoring cost at this size: short vectors stay flat for longer."""

FLAT_DIMENSION_MIN: Final = 8
"""FAISS's row kernels are vectorised from 8 values on; 3-d rows cost 7 ns each, as much as 50-d."""

CODED_DIMENSION_MIN: Final = 8
"""16 bytes of codes hold too little of shorter rows: of 100,000 × 3, 1,280 candidates held 0.59 of
the ten nearest, while comparing all takes 0.6 ms."""

INVERTED_ROWS_MIN: Final = 100_000
"""Below, an inverted file was never measured to be faster, and its lists are short of a block."""

TABLE_NS, TABLE_CODE_NS = 6_000.0, 25.0
"""Of a code scan, once a query: the call, and the look-up table of each code."""
SCAN_ROW_NS, SCAN_CODE_NS = 0.2, 0.0155
"""Of a code scan, each row and each of its codes."""
FILTERED_ROW_NS: Final = 0.8
"""More for each row where a filter is looked up in the scan: what does not pass leaves FAISS's
threshold loose. 25 to 120 us for 100,000 rows, most where 2 to 10 % pass."""
PROBE_NS: Final = 500.0
"""Each list scanned: 280 more lists with as many rows in all took 0.13 ms more."""
CENTRE_VALUE_NS: Final = 0.13
"""Each value of a list's centre: every centre is compared with the query."""
CANDIDATE_NS: Final = 90.0
"""Each candidate: kept by the scan, put in order, its row's first cache miss."""
VALUE_NS: Final = {VectorStorage.FLOAT32: 0.5, VectorStorage.FLOAT16: 1.0}
"""Each value of a row in no order: 0.21 µs a row of 384 float32; widening a float16 adds 0.5 ns."""
SCANNED_VALUE_NS: Final = {VectorStorage.FLOAT32: 0.34, VectorStorage.FLOAT16: 0.7}
"""Each value when all rows are compared in order: 13 ms for 100,000 × 384."""
DISK_ROW_NS: Final = 18_000.0
"""Each row that is not in the page cache, asked of the disk together with others: 240 rows took
4.4 ms, one by one 26 ms, and 260 ms with the kernel's own read-ahead."""

_TARGETS: Final = (0.90, 0.95, 0.98, 0.99, 0.999)
_DEPTH_FACTORS: Final = (0.55, 1.0, 2.0, 3.3, 12.0)
"""Candidates needed for a target, in those needed for 0.95."""
_PROBED_SHARES: Final = (0.02, 0.05, 0.1, 0.22, 0.8)
"""Share of the lists of a million rows to be scanned for a target."""
_MEASURED_ROWS, _MEASURED_LISTED_ROWS = 100_000, 1_000_000
_DEPTH_MIN: Final = 12

_VALUES_A_CODE: Final = (4, 2, 1)
WIDE_DIMENSION_MIN: Final = 256
"""From here codes of one value each take 128 bytes and more; nothing measured needs them."""
_PREFERENCE: Final = 0.85
"""More memory or a longer build must make a search this much cheaper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Costs of reading one segment's vectors and codes."""

    dimension: int
    storage: VectorStorage = VectorStorage.FLOAT32
    tier: MemoryTier = MemoryTier.COMPACT

    def exact_ns(self, rows: int) -> float:
        """Returns the cost of comparing so many rows in order."""
        return rows * max(self.dimension, FLAT_DIMENSION_MIN) * SCANNED_VALUE_NS[self.storage]

    def gather_ns(self, rows: int) -> float:
        """Returns the cost of comparing so many rows in no order."""
        row_ns = self.dimension * VALUE_NS[self.storage]
        if self.tier is MemoryTier.DISK:
            row_ns += DISK_ROW_NS
        return rows * row_ns

    def scan_ns(
        self, rows: int, shape: CodeShape, effort: Effort, *, filtered: bool = False
    ) -> float:
        """Returns the cost of a code scan and of rescoring what it proposes.

        filtered: only some of the rows may be proposed.
        """
        codes = -(-self.dimension // shape.values_a_code)
        scanned = rows * min(effort.probes / shape.lists, 1.0)
        cost = TABLE_NS + codes * TABLE_CODE_NS + scanned * (SCAN_ROW_NS + codes * SCAN_CODE_NS)
        if filtered:
            cost += scanned * FILTERED_ROW_NS
        if shape.lists > 1:
            cost += shape.lists * self.dimension * CENTRE_VALUE_NS + effort.probes * PROBE_NS
        return cost + effort.depth * CANDIDATE_NS + self.gather_ns(effort.depth)


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyChoice:
    """What to build. shape: None for a flat segment. reason: for `explain` and the meta file."""

    family: Family
    shape: CodeShape | None
    reason: str


def lists_for(rows: int) -> int:
    """Returns how many lists an inverted file over so many rows gets: some 500 rows a list."""
    return 2 * math.isqrt(rows)


def expect_effort(rows: int, dimension: int, shape: CodeShape, recall_target: float) -> Effort:
    """Returns what embeddings needed at k = 10; recall 1.0 is taken as 0.999.

    Candidates: 1,300 · v^2.5 / d for 0.95 at 100,000 rows with v values a code, growing with
    n^0.4. Fitted to 100,000 sentence embeddings of 384 values and their first 8 … 128 principal
    components, within a factor of two. Lists: the share falls with n^0.6. Behind lists, half of the
    misses are left to them and half to the codes.
    """
    if shape.lists > 1:
        recall_target = (1 + recall_target) / 2
    depth = 1_300 * shape.values_a_code**2.5 / dimension
    depth *= _at(recall_target, _DEPTH_FACTORS) * (rows / _MEASURED_ROWS) ** 0.4
    probes = 1
    if shape.lists > 1:
        share = _at(recall_target, _PROBED_SHARES) * (rows / _MEASURED_LISTED_ROWS) ** -0.6
        probes = min(math.ceil(share * shape.lists), shape.lists)
    return Effort(depth=min(max(math.ceil(depth), _DEPTH_MIN), rows), probes=probes)


def _at(recall_target: float, values: tuple[float, ...]) -> float:
    """Interpolates in the logarithms of misses and of values; constant outside."""
    misses = max(1 - recall_target, 1 - _TARGETS[-1])
    for i in range(1, len(_TARGETS)):
        left, right = 1 - _TARGETS[i - 1], 1 - _TARGETS[i]
        if misses >= right:
            share = max(math.log(left / misses), 0.0) / math.log(left / right)
            return float(values[i - 1] ** (1 - share) * values[i] ** share)
    return values[-1]


def choose_family(rows: int, model: CostModel, recall_target: float) -> FamilyChoice:
    """Returns what a segment of so many rows is built as, and why."""
    dimension = model.dimension
    if rows <= FLAT_ROWS_MAX:
        reason = f"{rows} rows are at most {FLAT_ROWS_MAX}"
        return FamilyChoice(family=Family.FLAT, shape=None, reason=reason)
    if rows * max(dimension, FLAT_DIMENSION_MIN) <= FLAT_VALUES_MAX:
        reason = f"{rows} rows x {dimension} are at most {FLAT_VALUES_MAX} values"
        return FamilyChoice(family=Family.FLAT, shape=None, reason=reason)
    if dimension < CODED_DIMENSION_MIN:
        reason = f"codes of {dimension} values rank too badly"
        return FamilyChoice(family=Family.FLAT, shape=None, reason=reason)
    chosen: tuple[float, CodeShape] | None = None
    compared = [f"flat {_text(model.exact_ns(rows))}"]
    for shape in _shapes(rows, dimension):
        effort = expect_effort(rows, dimension, shape, recall_target)
        cost = model.scan_ns(rows, shape, effort)
        compared.append(f"{shape_text(shape)} {_text(cost)}")
        if chosen is None or cost < _PREFERENCE * chosen[0]:
            chosen = (cost, shape)
    if chosen is None or chosen[0] > model.exact_ns(rows):
        reason = f"codes cost no less: {', '.join(compared)} expected"
        return FamilyChoice(family=Family.FLAT, shape=None, reason=reason)
    family = Family.FAST_SCAN if chosen[1].lists == 1 else Family.INVERTED
    reason = (
        f"{shape_text(chosen[1])} for recall {recall_target:g} of {rows} rows x {dimension}, "
        f"{model.tier.value}: {', '.join(compared)} expected"
    )
    return FamilyChoice(family=family, shape=chosen[1], reason=reason)


def shape_text(shape: CodeShape) -> str:
    lists = "" if shape.lists == 1 else f" in {shape.lists} lists"
    return f"{4 / shape.values_a_code:g} bits a value{lists}"


def _shapes(rows: int, dimension: int) -> list[CodeShape]:
    """Returns the candidates, what takes least memory and time to build first."""
    return [
        CodeShape(values_a_code=values, lists=lists)
        for lists in ([1] if rows < INVERTED_ROWS_MIN else [1, lists_for(rows)])
        for values in _VALUES_A_CODE
        if values > 1 or dimension < WIDE_DIMENSION_MIN
    ]


def _text(cost_ns: float) -> str:
    return f"{cost_ns / 1e6:.2f} ms"
