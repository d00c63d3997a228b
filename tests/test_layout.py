"""The house rules that a machine can check: one idea per file, short files, relative imports, one public face."""

from __future__ import annotations

import ast
import importlib
import tomllib
from pathlib import Path
from typing import Literal, get_origin

import foldline as fl
import pytest
from foldline import passes as P
from foldline.passes import registry

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("graph", "passes", "backends", "cli")
MAY_IMPORT = {room: set(ROOMS[: i + 1]) for i, room in enumerate(ROOMS)}
FILES = sorted([*(p for room in ROOMS for p in (ROOT / room).rglob("*.py")), *ROOT.glob("cli*.py")])


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return "cli" if first.startswith("cli") else first


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module of foldline that a file imports, as a path from the root, with the line."""
    found = []
    folder = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level - 1 <= len(folder), f"{path}:{node.lineno} leaves the package"
            base = folder[: len(folder) - node.level + 1]
            heads = [node.module] if node.module else [a.name for a in node.names]
            found += [(".".join((*base, head)), node.lineno) for head in heads]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "foldline":
            found.append((f"foldline:{node.module}", node.lineno))
        elif isinstance(node, ast.Import):
            found += [(f"foldline:{a.name}", node.lineno) for a in node.names if a.name.split(".")[0] == "foldline"]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way_and_relatively(room: str) -> None:
    wrong = []
    for path in FILES:
        if room_of(path) != room:
            continue
        for module, line in imports(path):
            first = module.split(".")[0]
            first = "cli" if first.startswith("cli") else first
            if first not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_rule_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "graph" / "ops").mkdir(parents=True)
    path = tmp_path / "graph" / "ops" / "x.py"
    path.write_text(
        "def f():\n    from ...passes.base import Pass\n    from ... import backends\n    import foldline.cli\n"
    )
    assert [m for m, _ in imports(path)] == ["passes.base", "backends", "foldline:foldline.cli"]


def test_no_pass_knows_a_concrete_backend() -> None:
    for path in FILES:
        if room_of(path) == "passes":
            assert 'importlib.import_module("..backends' not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is_and_is_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text))
    assert doc and len(doc.splitlines()[0]) > 10, "the first line says which idea the file holds"
    assert len(text.splitlines()) <= 400, "split files over 400 lines"


def test_no_file_swallows_errors() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{path}:{node.lineno}"


def test_public_face_is_complete_and_lazy() -> None:
    for name in fl.__all__:
        assert getattr(fl, name) is not None
    assert sorted(fl.__all__) == list(fl.__all__) and set(fl.__all__) <= set(dir(fl))
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        fl.prune  # noqa: B018
    assert len((ROOT / "__init__.py").read_text().splitlines()) <= 130


def test_passes_are_classes_and_functions_even_after_their_modules_are_imported() -> None:
    for name, cls in (("fold", P.Fold), ("prune", P.Prune), ("lower", P.Lower), ("finetune", P.FineTune)):
        importlib.import_module(f"foldline.passes.{name}")
        function = getattr(P, name)
        assert callable(function) and function.__name__ == name and cls.name == name
        assert (cls.__doc__ or "").splitlines()[0] in (function.__doc__ or "")
    with pytest.raises(AttributeError, match="passes: fold"):
        P.nothing  # noqa: B018


def test_every_registered_pass_declares_itself() -> None:
    for name in P.names():
        cls = P.get(name)
        assert (
            cls.name == name and cls.__doc__ and isinstance(cls.contract, P.Contract) and isinstance(cls.needs, P.Needs)
        )
        for option, info in cls.model_fields.items():
            choices = get_origin(info.annotation) is Literal  # which may speak for themselves
            assert info.description or choices, f"{name}.{option} has no docstring"


def test_versions_agree() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == fl.__version__


def test_documentation_lists_every_pass_and_option() -> None:
    """docs/passes.md is what ``foldline passes --markdown`` prints."""
    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    for name in registry.BUILTIN:
        assert f"\n## {name}\n" in text, f"run `foldline passes --markdown > docs/passes.md` for {name}"
        for option in P.get(name).model_fields:
            assert f"\n| {option} |" in text, f"run `foldline passes --markdown > docs/passes.md` for {name}.{option}"
