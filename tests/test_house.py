"""How the tests are arranged."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


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
