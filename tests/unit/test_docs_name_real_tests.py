"""The pages that name tests as evidence name tests that exist, and leave no promise without one."""

import ast
import re
from pathlib import Path

import pytest

from tests.model.protocol_model import BROKEN_VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PROMISE = ROOT / "docs" / "promise.md"
RESILIENCY = ROOT / "docs" / "resiliency.md"

NAMED_TEST = re.compile(r"`(test_\w+)`")
NAMED_VARIANT = re.compile(r"`([A-Z][A-Z_]+[A-Z])`")
NAMED_FILE = re.compile(r"`((?:tests|chaos|docs)/[\w/.]+)`")
UNPROMISED = "## Not promised"
STATUSES = ("designed out", "handled", "open")


def names_of_tests(root: Path) -> set[str]:
    """Returns the names of all test functions, also of those that are made by decorators."""
    return {
        node.name
        for path in (root / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def unknown_names(text: str, tests: set[str]) -> list[str]:
    """Returns the tests, variants and files that a page names and that do not exist."""
    variants = {variant.name for variant in BROKEN_VARIANTS}
    unknown = set(NAMED_TEST.findall(text)) - tests
    unknown |= set(NAMED_VARIANT.findall(text)) - variants
    unknown |= {name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()}
    return sorted(unknown)


def promises_without_test(text: str) -> list[str]:
    """Returns the list items before "Not promised" that name no test."""
    promised, found, _ = text.partition(UNPROMISED)
    assert found, f"the page has a section {UNPROMISED!r}"
    items = re.split(r"^- ", promised, flags=re.MULTILINE)[1:]
    sentences = [re.split(r"\n\n|\n#|\n\|", item)[0] for item in items]
    return [sentence[:80] for sentence in sentences if not NAMED_TEST.search(sentence)]


def scenarios(text: str) -> list[list[str]]:
    """Returns the cells of every row of the page's tables, headings left out."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]
    return [row for row in cells if row[0] != "Scenario"]


def faulty_scenarios(text: str) -> list[str]:
    """Returns the scenarios without a status we know, or without a test though not open."""
    faulty = []
    for row in scenarios(text):
        _, _, status, shown = row
        if not status.startswith(STATUSES):
            faulty.append(f"status {status[:40]!r}: {row[0][:60]}")
        elif "open" not in status and not NAMED_TEST.search(shown):
            faulty.append(f"no test: {row[0][:60]}")
    return faulty


@pytest.mark.parametrize("page", [PROMISE, RESILIENCY], ids=lambda page: page.name)
def test_every_name_on_the_page_exists(page):
    text = page.read_text()
    assert len(NAMED_TEST.findall(text)) > 20
    assert unknown_names(text, names_of_tests(ROOT)) == []


def test_every_promise_names_a_test():
    assert promises_without_test(PROMISE.read_text()) == []


def test_every_scenario_has_a_status_and_a_test_unless_open():
    text = RESILIENCY.read_text()
    assert len(scenarios(text)) > 30
    assert faulty_scenarios(text) == []


def test_the_checks_can_fail():
    assert unknown_names("`test_no_such` `NO_SUCH_VARIANT` `tests/no/such.py`", {"test_a"}) == [
        "NO_SUCH_VARIANT",
        "test_no_such",
        "tests/no/such.py",
    ]
    page = "- kept. `test_a`\n- not\n  kept.\n\n" + UNPROMISED + "\n- free"
    assert promises_without_test(page) == ["not\n  kept."]
    table = "| Scenario | Known from | Status | Test |\n|---|---|---|---|\n"
    assert faulty_scenarios(table + "| a | b | handled: so | `test_a` |") == []
    assert faulty_scenarios(table + "| a | b | open: so | |") == []
    assert faulty_scenarios(table + "| a | b | handled: so | |") == ["no test: a"]
    assert faulty_scenarios(table + "| a | b | fixed | `test_a` |") == ["status 'fixed': a"]
