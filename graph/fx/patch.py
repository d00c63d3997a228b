"""Sizes that custom modules keep as Python attributes: which ints may have to change, learned from the edited graph."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from ..ir import Dim
from .layers import handled

if TYPE_CHECKING:
    from .view import FXView

Evidence: TypeAlias = dict[int, set[int]]
"""Old size -> sizes that took its place (itself included where one stayed)."""
Shape: TypeAlias = tuple[Dim, ...]


@dataclass(frozen=True)
class Patch:
    """One attribute write: ``owner.name = value``."""

    owner: Any
    name: str
    value: Any


def apply_patches(patches: list[Patch]) -> list[Patch]:
    """Write the attributes; returns the patches that undo it."""
    undo = [Patch(p.owner, p.name, getattr(p.owner, p.name)) for p in patches]
    for p in patches:
        setattr(p.owner, p.name, p.value)
    return undo[::-1]


def _pairs(old: Any, new: Any) -> list[tuple[int, int]]:
    """Aligned (old, new) integers of two attribute values or shapes."""
    if old is None or new is None:
        return []
    if type(old) is tuple and type(new) is tuple and len(old) == len(new):
        if all([type(a) is int and type(b) is int for a, b in zip(old, new, strict=True)]):
            return list(zip(old, new, strict=True))
    if isinstance(old, bool) or isinstance(new, bool):
        return []
    if isinstance(old, int) and isinstance(new, int):
        return [(old, new)]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return [p for a, b in zip(old, new, strict=True) for p in _pairs(a, b)]
    return []


def _note(evidence: Evidence, old: Shape | None, new: Shape | None) -> None:
    """Every size of a shape beside what it is now; nothing where the rank is another one."""
    if old is not None and new is not None and len(old) == len(new):
        for a, b in zip(old, new, strict=True):
            if type(a) is int and type(b) is int:
                evidence[a].add(b)


_SIZE_ATTRS = frozenset(
    ("shape", "sizes", "groups", "starts", "ends", "repeats", "normalized_shape", "pads", "factor", "index")
)


class SizeChanges:
    """What happened to sizes, per module scope and kind of evidence (strongest first).

    Tiers: constants baked in the module's own calls; shapes its own calls make; shapes made and tensors held by its
    direct children; the same for the whole subtree.
    """

    def __init__(self, graph: FXView) -> None:
        self.attrs: dict[str, Evidence] = defaultdict(lambda: defaultdict(set))
        self.shapes: dict[str, Evidence] = defaultdict(lambda: defaultdict(set))
        for node in graph.nodes:
            record = graph.pristine.get(node.name)
            if record is None:
                continue
            for key in [k for k in record.attrs if k in _SIZE_ATTRS]:
                for old, new in _pairs(record.attrs[key], node.attrs.get(key)):
                    self.attrs[record.scope][old].add(new)
            made = self.shapes[record.scope]
            for before, value in zip(record.shapes, node.outputs, strict=False):
                _note(made, before, value.shape)
        for name, weight in graph.weights.items():
            if name in graph.originals:
                before = tuple(graph.originals[name].shape)
                for alias in weight.aliases:
                    _note(self.shapes[alias.rpartition(".")[0]], before, weight.shape)

    def candidates(self, path: str, size: int) -> list[int]:
        """Sizes that ``size`` may have become in the module at ``path``, most likely first; [size] if it stayed.

        Where the module's own calls hold it both as it was and changed, it rather changed; what only parts of the
        module hold both ways may be another number of that size, so there it rather stayed.
        """
        prefix = f"{path}." if path else ""
        depth = prefix.count(".")
        tiers: list[set[int]] = [self.attrs[path].get(size, set()), self.shapes[path].get(size, set()), set(), set()]
        for scope, evidence in self.shapes.items():
            if scope != path and scope.startswith(prefix):
                tiers[2 if scope.count(".") == depth else 3] |= evidence.get(size, set())
        for at, tier in enumerate(tiers):
            if tier:
                return sorted(tier, key=lambda s: ((s == size) is (at < 2), -s))
        return [size]


def plan_patches(graph: FXView, root: nn.Module) -> list[list[list[Patch]]]:
    """Groups of alternatives; each alternative is a set of patches applied together.

    Modules of one class are decided together: the k-th candidate is taken in all of them.
    """
    changes = SizeChanges(graph)
    groups: dict[tuple[str, str, int, int], list[tuple[Any, str, list[Any]]]] = {}
    for path, module in root.named_modules():
        if handled(module):
            continue
        for name, value in list(vars(module).items()):
            if name.startswith("_") or name == "training":
                continue
            if isinstance(module, nn.MultiheadAttention) and name != "num_heads":
                continue  # update_layers keeps the rest
            options = _options(changes, path, value)
            if options is None or options == [value]:
                continue
            key = (type(module).__qualname__, name, _kind(value), len(options))
            groups.setdefault(key, []).append((module, name, options))
    plan: list[list[list[Patch]]] = []
    for (_, _, _, count), members in groups.items():
        group = [[Patch(m, n, options[k]) for m, n, options in members] for k in range(count)]
        if all(options[-1] != getattr(m, n) for m, n, options in members):
            group.append([])  # the size may be equal by chance
        plan.append(group)
    return plan


def _kind(value: Any) -> int:
    return 0 if isinstance(value, int) else 1


def _options(changes: SizeChanges, path: str, value: Any) -> list[Any] | None:
    """Candidate values of one attribute; None if it holds no size."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return list(changes.candidates(path, value)) if value > 1 else None
    if isinstance(value, (tuple, list)) and value and len(value) <= 16 and all(type(v) is int for v in value):
        lists = [changes.candidates(path, v) if v > 1 else [v] for v in value]
        count = max(len(c) for c in lists)
        made = [type(value)(c[min(k, len(c) - 1)] for c in lists) for k in range(count)]
        return made
    return None
