"""The house: which rooms may know of which, how long a file is, and how the tests are arranged."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "peft_queryable"

# From the bottom up: a file may import from its own level and from those below it, never from above.
LEVELS = (
    ("version", "reference_texts"),
    ("method.",),
    ("calls.",),
    ("card", "config", "encoders"),
    ("tuner.",),
    ("instruction", "tracing", "metrics", "statistics", "findings", "plots", "command"),
    ("routes",),
    ("callbacks", "columns", "check.", "export.", "inspect."),
    ("__init__", "__main__"),
)


def package_imports() -> dict[str, set[str]]:
    """By file of the package, as dotted names without the package's own, the files it imports."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in names.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("peft_queryable")):
                parts = name.split(".")[: -node.level] if node.level else []
                module = ".".join([*parts, *(node.module or "").removeprefix("peft_queryable").strip(".").split(".")])
                children = {f"{module}.{alias.name}".strip(".") for alias in node.names} & names.keys()
                graph[name] |= children or {module.strip(".") or "__init__"}
    return graph


def level(name: str) -> int:
    (found,) = [i for i, keys in enumerate(LEVELS) if any(f"{name}.".startswith(f"{k.rstrip('.')}.") for k in keys)]
    return found


def test_imports_only_go_down():
    """No file imports from a level above its own."""
    graph = package_imports()
    assert sum(map(len, graph.values())) > 60  # of every folder
    assert {(a, b) for a, imports in graph.items() for b in imports if level(b) > level(a)} == set()


def test_imports_make_no_circle():
    """The files of the package can be put in an order in which each imports only earlier ones."""
    order = list(TopologicalSorter(package_imports()).static_order())  # raises CycleError for a circle
    assert len(order) > 25


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_of_the_package_is_long(path):
    assert len(path.read_text().splitlines()) <= 300


def imported(path: Path) -> set[str]:
    """Every name between dots in the import statements of a file, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        if isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split(".")}
    return found


def test_no_test_file_imports_another():
    """What two test files share is in `helpers`, or a fixture of a `conftest.py`."""
    paths = list(TESTS.rglob("*.py"))
    hosts = {path.stem for path in paths if path.stem.startswith("test_")} | {"conftest"}
    assert len(hosts) > 40  # those of every folder
    assert {str(path): names for path in paths if (names := imported(path) & hosts)} == {}
