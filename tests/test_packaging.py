"""What pyproject.toml lists is what the tree holds, and rooms import one way only."""

from __future__ import annotations

import ast
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("graph", "passes", "backends")
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed() -> None:
    found = {"foldline"}
    for room in SHIPPED:
        found |= {".".join(("foldline", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / room).rglob("__init__.py")}
    assert found == set(SETUP["packages"])


def test_every_module_and_data_file_is_in_a_listed_package() -> None:
    patterns = SETUP["package-data"]
    for room in SHIPPED:
        for path in (ROOT / room).rglob("*"):
            if path.suffix == ".py":
                assert (path.parent / "__init__.py").exists(), f"{path.relative_to(ROOT)} is in no package"
            elif path.is_file() and path.suffix in (".yaml", ".json", ".html", ".css"):
                inner = next(p for p in path.parents if (p / "__init__.py").exists())
                package = ".".join(("foldline", *inner.relative_to(ROOT).parts))
                name = path.relative_to(inner).as_posix()
                globs = [*patterns.get("*", []), *patterns.get(package, [])]
                assert any(fnmatch(name, g) and name.count("/") == g.count("/") for g in globs), f"{package}: {name}"


ALLOWED = {
    "graph": {"graph"},
    "passes": {"graph", "passes"},
    "backends": {"graph", "passes", "backends"},
}


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module of the package imports, at module level or inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.relative_to(ROOT).parent.parts[: len(path.relative_to(ROOT).parent.parts) - node.level + 1]
            names = [".".join((*base, *(node.module or "").split(".")))] if node.module else []
            names += [] if node.module else [".".join((*base, alias.name)) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "foldline":
            names = [(node.module or "").removeprefix("foldline").lstrip(".") or a.name for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.removeprefix("foldline.") for a in node.names if a.name.startswith("foldline")]
        rooms |= {name.split(".")[0] for name in names if name}
    return rooms


@pytest.mark.parametrize("room", SHIPPED)
def test_rooms_import_one_way_only(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        wrong = imported_rooms(path) - ALLOWED[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"
