"""ReplaceNorm: batch norms give way to standardised weights, layer and RMS norms to elementwise functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Node
from ..base import Context, Contract, Decision, Needs, Outcome, Pass

if TYPE_CHECKING:
    from torch import Tensor, nn


class ReplaceNorm(Pass):
    """Take norms out of a network: batch norms for training without them, or layer norms for elementwise functions.

    Form "nf" standardises the weights of the convolutions before batch norms, after "Characterizing signal propagation
    to close the performance gap in unnormalized ResNets", in its plainest form: scaled weight standardization with a
    gain per channel, and no residual scaling. Gains and biases start so that on the example inputs every channel has
    the mean and the variance that its batch norm was trained to give (its shift, its gain squared), layer after layer;
    standardization takes the weights' means, so the function is new (FRESH).

    The report holds, per norm, the largest channel mean and the mean channel variance before and after.

    Forms "eln" and "dyt" put ``s x / sqrt(C + x^2) + t`` or ``s tanh(a x) + t`` in the place of every layer or RMS
    norm over the last axis, with C or a, s and t (none for RMS norms) fitted by least squares on calibration data; s
    and t go into gain and bias, which P.Fold then moves into what reads them. No statistic is computed at run time.
    (x / sqrt(C + x^2) is a layer norm exactly where the other coordinates stay as they are, which is why it fits
    better.) The function is near the old one and meant to be trained. Source: "Elementwise Layer Normalization"; DyT:
    "Transformers without Normalization". The report holds both forms' relative errors per norm.

    Raises:
        ConstraintError: for "nf": no example inputs, no batch norm behind a convolution of its own, or a module that
            cannot be changed by path; for the others: no such norm, or a gain computed at run time.
    """

    name: ClassVar[str] = "replace_norm"
    contract: ClassVar[Contract] = Contract.FRESH
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    form: Literal["nf", "eln", "dyt"] = "nf"
    """``"nf"``: scaled weight standardization; ``"eln"``: x / sqrt(C + x^2); ``"dyt"``: tanh(a x)."""
    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of layer and RMS norms to leave alone."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs that "eln" and "dyt" are fitted on; the run's own when absent."""

    def requirement(self) -> Needs:
        return Needs.NOTHING if self.form == "nf" else Needs.CALIBRATION

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        from ..adapters.insert import graph_of, module_of

        if self.form != "nf":
            from .elementwise_norm import replace_norms

            decisions, facts = replace_norms(graph, self.form, self.batches(ctx), self.ignore, ctx)
            return Outcome(decisions=decisions, details=facts)
        if ctx.example_inputs is None or graph.kind != "fx":
            raise ConstraintError("replacing norms needs an nn.Module and example inputs", found=graph.kind)
        pairs = _pairs(graph)
        if not pairs:
            raise ConstraintError("there is no batch norm right behind a convolution of its own", node=graph.name)
        module = module_of(graph)
        decisions = [_replace(module, conv, norm, ctx) for conv, norm in pairs]
        left = sum(n.op == "batch_norm" for n in graph.nodes) - len(pairs)
        details = {"replaced": len(pairs), "left": left}
        return Outcome(decisions=decisions, details=details, graph=graph_of(module, graph, ctx))


def _pairs(graph: Graph) -> list[tuple[str, str]]:
    """(path of the convolution, path of the batch norm), in the order in which they run."""

    def calls(path: str, op: str) -> list[Node]:
        return [n for n in graph.nodes if n.scope == path and n.op == op]

    found = []
    for node in graph.nodes:
        source = node.inputs[0] if node.op == "batch_norm" else None
        conv = None if source is None else source.producer
        if source is None or conv is None or conv.op != "conv" or not conv.scope or not node.scope:
            continue
        if len(source.uses) == 1 and not source.is_output and len(calls(conv.scope, "conv")) == 1:
            if len(calls(node.scope, "batch_norm")) == 1:
                found.append((conv.scope, node.scope))
    return found


def _replace(module: nn.Module, conv_path: str, norm_path: str, ctx: Context) -> Decision:
    import torch
    from torch import nn

    from .insert import reparametrize
    from .kinds import kind_of

    conv, norm = module.get_submodule(conv_path), module.get_submodule(norm_path)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not isinstance(conv, nn.modules.conv._ConvNd):
        raise ConstraintError("not a convolution and a batch norm of torch", node=norm_path, found=type(norm).__name__)
    channels = norm.num_features
    gain = torch.ones(channels) if norm.weight is None else norm.weight.detach()
    shift = torch.zeros(channels) if norm.bias is None else norm.bias.detach()
    before = _moments(module, norm_path, ctx)
    kind, axis = kind_of("scaled_ws"), 1 if conv.transposed else 0
    with torch.no_grad():
        conv.bias = nn.Parameter(torch.zeros_like(shift, dtype=conv.weight.dtype))
        reparametrize(conv, "weight", kind, kind.options({"gain": 1.0}), f"{conv_path}.weight", axis, ctx.seed)
        parent, _, leaf = norm_path.rpartition(".")
        setattr(module.get_submodule(parent) if parent else module, leaf, nn.Identity())
        mean, var = _moments(module, conv_path, ctx)
        factor = gain / torch.sqrt(var + norm.eps)
        standard: Any = conv.parametrizations.weight[0]  # type: ignore[union-attr, index]
        shape = list(standard.gain.shape)
        if conv.transposed and conv.groups > 1:
            raise ConstraintError("the outputs of a grouped transposed convolution share an axis", node=conv_path)
        standard.gain.copy_((standard.gain.reshape(-1) * factor).reshape(shape))
        conv.bias.copy_(shift - mean * factor)
    after = _moments(module, conv_path, ctx)
    facts: dict[str, Any] = {
        "mean_before": float(before[0].abs().max()), "mean_after": float(after[0].abs().max()),
        "var_before": float(before[1].mean()), "var_after": float(after[1].mean()),
    }  # fmt: skip
    return Decision(norm_path, "replaced", f"by standardised weights in {conv_path}", facts)


def _moments(module: nn.Module, path: str, ctx: Context) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel of what the module at ``path`` gives on the example inputs."""
    import torch

    from ...graph.fx.trace import normalize_call

    seen: list[Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    args, kwargs = normalize_call(ctx.example_inputs)
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        handle.remove()
    flat = seen[0].double().transpose(0, 1).flatten(1)
    return flat.mean(1).to(seen[0].dtype), flat.var(1, unbiased=False).to(seen[0].dtype)
