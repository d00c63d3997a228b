"""Whether a pruned module computes what the original does without the removed weights: no analysis, any tool's result.

    OMP_NUM_THREADS=1 python benchmarks/masked.py [--timeout 60] [--json FILE] [--heads] [MODEL ...]

``distinct`` gives every weight a value of its own, so that ``removed`` can tell by values alone which weights of the
original a pruned module still holds, whoever cut it. ``error`` sets the others to zero in a copy of the original, lets
normalizations count the kept channels only, calls both in float64, and compares. A structured cut removes channels and
leaves the rest of the function alone; where it tears a head apart or puts one layer's channels against another's, the
two differ. The same function judges foldline and torch-pruning, called as in coverage.py.

What zeros cannot stand for: a removed channel that a nonlinearity makes nonzero again and a statistic over channels
then reads (softmax, mean or norm over channels). There the right cut differs as well: "not judged" where foldline's,
which is checked by its own oracle, differs too. ``--heads`` tells the peer of the attention heads, projection by
projection, and to remove whole ones only: what it then gives is right, by the same oracle. Models: those on which both
end (prune_speed.py); needs the extras timm, transformers, bench.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from architectures import build, head_of, output_of
from coverage import isolated
from prune_speed import BOTH, ours, peer
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def distinct(model: nn.Module) -> None:
    """Give the weights of each parameter (float64) new values, all different, of the mean that they had.

    Matrices spread widely enough to pass a signal on: the tiny weights of an untrained transformer hide its attention.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_floating_point() or p.numel() < 2:
                continue
            mean = float(p.mean())
            spread = max(float(p.std()), 0.1 * abs(mean), p[0].numel() ** -0.5 if p.ndim > 1 else 0.02)
            place = torch.randperm(p.numel(), generator=generator, dtype=torch.int64).double()
            even = (2 * (place + 0.5) / p.numel() - 1) * 3**0.5  # variance 1
            p.copy_((mean + spread * even).reshape(p.shape))


def removed(original: nn.Module, pruned: nn.Module) -> dict[str, torch.Tensor]:
    """Per changed parameter: which of the original's weights the pruned module no longer holds (bool, its shape)."""
    left = dict(pruned.named_parameters())
    out = {}
    for name, p in original.named_parameters():
        if name not in left:
            raise KeyError(f"the pruned module has no parameter {name}")
        if left[name].shape != p.shape:
            held = torch.zeros(p.numel(), dtype=torch.bool)
            held[_places(p, left[name])] = True
            assert int(held.sum()) == left[name].numel(), f"{name} holds values that the original does not"
            out[name] = ~held[_places(p, p)]
    return out


def _places(original: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
    """Where values stand in the order of all values of a parameter, which are evenly spaced."""
    low, high = original.detach().min(), original.detach().max()
    return ((some.detach() - low) / (high - low) * (original.numel() - 1)).round().long()


def _normalized(x: Any, dims: tuple[int, ...], kept: Any, eps: float, centred: bool = True) -> Any:
    """``x`` normalized over ``dims`` with the statistics of the kept positions (1 or 0, broadcastable to ``x``)."""
    kept = kept.expand_as(x)
    count = kept.sum(dims, keepdim=True).clamp(min=1)
    x = x - (x * kept).sum(dims, keepdim=True) / count if centred else x
    return x * ((x**2 * kept).sum(dims, keepdim=True) / count + eps).rsqrt()


class KeptOnly(TorchFunctionMode):
    """Normalizations over channels count those whose weight was not removed."""

    def __init__(self, gone: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.layer_norm, F.group_norm, F.rms_norm):
            return self._norm(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _norm(self, func: Any, x: Any, over: Any, weight: Any = None, bias: Any = None, eps: Any = None) -> Any:
        gone = self.gone.get(id(weight))
        if weight is None or gone is None:
            return func(x, over, weight, bias, **({} if eps is None else {"eps": eps}))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        kept = (~gone).to(x.dtype)
        if func is F.group_norm:
            shape = (1, over, -1, *[1] * (x.ndim - 2))
            parted, kept = x.unflatten(1, (over, -1)), kept.reshape(shape)
            out = _normalized(parted, tuple(range(2, parted.ndim)), kept, eps).flatten(1, 2)
            side = (-1, *[1] * (x.ndim - 2))
            return out * weight.reshape(side) + (0 if bias is None else bias.reshape(side))
        dims = tuple(range(-len(over), 0))
        out = _normalized(x, dims, kept, eps, centred=func is F.layer_norm) * weight
        return out if bias is None else out + bias


def error(original: nn.Module, pruned: nn.Module, inputs: Any) -> float:
    """Largest difference of the pruned module from the original without the removed weights, over its largest output.

    All in float64: ``inputs``, too. Compared is the first tensor of the output.
    """
    gone = removed(original, pruned)
    masked = copy.deepcopy(original)
    with torch.no_grad():
        by_id = {}
        for name, p in masked.named_parameters():
            if name in gone:
                p[gone[name]] = 0
                by_id[id(p)] = gone[name]
    with KeptOnly(by_id):
        want = output_of(masked, inputs)
    got = output_of(pruned, inputs)
    if got.shape != want.shape:
        raise ValueError(f"the output's shape changed from {tuple(want.shape)} to {tuple(got.shape)}")
    return float((got - want).abs().max() / want.abs().max())


def _as_double(inputs: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


PROJECTIONS = "query key value q_proj k_proj v_proj q_lin k_lin v_lin q k v".split()


def peer_told(model: Any, inputs: Any) -> Any:
    """The peer with what it needs to know of a transformer: which layers have heads, how many, and to cut no head."""
    import torch_pruning as tp

    layers = {m: name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    tp.pruner.MagnitudePruner(
        model,
        inputs if isinstance(inputs, dict) else inputs[0],
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[head_of(model)],
        num_heads={m: model.config.num_attention_heads for m, name in layers.items() if name in PROJECTIONS},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
    ).step()
    return model


SIDES = {"ours": ours, "peer": peer, "told": peer_told}
WRONG = 1e-9
"""In float64; right ones are below 1e-13."""


def judged(side: str, name: str) -> dict[str, Any]:
    """The error of one side on one model, and the share of the parameters that it left."""
    model, inputs = build(name)
    model, inputs = model.double(), _as_double(inputs)
    distinct(model)
    before = sum(p.numel() for p in model.parameters())
    pruned = SIDES[side](copy.deepcopy(model), inputs)
    return {"error": error(model, pruned, inputs), "share": sum(p.numel() for p in pruned.parameters()) / before}


def verdict(found: dict[str, Any]) -> str:
    """Of the peer's result."""
    mine, other = found["ours"], found["peer"]
    if "failed" in other:
        return f"fails: {other['failed']}"
    if other["share"] == 1:
        return "nothing removed"
    if "failed" in mine or mine["error"] > WRONG:
        return "not judged"
    return "right" if other["error"] <= WRONG else f"wrong ({other['error']:.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--json", type=Path, help="append one line of JSON per model to this file")
    parser.add_argument("--heads", action="store_true", help="tell the peer of the attention heads")
    parser.add_argument("models", nargs="*", default=BOTH)
    args = parser.parse_args()
    from support import timm_models

    timm_models.timm(), timm_models.transformers()  # imported before the forks
    torch.set_num_threads(1)
    print("| model | foldline: error | torch-pruning: error | its result |\n|---|---|---|---|")
    count: dict[str, int] = {}
    for name in dict.fromkeys(args.models):
        sides = {"ours": "ours", "peer": "told" if args.heads else "peer"}
        found = {key: isolated(judged, side, name, limit=args.timeout) for key, side in sides.items()}
        said = verdict(found)
        kind = said.split(" (")[0].split(":")[0]
        count[kind] = count.get(kind, 0) + 1
        cells = [str(r.get("failed") or f"{r['error']:.0e}") for r in found.values()]
        print(f"| {name} | {cells[0]} | {cells[1]} | {said} |", flush=True)
        if args.json:
            with args.json.open("a") as out:
                out.write(json.dumps({"model": name, **found, "verdict": said}) + "\n")
    print(f"\n{sum(count.values())} models; torch-pruning: " + ", ".join(f"{k} {n}" for k, n in sorted(count.items())))


if __name__ == "__main__":
    main()
