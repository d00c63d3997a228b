"""What pyproject.toml lists is what the tree holds."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

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
