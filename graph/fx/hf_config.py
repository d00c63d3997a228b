"""Configurations that models are built from (as transformers' are): which entries say the sizes, by evidence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .config_build import shapes_of
from .config_entries import Entries, attribute_of, configs, integer_entries, is_config, set_entry
from .config_marks import Places
from .config_search import Search
from .patch import SizeChanges
from .same_state import sizes_apart
from .shorten import dead_entries
from .walk import modules_of

if TYPE_CHECKING:
    from .view import FXView

_WAY_OUT = (
    "load the result with fl.load_pruned, or prune with equal=True (equal widths over layers) and leave whole, or cut "
    "alike, what the configuration ties together"
)
_BUILT: WeakKeyDictionary[nn.Module, tuple[dict[Any, nn.Module | None], set[str], Places]] = WeakKeyDictionary()
"""What was built for a module whose configuration was not clear at once, for the search that follows."""


def update_configs(graph: FXView, twin: nn.Module) -> nn.Module:
    """Bring the configurations in a written-back module in line with its new sizes, where they can say them.

    For every submodule that is built from its configuration alone and can be saved with it: the entries that drive
    sizes are found by building the class from changed configurations, parameters on the meta device, until all
    tensors have the shapes wanted; the model so built, with the twin's weights, must then compute the same. Where no
    configuration says the sizes (other widths per layer), it is left as it was and ``graph.notes`` says so.
    """
    if isinstance(twin, fx.GraphModule) or not any(True for _ in configs(twin)):
        return twin
    changed = _changed(graph)
    changes = SizeChanges(graph)
    dropped = _dropped(graph)
    done: list[str] = []
    for path, m in modules_of(twin):
        prefix = f"{path}." if path else ""
        if not _buildable(m) or any(path == d or path.startswith(f"{d}.") or d == "" for d in done):
            continue
        done.append(path)
        here = {p.removeprefix(prefix): lost for p, lost in dropped.items() if p.startswith(prefix)}
        if here or any(name.startswith(prefix) for name in changed):
            note = _Fit(graph, changes, twin, path, m, here).run()
            if note and note not in graph.notes:
                graph.notes.append(note)
    return twin


def foresee(graph: FXView, twin: nn.Module) -> Foreseen | None:
    """Where it is clear what the configurations should say: say it, before the twin is proved.

    Clear: one build from the new values gives a module whose state is that of the twin, but for integer attributes
    (``num_attention_heads``), which the twin takes over. A proof that the twin computes what the graph says then holds
    for what ``from_pretrained`` builds, too. Clear, too: no values give the twin's widths. None (and nothing is
    changed) where :func:`update_configs` has to search.
    """
    outer: list[tuple[str, nn.Module]] = []
    for path, m in modules_of(twin):
        if _buildable(m) and not any(path.startswith(f"{p}." if p else "") for p, _ in outer):
            outer.append((path, m))
    if not outer:
        return None if any(True for _ in configs(twin)) else Foreseen()
    if _dropped(graph):
        return None
    found, changes, changed = Foreseen(), SizeChanges(graph), _changed(graph)
    for path, m in outer:
        if any(name.startswith(f"{path}." if path else "") for name in changed):
            said = _Fit(graph, changes, twin, path, m, {}).foresee()
            if said is None:
                found.back()
                return None
            if isinstance(said, str):
                found.notes.append(said)
            else:
                found.undo.callback(said)
    return found


class Foreseen:
    """What was said before the proof: how to take it back, and what a report should tell once it is proved."""

    def __init__(self) -> None:
        self.undo = ExitStack()
        self.notes: list[str] = []

    def back(self) -> None:
        """Make the configurations and the twin what they were."""
        self.undo.close()


def _changed(graph: FXView) -> set[str]:
    """Names of stored tensors that have another shape now."""
    return {
        alias
        for name, w in graph.weights.items()
        if name in graph.originals and tuple(graph.originals[name].shape) != w.shape
        for alias in w.aliases
    }


def _dropped(graph: FXView) -> dict[str, tuple[int, list[int]]]:
    """Per container that lost numbered entries (whole layers): how many it had, and which are left."""
    found: dict[str, tuple[int, list[int]]] = {}
    module = graph.source.module
    for path in [] if module is None else dead_entries(graph, module):
        parent, _, leaf = path.rpartition(".")
        if leaf.isdigit():
            count, left = found.get(parent) or (n := len(module.get_submodule(parent)), list(range(n)))  # type: ignore
            found[parent] = count, [i for i in left if i != int(leaf)]
    return found


def _buildable(m: nn.Module) -> bool:
    return is_config(vars(m).get("config")) and callable(getattr(m, "save_pretrained", None))


class _Fit(Search):
    """The entries of one submodule's configuration, found, proved and written."""

    def run(self) -> str:
        """Change the configuration; returns a note where that is not possible."""
        if uneven := self._uneven():
            return uneven
        name = type(self.config).__name__
        self.known, self.read, self.places = _BUILT.pop(self.module, (self.known, self.read, self.places))
        found = self._search()
        built = self._build(found)
        if built is None:
            return f"{name} stays as it was: {type(self.module).__name__} cannot be built from it"
        if self._apart(built):
            have = shapes_of(built)
            wrong = next((f"{n}: {list(s)}" for n, s in self.shapes.items() if have.get(n) != s), "")
            wrong = wrong or next(f"it would have {n}" for n in have if n not in self.shapes)
            why = f"no values of it give the pruned widths (e.g. {wrong})"
            return f"{name} stays as it was, because {why}: {_WAY_OUT}"
        reasons = []
        for tried in self._alike(found):
            reasons.append(self._verify(tried))
            if not reasons[-1]:
                return ""
        return f"{name} stays as it was: {reasons[0]}; load the result with fl.load_pruned"

    def foresee(self) -> Callable[[], None] | str | None:
        """Change configuration and integer attributes at the first guess, if that is the answer; the way back.

        A note where no configuration can be the answer.
        """
        if uneven := self._uneven():
            return uneven
        guess = self._named(self.evidence)
        built = self._build(guess)
        better = self._corrected(guess)
        if built is None or self._apart(built):
            if torn := self._torn():
                return torn
            placed = set(self.places.values())
            also = {e: sizes[0] for e, sizes in self._options().items() if e in placed}
            better = {**{e: v for e, v in better.items() if e not in placed}, **also}
        if better != guess:
            guess, built = better, self._build(better)
        if built is None or self._apart(built):
            _BUILT[self.module] = self.known, self.read, self.places
            return None
        found = {e: v for e, v in guess.items() if self._is_read(e)}
        if found != guess and self._read_as_a_whole() and self._signature(found) != self._signature(guess):
            return None
        held, placed = [self.entries[e] for e in found], set(self.places.values())
        for entry in [e for e in found if held.count(self.entries[e]) > 1]:  # which of them says the size now?
            if entry in placed:
                continue  # a module holds it as it is
            without = {e: v for e, v in found.items() if e != entry}
            if self._signature(without) == self._signature(guess):
                found = without
        sizes = sizes_apart(self.module, built)
        if sizes is None:
            _BUILT[self.module] = self.known, self.read, self.places
            return None
        before = [(m, name, getattr(m, name)) for m, name, _ in sizes]
        old = self._say(built, found, derived=found != guess)
        for m, name, value in sizes:
            setattr(m, name, value)

        def back() -> None:
            for m, name, value in before:
                setattr(m, name, value)
            _restore(old)

        return back

    def _torn(self) -> str:
        """Why no values give the widths: one entry that would have to be several sizes at once, as layers hold it."""
        if any(value is None and self._is_read(e) for e, value in self.entries.items()):
            return ""  # set, such an entry may take the place of another
        for entry, sizes in self._held().items():
            if len(sizes) > 1:
                name = type(self.config).__name__
                both = " and ".join(f"{size} ({where})" for size, where in sizes.items())
                return f"{name} stays as it was, because its {entry} would have to be {both} at once: {_WAY_OUT}"
        return ""

    def _named(self, evidence: Mapping[int, list[int]]) -> Entries:
        """Each entry of an old size with the size in its place; of those with one size, what modules call their own."""
        alike: dict[int, list[str]] = {}
        for entry, value in self.entries.items():
            if value is not None and value in evidence:
                alike.setdefault(value, []).append(entry)
        found: Entries = {}
        for value, entries in alike.items():
            own: list[str] = []
            if len(entries) > 1:
                called = {name for _, name in self.sizes}
                own = [e for e in entries if attribute_of(e) in called]
                own = own or [e for e in entries if not ("layer" in e and value in self._counts())]
            found |= dict.fromkeys(own or entries, evidence[value][0])
        return found

    def _counts(self) -> set[int]:
        """How many layers the containers of the module hold (heads are often as many)."""
        return {len(m) for _, m in modules_of(self.module) if isinstance(m, nn.ModuleList)}

    def _uneven(self) -> str:
        """A note where a weight's counterpart in another layer (the same name but for numbers) has other widths now."""
        prefix = f"{self.path}." if self.path else ""
        seen: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}
        for name, now in self.shapes.items():
            before = self.graph.originals.get(prefix + name)
            if before is not None:
                like = ".".join(["#" if part.isdigit() else part for part in name.split(".")])
                other, size = seen.setdefault((like, tuple(before.shape)), (name, now))
                if size != now:
                    apart = f"{other}: {list(size)}, {name}: {list(now)}"
                    why = f"because layers have other widths than their like ({apart})"
                    return f"{type(self.config).__name__} stays as it was, {why}: {_WAY_OUT}"
        return ""

    # ---- proof ---------------------------------------------------------------------------------------------------
    def _verify(self, found: Entries) -> str:
        """Load the twin's weights into the built model, compare both on the example, and adopt its configuration."""
        built = self._build(found)
        assert built is not None
        state = self.module.state_dict()
        if any(t.is_meta for t in [*state.values(), *pytree.tree_leaves(self._example()[0])] if torch.is_tensor(t)):
            return "weights without data cannot be compared"
        try:
            built.load_state_dict(state, assign=True)
        except RuntimeError as problem:
            return f"its state dict differs ({str(problem).splitlines()[0]})"
        call, before = self._outputs(self.module, None)
        if call is None or not before:
            return "the example inputs do not reach it"
        _, after = self._outputs(built, call)
        if not _same(before, after):
            return "a model built from it computes something else (a scale or a table that depends on the sizes)"
        old = self._say(built, found)
        kept = {name: getattr(self.config, name) for name in self.lists}
        for name, shorter in self.lists.items():
            setattr(self.config, name, shorter)
        _, again = self._outputs(self.module, call)
        if _same(before, again):
            return ""
        for name, whole in kept.items():
            setattr(self.config, name, whole)
        _restore(old)
        return "the module reads it when it runs"

    def _say(self, built: nn.Module, found: Entries, derived: bool = True) -> list[tuple[Any, Entries]]:
        """Take over what the configurations of a built module say in the entries found; what ours said before.

        ``derived``: take over, too, what a class computes from its arguments (Swin's ``hidden_size``).
        """
        old = [(c, integer_entries(c)) for _, c in configs(self.module)]
        here = dict(modules_of(built))
        leaves = {attribute_of(n) for n in found}
        for path, config in configs(self.module):
            computed = _as_made(config) if derived else {}
            like = vars(here[path]).get("config") if path in here else None
            if like is not None:
                for name, value in integer_entries(like).items():
                    if attribute_of(name) in leaves:
                        set_entry(config, name, value)
            now = _as_made(config) if derived else {}
            for name, value in integer_entries(config).items():
                if value is not None and value == computed.get(name) != now.get(name) is not None:
                    set_entry(config, name, now[name])
        return old

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.graph.source.args, self.graph.source.kwargs

    def _outputs(self, m: nn.Module, call: Any) -> tuple[Any, list[torch.Tensor]]:
        """(arguments, tensors of the output) of a submodule: called itself, or seen in a call of the whole model."""
        seen: list[Any] = []
        root = self.twin if call is None else m
        args, kwargs = self._example() if call is None else call
        hook = m.register_forward_hook(lambda _, a, k, out: seen.append(((a, k), out)), with_kwargs=True)
        flags = [(s, s.training) for s in root.modules()]
        try:
            root.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                root(*args, **kwargs)
        except Exception as problem:  # user code; an output that cannot be had is no proof
            if call is None:
                raise
            return None, [torch.tensor(float("nan"))] if problem else []
        finally:
            hook.remove()
            for s, flag in flags:
                s.training = flag
        if not seen:
            return None, []
        tensors = [t for t in pytree.tree_leaves(seen[0][1]) if torch.is_tensor(t)]
        return seen[0][0], [t.clone() for t in tensors]


def _as_made(config: Any) -> Entries:
    """The entries of a configuration made anew from the arguments of its class, and what it computes from them."""
    kind = type(config)
    try:
        taken = getattr(kind, "__dataclass_fields__", None) or inspect.signature(kind.__init__).parameters
        return integer_entries(kind.from_dict({k: v for k, v in config.to_dict().items() if k in taken}))
    except Exception:  # user code: a class that is made in another way; then nothing is known to be computed
        return {}


def _restore(old: list[tuple[Any, Entries]]) -> None:
    for config, entries in old:
        for name, value in entries.items():
            set_entry(config, name, value)


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bit for bit: the same operations on the same numbers; anything less may be another function that is close."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
