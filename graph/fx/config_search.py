"""The search for the entries of a configuration that give a module of certain sizes, by building modules from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from .config_build import all_sizes, apart, built_from, entries_read, shapes_of
from .config_effects import Effects, Misses, Tables, tables
from .config_entries import Entries, attribute_of, integer_entries, set_entry, shorter_lists
from .config_marks import Places, forget, mark, unmark
from .layers import handled
from .patch import SizeChanges
from .walk import modules_of

if TYPE_CHECKING:
    from .view import FXView

Misfit: TypeAlias = tuple[int, int]
"""How many axes of tensors, and how many integer attributes of modules, are not as wanted."""
Found: TypeAlias = tuple[tuple[str, int | None], ...]

_MAX_BUILDS = 96
_NEVER: Misfit = (1 << 30, 1 << 30)
_BY_NAME = ("__class__", "__validators__")
"""What is read of a configuration on the way to one entry."""


class Search:
    """Which entries of one submodule's configuration have to change, and to what."""

    def __init__(
        self,
        graph: FXView,
        changes: SizeChanges,
        twin: nn.Module,
        path: str,
        m: nn.Module,
        dropped: Mapping[str, tuple[int, list[int]]],
    ) -> None:
        self.graph, self.twin, self.path, self.module = graph, twin, path, m
        self.config = m.config
        self.entries = integer_entries(self.config)
        self.shapes = shapes_of(m)
        self.known: dict[Found, nn.Module | None] = {}
        """What was built."""
        self.counted: dict[int, int] = {}
        self.read: set[str] = set()
        """Names of the entries that the first build looked at."""
        self.places: Places = {}
        """Where the first build holds entries as they are."""
        self.lists = shorter_lists(self.config, dropped.values())
        self.evidence = self._evidence(changes)
        for count, left in dropped.values():
            self.evidence.setdefault(count, []).append(len(left))
        self.whole = not dropped
        self.plain = False
        self.tried: set[Found] = set()

    def _evidence(self, changes: SizeChanges) -> dict[int, list[int]]:
        """Old size -> sizes that took its place in this submodule, the most widespread first."""
        prefix = f"{self.path}." if self.path else ""
        votes: dict[int, dict[int, int]] = {}
        for table in (changes.attrs, changes.shapes):
            for scope, evidence in table.items():
                if scope == self.path or scope.startswith(prefix):
                    for old, new in evidence.items():
                        for size in new - {old}:
                            counts = votes.setdefault(old, {})
                            counts[size] = counts.get(size, 0) + 1
        return {old: sorted(c, key=lambda s: (-c[s], -s)) for old, c in votes.items()}

    def _options(self) -> dict[str, list[int]]:
        """Entries that may have to change, and to what; what torch's own layers say of those they hold is so."""
        options = {e: self.evidence[v] for e, v in self.entries.items() if v is not None and v in self.evidence}
        if self.places:
            placed = set(self.places.values())
            for e in [e for e in options if "[" in e and e not in placed]:
                del options[e]  # an item of a list that no module holds says how many, or how often
        for e, sizes in self._held().items():
            if len(sizes) == 1:
                options[e] = list(sizes)
                if options[e] == [self.entries[e]]:
                    del options[e]
        return options

    def _corrected(self, guess: Entries) -> Entries:
        """A guess with what torch's own layers say."""
        said = {e: next(iter(sizes)) for e, sizes in self._held().items() if len(sizes) == 1}
        return {e: v for e, v in {**guess, **said}.items() if v != self.entries[e]}

    def _held(self) -> dict[str, dict[int, str]]:
        """Per entry that torch's own layers hold as it is: the sizes that these layers have in the twin, and where."""
        twins = dict(modules_of(self.module))
        wanted: dict[str, dict[int, str]] = {}
        for (path, name, i), entry in self.places.items():
            m = twins.get(path)
            if m is not None and handled(m):
                value = vars(m).get(name)
                if i is not None:
                    value = value[i] if isinstance(value, (tuple, list)) and i < len(value) else None
                if type(value) is int:
                    wanted.setdefault(entry, {}).setdefault(value, f"{path}.{name}")
        return wanted

    def _search(self) -> Entries:
        options = self._options()
        best: Entries = {e: o[0] for e, o in options.items()}
        if self._tensors(best):
            self._see(best)
            best = self._descend({} if self._closer({}, best) else best, options, 1)
        if self._tensors(best):
            best = self._descend(best, options, 2)
        if self._misfit(best)[0]:  # sizes that the configuration leaves to a default (4 x the width)
            open_ = [e for e, v in self.entries.items() if v is None and e not in best and self._is_read(e)]
            unset = {e: self._wanted(best, e) for e in open_}
            best = self._descend(best, {e: o for e, o in unset.items() if o}, 1)
        for entry in list(best):  # what only happens to hold an old size (a token id) stays as it was
            without = {e: v for e, v in best.items() if e != entry}
            if not self._differ(without, best) and self._signature(without) == self._signature(best):
                best = without
        return best

    def _alike(self, found: Entries) -> Iterator[Entries]:
        """What was found, and what fits as well by all that can be seen without running the model."""
        unclear = [
            e
            for e in self.entries
            if self._misfit({n: v for n, v in found.items() if n != e}) <= self._misfit(found) and e in found
        ]
        for count in range(min(len(unclear), 3) + 1):
            for left in combinations(unclear, count):
                tried = {n: v for n, v in found.items() if n not in left}
                if not self._misfit(tried)[0]:
                    yield tried

    def _signature(self, found: Entries) -> Any:
        built = self._build(found)
        return None if built is None else (shapes_of(built), all_sizes(built))

    def _descend(self, best: Entries, options: Mapping[str, list[int]], together: int) -> Entries:
        """Change ``together`` entries at a time for as long as that brings the built model closer."""
        improved = True
        while improved and self._tensors(best) and len(self.tried) < _MAX_BUILDS:
            improved = False
            for names in combinations(options, together):
                for values in product(*([self.entries[n], *options[n]] for n in names)):
                    tried = {**best, **dict(zip(names, values, strict=True))}
                    tried = {n: v for n, v in tried.items() if v != self.entries[n]}
                    if len(self.tried) < _MAX_BUILDS and self._closer(tried, best):
                        best, improved = tried, True
        return best

    def _closer(self, tried: Entries, best: Entries) -> bool:
        """Whether a misfit is smaller than another; built only where that is not clear from entries changed alone."""
        self.tried.add(tuple(sorted(tried.items())))
        a, b = self._tensors(tried), self._tensors(best)
        if a != b:
            return a < b
        if self.effects is not None:
            one, other = (self._together(f)[1] for f in (tried, best))
            if one is not None and other is not None:
                return self.misses[1].under(one) < self.misses[1].under(other)
        return self._misfit(tried) < self._misfit(best)

    def _tensors(self, found: Entries) -> int:
        """How many axes of tensors are not as wanted: as built, or as entries changed alone say."""
        if tuple(sorted(found.items())) not in self.known and self.effects is not None:
            changes = self._together(found)[0]
            if changes is not None:
                return self.misses[0].under(changes)
        built = self._build(found)
        return _NEVER[0] if built is None else self._apart(built)

    def _differ(self, a: Entries, b: Entries) -> bool:
        """Whether entries changed alone say that two configurations give different modules."""
        one, other = self._together(a), self._together(b)
        return any(x is not None and y is not None and x != y for x, y in zip(one, other, strict=True))

    @cached_property
    def sizes(self) -> dict[tuple[str, str], Any]:
        """The integer attributes of the twin's modules; what fits at the first guess needs none of them."""
        return all_sizes(self.module)

    @cached_property
    def misses(self) -> tuple[Misses, Misses]:
        """Of the axes of tensors and of the attributes; wanted are those of the twin."""
        assert self.effects is not None
        one, other = zip(self.effects.before, tables(self.shapes, self.sizes), strict=True)
        return Misses(*one), Misses(*other)

    @cached_property
    def effects(self) -> Effects | None:
        """Seen from the caller's own module, where it has the tensors of the twin."""
        source = self.graph.source.module
        try:
            original = None if source is None or not self.whole else source.get_submodule(self.path)
        except AttributeError:
            return None
        before = {} if original is None else shapes_of(original)
        if original is None or {n: len(s) for n, s in before.items()} != {n: len(s) for n, s in self.shapes.items()}:
            return None
        return Effects(tables(before, all_sizes(original)), self._looked_at)

    def _looked_at(self, found: Entries) -> Tables | None:
        built = self._build(found)
        return None if built is None else tables(shapes_of(built), all_sizes(built))

    def _see(self, found: Entries) -> None:
        """Change each entry alone; the configuration as it is need not be built if they keep to things of their own."""
        if self.effects is not None and len(found) > 1:
            self.plain = self.effects.together(found)[0] is not None

    def _together(self, found: Entries) -> Any:
        """What is changed together, as far as that can be said."""
        if self.effects is None or not (found or self.plain):
            return None, None
        return self.effects.together(found)

    def _wanted(self, found: Entries, entry: str) -> list[int]:
        """Sizes that may be missing: of an attribute of the entry's name, and of the axes that do not fit yet."""
        leaf = attribute_of(entry)
        named = [v for (_, k), v in self.sizes.items() if k == leaf and isinstance(v, int)]
        built = self._build(found)
        have = {} if built is None else shapes_of(built)
        both = [(s, have[n]) for n, s in self.shapes.items() if len(have.get(n, ())) == len(s)]
        axes = [w for s, h in both for w, other in zip(s, h, strict=True) if w != other]
        return list(dict.fromkeys([*named, *axes]))[:4]

    def _misfit(self, found: Entries) -> Misfit:
        built = self._build(found)
        if built is None:
            return _NEVER
        now = all_sizes(built)
        return self._apart(built), sum(now.get(k) != v for k, v in self.sizes.items())

    def _apart(self, built: nn.Module) -> int:
        """How many axes of tensors are not as wanted."""
        if id(built) not in self.counted:
            have = shapes_of(built)
            tensors = sum([apart(s, have.get(n)) for n, s in self.shapes.items()])
            self.counted[id(built)] = tensors + sum([len(s) + 1 for n, s in have.items() if n not in self.shapes])
        return self.counted[id(built)]

    def _build(self, found: Entries) -> nn.Module | None:
        key = tuple(sorted(found.items()))
        if key not in self.known:
            with nullcontext(self.read) if self.known else entries_read(self.config) as read:
                self.known[key] = self._built(found, not self.places)
            self.read |= read
        return self.known[key]

    def _is_read(self, entry: str) -> bool:
        """Whether a build looks at an entry of this name at all."""
        return attribute_of(entry) in self.read

    def _read_as_a_whole(self) -> bool:
        """Whether a build saw entries otherwise than by their names: all of them at once, as a dict or as a copy."""
        return any(name.startswith("__") and name not in _BY_NAME for name in self.read)

    def _built(self, found: Entries, marking: bool = False) -> nn.Module | None:
        """``marking``: note where the module holds entries (:attr:`places`), if it can be built from marked ones."""
        config = copy.deepcopy(self.config)
        try:
            for name, value in found.items():
                set_entry(config, name, value)
            for name, entries in self.lists.items():
                setattr(config, name, entries)
        except Exception:  # user code: a configuration that checks its entries
            return None
        kind, generation = type(self.module), vars(self.module).get("generation_config")
        if marking:
            mark(config, self.entries)
            if (built := built_from(kind, config, generation)) is not None:
                self.places = unmark(built)
                return built
            forget(config)
        return built_from(kind, config, generation)
