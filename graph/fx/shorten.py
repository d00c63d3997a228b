"""Taking dead entries out of the containers of a module: a forward that loops over its layers then runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .view import FXView


def dead_entries(graph: FXView, module: nn.Module) -> list[str]:
    """Paths of the entries of ModuleLists and Sequentials all of whose calls were erased from the graph."""
    live = {n.name for n in graph.nodes}
    if live >= graph.pristine.keys():
        return []  # none was erased
    called: dict[str, bool] = {}
    for name, record in graph.pristine.items():
        path = record.scope
        while path:
            called[path] = called.get(path, False) or name in live
            path = path.rpartition(".")[0]
    found = []
    for path, alive in called.items():
        parent, _, leaf = path.rpartition(".")
        holder = _submodule(module, parent)
        if not alive and isinstance(holder, (nn.ModuleList, nn.Sequential)) and leaf in holder._modules:
            found.append(path)
    return [p for p in found if not any(p.startswith(f"{q}.") for q in found)]


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:  # a scope that names no module of the tree
        return None


_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes under which layers keep their own place in the stack (key-value caches are addressed by it)."""


def _renumber(entry: nn.Module, old: str, new: str) -> None:
    for m in entry.modules():
        for name in _NUMBERS:
            if old.isdigit() and vars(m).get(name) == int(old):
                setattr(m, name, int(new))


def shorten(module: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Delete the entries and close the gaps, in place.

    Returns:
        Old path -> new path of every entry that moved.
    """
    gone: dict[str, set[str]] = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        gone.setdefault(parent, set()).add(leaf)
    moved: dict[str, str] = {}
    for parent, leaves in sorted(gone.items(), key=lambda item: -item[0].count(".")):
        holder = module.get_submodule(parent)
        entries = [(key, child) for key, child in holder._modules.items() if key not in leaves]
        numbered = all(key.isdigit() for key, _ in entries)
        holder._modules.clear()
        for i, (key, child) in enumerate(entries):
            new = str(i) if numbered else key
            holder._modules[new] = child
            if new != key:
                if child is not None:
                    _renumber(child, key, new)
                prefix = f"{parent}." if parent else ""
                moved[f"{prefix}{key}"] = f"{prefix}{new}"
    return moved


def renamed(name: str, moved: dict[str, str]) -> str:
    """A state-dict name after entries moved (the outermost container that holds it decides first)."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        old = ".".join(parts[:i])
        if old in moved:
            return moved[old] + name[len(old) :]
    return name
