"""What each entry of a configuration does to the sizes of a module, seen by changing it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .config_entries import Entries

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Sizes: TypeAlias = Mapping[tuple[str, str], Any]
Table: TypeAlias = dict[tuple[Any, ...], Any]
Tables: TypeAlias = tuple[Table, Table]
"""Sizes of the axes of tensors, and integer attributes of modules."""


def tables(shapes: Shapes, sizes: Sizes) -> Tables:
    """Both as flat tables."""
    return {(name, i): n for name, shape in shapes.items() for i, n in enumerate(shape)}, dict(sizes)


class Effects:
    """Says what a module built with several entries changed would look like, from builds that change one each.

    Said only where no two of the entries change the same thing, and the set of tensors stays the same; what is said is
    a guess that steers a search, to be confirmed by a build.

    Args:
        before: what the configuration as it is gives.
        build: what it gives with some entries changed; None if it cannot be built.
    """

    def __init__(self, before: Tables, build: Callable[[Entries], Tables | None]) -> None:
        self.before, self.build = before, build
        self.alone: dict[tuple[str, int | None], Tables | None] = {}

    def of(self, entry: str, value: int | None) -> Tables | None:
        """What one entry changes, and to what; None if something else than sizes changes."""
        key = entry, value
        if key not in self.alone:
            built = self.build({entry: value})
            same = built is not None and all(
                now.keys() == old.keys() for now, old in zip(built, self.before, strict=True)
            )
            self.alone[key] = _changes(built, self.before) if same and built is not None else None
        return self.alone[key]

    def together(self, found: Entries) -> tuple[Table | None, Table | None]:
        """Changes of tensors and of attributes under these entries; None where that cannot be said."""
        effects = [self.of(e, v) for e, v in found.items()]
        if any(effect is None for effect in effects):
            return None, None
        made: list[Table | None] = []
        for parts in zip(*(effect for effect in effects if effect is not None), strict=True):
            joint = {k: v for part in parts for k, v in part.items()}
            made.append(joint if len(joint) == sum(map(len, parts)) else None)
        return (made[0], made[1]) if made else ({}, {})


def _changes(now: Tables, before: Tables) -> Tables:
    one, other = ({k: v for k, v in new.items() if v != old[k]} for new, old in zip(now, before, strict=True))
    return one, other


class Misses:
    """How many of the wanted sizes a module with some changes would not have."""

    def __init__(self, before: Table, wanted: Table) -> None:
        self.before, self.wanted = before, wanted
        self.at_first = sum(before.get(k) != v for k, v in wanted.items())

    def under(self, changes: Table) -> int:
        """The count with these sizes instead of those from before."""
        found = self.at_first
        for k, v in changes.items():
            if k in self.wanted:
                found += (v != self.wanted[k]) - (self.before.get(k) != self.wanted[k])
        return found
