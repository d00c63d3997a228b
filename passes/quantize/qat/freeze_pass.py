"""The pass freeze_quantized: what quantization-aware training left, stored as integers with Q/DQ."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ....graph.errors import ConstraintError
from ....graph.ir import Graph
from ...base import Context, Contract, Needs, Outcome, Pass
from ..choices import Formats
from ..insert import Inserter
from ..numerics import QuantParams, grid, least_weight_scale
from ..placement import Placement, WeightSite, place
from ..quantize import Quantize
from ..ranges import weight_bounds
from ..reasons import decisions_of, scale_groups
from ..rounding import Rounded
from ..spec import BackendSpec
from .trained import Trained, take_out


class FreezeQuantized(Pass):
    """Fake-quantize nodes become Q/DQ pairs, their weights integers, with the scales that training ended at.

    The integers are ``clip(rint(w / s) + z)`` of the trained weights, so the model computes what it computed in
    training, to the last bit of what float arithmetic leaves; the backend's integer result differs by at most one step
    of an output. Biases become int32 where the target adds them so. Takes the trained model of ``P.qat``, or a module
    with torch's own fake quantization whose scales are tensors.
    """

    name: ClassVar[str] = "freeze_quantized"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    establishes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float", "fake_quantized"})

    target: str = "onnxruntime-cpu"
    """Backend that will run the model: the one that it was trained for."""
    embeddings: bool = True
    """Store embedding tables as integers too, where the target's spec has a rule for them."""
    activation_products: bool = False
    """As it was in training."""
    spec: BackendSpec | None = None
    """A spec to use instead of the target's own."""

    def prepare(self, ctx: Context) -> None:
        """The target has a spec."""
        self._spec(ctx)

    def _spec(self, ctx: Context) -> BackendSpec:
        return Quantize(target=self.target, spec=self.spec).backend_spec(ctx)

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """See the class.

        Raises:
            ConstraintError: nothing is fake-quantized, a scale is no constant, what was trained does not fit the
                target, or an int32 bias would overflow.
        """
        spec = self._spec(ctx)
        trained = take_out(graph)
        placement = self._placement(graph, spec, trained)
        params = {name: trained.values[name].params(point.form.dtype, name) for name, point in placement.points.items()}
        rounded: dict[str, Rounded] = {}
        for site in placement.weights:
            p = trained.weights[site.weight.name].params(site.form.dtype, site.weight.name)
            _check_bias(site, p, params)
            rounded[site.node.name] = Rounded(p.quantize(site.weight.numpy()), p)
        for site in placement.tables:
            low, high, along = weight_bounds(site.weight.numpy(), site.form, site.axis, site.in_axis, "minmax")
            p = grid(low, high, site.form, along, site.form.block)
            rounded[site.node.name] = Rounded(p.quantize(site.weight.numpy()), p)
        inserter = Inserter(graph, spec)
        inserter.write(placement, params, rounded)
        graph.refresh()
        details: dict[str, Any] = {
            "target": spec.name,
            "weights": len(placement.weights),
            "points": len(placement.points),
            "layers": inserter.facts,
            "scale_groups": scale_groups(placement),
        }
        decisions = [*decisions_of(placement, inserter.facts), *placement.decisions]
        return Outcome(decisions=decisions, details=details)

    def _placement(self, graph: Graph, spec: BackendSpec, trained: Trained) -> Placement:
        """Where the spec wants pairs, less the layers that were not trained with them; exactly what was trained."""
        ignored: set[str] = set()
        while True:
            placement = place(graph, spec, ignored, products=self.activation_products, tables=self.embeddings)
            untrained = {s.node.name for s in placement.weights if s.weight.name not in trained.weights}
            missing = [p for name, p in placement.points.items() if name not in trained.values]
            untrained |= {node.name for point in missing for node, _ in point.readers}
            if missing and not untrained:
                untrained = {p.value.producer.name for p in missing if p.value.producer is not None}
            if not untrained - ignored:
                break
            ignored |= untrained
        lost = set(trained.weights) - {s.weight.name for s in placement.weights}
        lost |= set(trained.values) - set(placement.points)
        if lost or any(name not in trained.values for name in placement.points):
            raise ConstraintError(
                "what was trained in integers is not what this target computes in integers", node=spec.name,
                value=", ".join(sorted(lost)[:3]), expected="the target of P.qat",
                hint="freeze for the target and with the options that the model was trained for",
            )  # fmt: skip
        formats = Formats(spec, placement)
        for site in placement.weights:
            g = trained.weights[site.weight.name]
            formats.single({site.node.name: _fitting(formats, site.form, g.low, g.high, spec.weight_dtypes)})
        for name, point in placement.points.items():
            v = trained.values[name]
            point.form = _fitting(formats, point.form, v.low, v.high, spec.activation_dtypes)
        return placement


def _fitting(formats: Formats, form: Any, low: int, high: int, stored: tuple[str, ...]) -> Any:
    """The format narrowed to the integers that were trained."""
    from ..choices import narrowed

    least, most = form.limits
    if (low, high) == (least, most) or form.is_float:
        return form
    return narrowed(form, int(high - low).bit_length(), stored)


def _check_bias(site: WeightSite, p: QuantParams, params: dict[str, QuantParams]) -> None:
    if site.bias is None or site.x.name not in params:
        return
    least = least_weight_scale(site.bias.numpy().astype(np.float32).reshape(-1), params[site.x.name])
    short = np.broadcast_to(p.scale, least.shape) * 2 < least  # half the int32 range is kept in reserve
    if short.any():
        raise ConstraintError(
            "a trained weight scale is so small that the int32 bias overflows", node=site.node.name,
            value=site.weight.name, expected=f"at least {float(least[short].max() / 2):.3g}",
            found=f"{float(np.broadcast_to(p.scale, least.shape)[short].min()):.3g}",
            hint="train with weight_scales='fixed' for this layer, or ignore it",
        )  # fmt: skip
