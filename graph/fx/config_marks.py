"""Integers that remember their entry: where a module built from a configuration holds its entries, unchanged."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

from .config_entries import Entries, configs, is_config, place_of
from .walk import modules_of

Places: TypeAlias = dict[tuple[str, str, int | None], str]
"""(path of a module, its attribute, position in it if that is a list) -> the entry that is held there."""


class Marked(int):
    """A number from a configuration, with the name of its entry; what is computed from it is a plain number."""

    entry: str

    def __deepcopy__(self, memo: Any) -> Marked:
        return self


def mark(config: Any, entries: Entries) -> None:
    """Let the integer entries of a configuration know their names."""
    for name, value in entries.items():
        if value is not None:
            owner, attribute, i = place_of(config, name)
            held = vars(owner)
            now = held.get(attribute)
            if i is None and type(now) is int:
                held[attribute] = _marked(now, name)
            elif i is not None and type(now) in (list, tuple) and i < len(now):
                held[attribute] = type(now)([*now[:i], _marked(now[i], name), *now[i + 1 :]])


def _marked(value: int, name: str) -> Marked:
    made = Marked(value)
    made.entry = name
    return made


def unmark(built: nn.Module) -> Places:
    """Replace the marked numbers in a module by plain ones; tells where they were."""
    found: Places = {}
    for path, m in modules_of(built):
        held = m.__dict__
        for name, value in held.items():
            if type(value) is Marked:
                found[path, name, None] = value.entry
                held[name] = int(value)
            elif type(value) in (tuple, list) and any([type(v) is Marked for v in value]):
                found |= {(path, name, i): v.entry for i, v in enumerate(value) if type(v) is Marked}
                held[name] = type(value)([int(v) if type(v) is Marked else v for v in value])
    for _, config in configs(built):
        forget(config)
    return found


def forget(config: Any) -> None:
    """Make a configuration's marked entries plain numbers again."""
    held = vars(config)
    for name, value in held.items():
        if type(value) is Marked:
            held[name] = int(value)
        elif type(value) in (list, tuple) and any([type(v) is Marked for v in value]):
            held[name] = type(value)([int(v) if type(v) is Marked else v for v in value])
        elif is_config(value):
            forget(value)
