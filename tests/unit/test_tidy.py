"""Where drift is silent a plain test looks: names, sizes, paths, invariants.

Each rule is a function over the tree that returns what breaks it, so that the second test of each
pair can show it a tree that does.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE_ROOTS = ("client", "protos", "cluster", "chaos", "tests")
CLUSTER = Path("cluster/shoal_cluster")

MODULE_LINES_MAX = 600
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
BANNED_WORDS = {
    "util", "utils", "helper", "helpers", "common", "misc", "base", "manager", "managers",
    "handler", "handlers", "processor", "data", "info", "new", "old", "v2", "impl",
}  # fmt: skip
PACKAGES_WITH_PROTOCOL = ("bucket", "manifest", "wal")

# A path of one machine, or the address of a package registry: neither means anything elsewhere.
MACHINE_PATH = re.compile(r"(?:^|[^A-Za-z0-9._-])/(?:work|farm)/")
REGISTRY = re.compile(
    r"\b(?:pypi\.org|files\.pythonhosted\.org|[\w.-]*(?:artifactory|devpi|nexus)[\w-]*\.[a-z]{2,})\b"
    r"|--(?:extra-)?index-url|\bfind-links\b",
    re.IGNORECASE,
)

INVARIANT = re.compile(r"\b([A-Z]{1,2}-\d{1,2})\b")
# `M-1 text`, `- **M-1** text`, `| M-1 | text`: the id leads the line that says what must hold.
DEFINITION = re.compile(r'^[\s>#*|"-]*([A-Z]{1,2}-\d{1,2})\**[\s:.|]+\S')

NONDETERMINISTIC_WHEN_UNSEEDED = {"Random", "default_rng", "RandomState"}


def tracked_files(root: Path) -> list[Path]:
    """Returns what a clone would hold, relative to `root`: git's list where there is one."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        check=False,
        text=True,
    )
    if listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
        return [name for name in names if (root / name).is_file()]
    return [
        path.relative_to(root)
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def modules(root: Path) -> Iterator[Path]:
    """Yields the Python files that people write."""
    for path in tracked_files(root):
        if path.suffix == ".py" and path.parts[0] in CODE_ROOTS and not GENERATED.search(path.name):
            yield path


def text_of(path: Path) -> str | None:
    """Returns the file's text, or None when it is binary."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


# --------------------------------------------------------------------------------------- the rules


def long_modules(root: Path) -> list[str]:
    counted = ((path, len((root / path).read_text().splitlines())) for path in modules(root))
    return [f"{path}: {lines} lines" for path, lines in counted if lines > MODULE_LINES_MAX]


def badly_named_modules(root: Path) -> list[str]:
    return [
        str(path)
        for path in modules(root)
        if any(
            BANNED_WORDS & set(part.removesuffix(".py").split("_"))
            for part in path.parts[1:]
            if part != "conftest.py"
        )
    ]


def init_modules_with_code(root: Path) -> list[str]:
    """An `__init__` is empty or re-exports: a docstring, imports and `__all__`, nothing else."""
    found = []
    for path in modules(root):
        if path.name != "__init__.py":
            continue
        for node in ast.parse((root / path).read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            exports = isinstance(node, ast.Assign) and all(
                isinstance(target, ast.Name)
                and target.id.startswith("__")
                and target.id.endswith("__")
                for target in node.targets
            )
            if not (docstring or exports or isinstance(node, ast.Import | ast.ImportFrom)):
                found.append(f"{path}:{node.lineno}")
    return found


def local_addresses(root: Path) -> list[str]:
    found = []
    for path in tracked_files(root):
        if path == Path("tests/unit/test_tidy.py"):
            continue  # it has to spell what it looks for
        text = text_of(root / path)
        for number, line in enumerate((text or "").splitlines(), start=1):
            if MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    return found


def unpinned_constraints(root: Path) -> list[str]:
    pin = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.!+_-]*")
    lines = (root / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#") and not pin.fullmatch(line)]


def packages_without_readme(root: Path) -> list[str]:
    return [
        package
        for package in PACKAGES_WITH_PROTOCOL
        if any((root / CLUSTER / package).glob("*.py"))
        and not (root / CLUSTER / package / "README.md").is_file()
    ]


def unseeded_generators(root: Path) -> list[str]:
    """Finds `Random()` and `default_rng()` without a seed, which the linter cannot."""
    found = []
    for path in modules(root):
        if path.parts[0] != "cluster":
            continue
        for node in ast.walk(ast.parse((root / path).read_text())):
            if isinstance(node, ast.Call) and not node.args and not node.keywords:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else None
                name = node.func.id if isinstance(node.func, ast.Name) else name
                if name in NONDETERMINISTIC_WHEN_UNSEEDED:
                    found.append(f"{path}:{node.lineno}: {name}()")
    return found


def modules_of_the_sdk_with_shared_randomness(root: Path) -> list[str]:
    """Finds calls of `random.random()` and its like; a `random.Random` handed in is fine."""
    drawn = re.compile(
        r"\brandom\.(?!Random\b)[a-z]\w*\(|^from random import (?!Random$)", re.MULTILINE
    )
    return [
        str(path)
        for path in modules(root)
        if path.parts[0] == "client" and drawn.search((root / path).read_text())
    ]


def package_of_invariants(path: Path) -> Path | None:
    """Returns the package under the cluster that a file belongs to."""
    if path.parts[: len(CLUSTER.parts)] != CLUSTER.parts or len(path.parts) <= len(CLUSTER.parts):
        return None
    return Path(*path.parts[: len(CLUSTER.parts) + 1])


def definitions(root: Path, paths: list[Path]) -> dict[str, list[str]]:
    """Returns for each invariant id the places whose line begins with it."""
    places: dict[str, list[str]] = {}
    for path in paths:
        for number, line in enumerate((root / path).read_text().splitlines(), start=1):
            if match := DEFINITION.match(line):
                places.setdefault(match[1], []).append(f"{path.name}:{number}")
    return places


def loose_invariants(root: Path) -> list[str]:
    """Finds invariant ids in package READMEs that are not defined once, or that no test names.

    One module of the package defines the id at the start of a docstring's or comment's line and the
    README quotes it; or no module does, and the README itself defines it on one line.
    """
    written = list(modules(root))
    tests = "\n".join(
        (root / path).read_text()
        for path in written
        if path.parts[0] in ("tests", "chaos") and path != Path("tests/unit/test_tidy.py")
    )
    found = []
    for readme in tracked_files(root):
        package = package_of_invariants(readme)
        if readme.name != "README.md" or readme.parent != package:
            continue
        in_code = definitions(root, [p for p in written if package_of_invariants(p) == package])
        in_readme = definitions(root, [readme])
        for name in sorted(set(INVARIANT.findall((root / readme).read_text()))):
            places = in_code.get(name) or in_readme.get(name, [])
            if len(places) != 1:
                found.append(f"{readme}: {name} is defined {len(places)} times {places}")
            if not re.search(rf"\b{name}\b", tests):
                found.append(f"{readme}: no test names {name}")
    return found


def stores_of_actors_that_outlive_a_failed_fsync(root: Path) -> list[str]:
    """Finds buckets opened by an actor without a word on what happens when they break."""
    return [
        f"{path}: {line.strip()}"
        for path in modules(root)
        if path.is_relative_to(CLUSTER / "actors")
        for line in (root / path).read_text().splitlines()
        if "open_store(" in line and "on_broken=end_process" not in line
    ]


# --------------------------------------------------------------------------------------- the tests

RULES = [
    long_modules,
    badly_named_modules,
    init_modules_with_code,
    local_addresses,
    unpinned_constraints,
    packages_without_readme,
    unseeded_generators,
    modules_of_the_sdk_with_shared_randomness,
    loose_invariants,
    stores_of_actors_that_outlive_a_failed_fsync,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_breaks_no_rule(rule):
    assert rule(ROOT) == []


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


OFFENCES = {
    "long_modules": ("cluster/shoal_cluster/a.py", "x = 1\n" * (MODULE_LINES_MAX + 1)),
    "badly_named_modules": ("cluster/shoal_cluster/shard/shard_utils.py", ""),
    "init_modules_with_code": ("client/shoal/__init__.py", '"""Doc."""\nprint(1)\n'),
    "local_addresses": ("docs/a.md", "see /wo" + "rk/somewhere\n"),
    "unpinned_constraints": ("constraints.txt", "numpy @ file:///tmp/numpy.whl\n"),
    "packages_without_readme": ("cluster/shoal_cluster/wal/log.py", ""),
    "unseeded_generators": ("cluster/shoal_cluster/a.py", "import random\nr = random.Random()\n"),
    "modules_of_the_sdk_with_shared_randomness": (
        "client/shoal/a.py",
        "import random\nx = random.uniform(0, 1)\n",
    ),
    "stores_of_actors_that_outlive_a_failed_fsync": (
        "cluster/shoal_cluster/actors/a.py",
        "store = open_store(bucket)\n",
    ),
    "loose_invariants": ("cluster/shoal_cluster/wal/README.md", "W-1 slots are contiguous\n"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_can_fail(rule, tmp_path):
    name, text = OFFENCES[rule.__name__]
    write(tmp_path, name, text)
    assert len(rule(tmp_path)) >= 1


def test_an_invariant_defined_once_and_used_by_a_test_is_accepted(tmp_path):
    write(tmp_path, "cluster/shoal_cluster/wal/README.md", "- **W-1**: slots are contiguous\n")
    defined = '"""W-1 slots are contiguous."""\n'
    write(tmp_path, "cluster/shoal_cluster/wal/log.py", defined)
    write(tmp_path, "tests/unit/test_wal.py", '"""Checks W-1."""\n')
    assert loose_invariants(tmp_path) == []

    write(tmp_path, "cluster/shoal_cluster/wal/again.py", defined)
    assert len(loose_invariants(tmp_path)) == 1


def test_ray_cannot_be_imported_inside_a_unit_test():
    with pytest.raises(ImportError):
        import ray  # noqa: F401
