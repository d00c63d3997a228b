"""Union-find over names, in which the first of a group in a given order is its root."""

from __future__ import annotations

from collections.abc import Iterable


class Groups:
    """Disjoint sets of names; near-constant time per operation."""

    def __init__(self, names: Iterable[str]) -> None:
        self._order = {name: i for i, name in enumerate(names)}
        self._parent = {name: name for name in self._order}

    def root(self, name: str) -> str:
        """The first name of the group, in the order given."""
        top = name
        while self._parent[top] != top:
            top = self._parent[top]
        while self._parent[name] != top:
            self._parent[name], name = top, self._parent[name]
        return top

    def join(self, a: str, b: str) -> bool:
        """Make one group of two; False if they were one already."""
        first, second = sorted((self.root(a), self.root(b)), key=self._order.__getitem__)
        self._parent[second] = first
        return first != second
