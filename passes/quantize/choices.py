"""Which format each point and weight gets: the spec's, narrowed to the bits asked for, or one by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from ...graph.errors import ConfigError, ConstraintError
from ...graph.ir import Graph, Node
from ..base import Progress
from .placement import Placement
from .spec import BackendSpec, TensorFormat
from .spec.formats import BITS, LIMITS

_FORMAT: TypeAdapter[TensorFormat] = TypeAdapter(TensorFormat)


@dataclass
class BitChoice:
    """Formats by name of a weight site's node or of a point, and what is worth reporting."""

    formats: dict[str, TensorFormat]
    details: dict[str, Any] = field(default_factory=dict)


class BitChooser(Protocol):
    """Chooses formats layer by layer (see ``Quantize.bits``). The graph is float and only read."""

    def choose(
        self,
        graph: Graph,
        placement: Placement,
        spec: BackendSpec,
        batches: list[Any],
        *,
        seed: int,
        progress: Progress,
    ) -> BitChoice: ...


def narrowed(form: TensorFormat, bits: int, stored: tuple[str, ...] = ()) -> TensorFormat:
    """A format of as many bits, in the smallest type of ``stored`` (and the format's own) that holds them.

    Where the type holds more, its range is narrowed.

    Raises:
        ConfigError: no type of the target holds as many bits, or the format is floating.
    """
    if form.is_float:
        raise ConfigError("a floating format has the bits it has", node="bits", expected=form.dtype, found=bits)
    signed = LIMITS[form.dtype][0] < 0
    fitting = [t for t in (form.dtype, *stored) if t in LIMITS and (LIMITS[t][0] < 0) == signed and BITS[t] >= bits]
    if bits < 2 or not fitting:
        most = max(BITS[t] for t in (form.dtype, *stored) if t in LIMITS)
        raise ConfigError("the target has no such integers", node="bits", expected=f"2 to {most}", found=bits)
    dtype = min(fitting, key=lambda t: BITS[t])
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if form.range is not None:  # what the spec leaves out stays out
        ends = (max(ends[0], int(form.range[0])), min(ends[1], int(form.range[1])))
    whole = ends == LIMITS[dtype]
    return replace(form, dtype=dtype, range=None if whole else ends)  # type: ignore[arg-type]


def chosen(wish: Any, form: TensorFormat, stored: tuple[str, ...], key: str) -> TensorFormat:
    """A format from what a user wrote: a number of bits, or fields (``bits`` too) that replace those of ``form``.

    Raises:
        ConfigError: names the field that is wrong.
    """
    if isinstance(wish, TensorFormat):
        return wish
    if isinstance(wish, int):
        return narrowed(form, wish, stored)
    if not isinstance(wish, Mapping):
        raise ConfigError("a format is a number of bits or a mapping", node=key, found=repr(wish)[:80])
    fields = dict(wish)
    bits = fields.pop("bits", None)
    base = _FORMAT.dump_python(form)
    if "dtype" in fields:
        base |= {"range": None}
    if fields.get("granularity", "block") != "block":
        base |= {"block": 0}
    if fields.get("block"):
        base |= {"granularity": "block"}
    try:
        made = _FORMAT.validate_python({**base, **fields})
    except ValidationError as exc:
        problem = exc.errors(include_url=False)[0]
        where = ".".join([key, *map(str, problem["loc"])])
        raise ConfigError(
            f"invalid format: {problem['msg']}", node=where, found=repr(problem.get("input"))[:80]
        ) from exc
    return made if bits is None else narrowed(made, int(bits), stored)


class Formats:
    """Sets the formats of a placement: bits for all, patterns (of which later ones win), single names."""

    def __init__(self, spec: BackendSpec, placement: Placement) -> None:
        self.spec = spec
        self.placement = placement
        # What the target itself wants: each choice starts from there, so that one does not narrow the next.
        self.own = {s.node.name: s.form for s in (*placement.weights, *placement.tables)}
        self.own_points = {p.root: p.form for p in placement.points.values()}

    def bits(self, weights: int | None, activations: int | None) -> None:
        """As many bits for every weight of a product, and for every point. Embedding tables keep their format."""
        if weights is not None:
            for site in self.placement.weights:
                site.form = narrowed(site.form, weights, self.spec.weight_dtypes)
        if activations is not None:
            for point in self.placement.points.values():
                point.form = narrowed(point.form, activations, self.spec.activation_dtypes)

    def patterns(self, graph: Graph, formats: Mapping[str, Any]) -> None:
        """``{pattern: {weight: ..., activation: ...}}``: the weights of matching nodes, and what these nodes read.

        Raises:
            ConstraintError: a pattern matches no quantized node. ConfigError: a format is wrong.
        """
        for pattern, wish in formats.items():
            if not isinstance(wish, Mapping) or not wish or set(wish) - {"weight", "activation"}:
                raise ConfigError(
                    "formats map a pattern to formats of what it matches", node=f"formats.{pattern}",
                    expected="weight and/or activation", found=repr(wish)[:80],
                )  # fmt: skip
            names = {n.name for n in graph.nodes if any(matches(name, pattern) for name in names_of(n))}
            hit = self._weights(names, wish.get("weight"), pattern)
            hit |= self._activations(names, pattern, wish.get("activation"))
            if not hit:
                raise ConstraintError(
                    "a pattern of formats matches nothing that is quantized",
                    value=pattern,
                    expected="a node, module path, weight or value name",
                    hint="`foldline inspect MODEL` lists the names",
                )

    def _weights(self, names: set[str], wish: Any, pattern: str) -> bool:
        sites = [s for s in (*self.placement.weights, *self.placement.tables) if s.node.name in names]
        for site in sites if wish is not None else []:
            site.form = chosen(wish, self.own[site.node.name], self.spec.weight_dtypes, f"formats.{pattern}.weight")
        return bool(sites)

    def _activations(self, names: set[str], pattern: str, wish: Any) -> bool:
        points = self.placement.points
        found = [p for p in points.values() if any(n.name in names for n, _ in p.readers)]
        found += [p for name, p in points.items() if fnmatchcase(name, pattern) and p not in found]
        for root in {p.root for p in found} if wish is not None else ():
            form = chosen(wish, self.own_points[root], self.spec.activation_dtypes, f"formats.{pattern}.activation")
            self._set(root, form)
        return bool(found)

    def single(self, formats: Mapping[str, TensorFormat]) -> None:
        """Formats by name of a site's node or of a point."""
        sites = {s.node.name: s for s in (*self.placement.weights, *self.placement.tables)}
        for name, form in formats.items():
            if name in sites:
                sites[name].form = form
            elif name in self.placement.points:
                self._set(self.placement.points[name].root, form)
            else:
                raise ConstraintError("a format was chosen for something that is not quantized", value=name)

    def _set(self, root: str, form: TensorFormat) -> None:
        for point in self.placement.points.values():
            if point.root == root:
                point.form = form


def names_of(node: Node) -> list[str]:
    """Names by which a user may mean a node: its own, its module path, its weights and their aliases."""
    weights = [v.weight for v in node.inputs if v is not None and v.weight is not None]
    stored = [name for w in weights for name in (w.name, *w.aliases)]
    return [name for name in (node.name, node.scope, *stored) if name]


def matches(name: str, pattern: str) -> bool:
    """Glob match of the whole name, or of a module path that contains it (``head`` takes ``head.weight``)."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
