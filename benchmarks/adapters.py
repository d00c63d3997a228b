"""Adapters of every kind on one model: what they train, how fast they go in and merge, and how exact the merge is.

    OMP_NUM_THREADS=1 python benchmarks/adapters.py [--model vit_tiny_patch16_224] [--rank 8] [--repeats 3]

Per kind: trained elements; seconds to insert and to merge (process time, all layers, base hashing included); relative
Frobenius error of the merged weights against the float64 formula, for a float32 and a bfloat16 base, worst layer:
foldline's merge (float64, cast once) and the same formula evaluated in the weight's own dtype, which is how adapters
are commonly merged. "half ulp" is the error of rounding the exact result once: no merge can have less. The last
columns compare outputs of the merged and of the adapted float32 model, and say whether unmerging restored the base bit
for bit. Weights are random and everything trained is moved at random. Needs the extra timm.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OPTIONS: dict[str, dict[str, Any]] = {
    "svfit": {"rank": 8},
    "bone": {"rank": 8},
    "oft": {"block": 8},
    "kron": {"size": 4},
    "nola": {"bases": 64},
}


def build(name: str) -> tuple[Any, Any]:
    import torch

    from tests.support.timm_models import create

    torch.manual_seed(0)
    model = create(name).eval()
    with torch.no_grad():
        for p in model.parameters():  # zero biases and heads would hide errors
            p.add_(0.02 * torch.randn_like(p))
    return model, torch.randn(1, 3, 224, 224)


def move(model: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((0.05 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def errors(tuned: Any, merged: Any) -> tuple[float, float, float]:
    """Worst relative Frobenius error of (merge, formula in the weight's dtype, one rounding of the exact result)."""
    from foldline import passes as P
    from foldline.graph.fx.tensors import to_numpy
    from foldline.passes.adapters.adapter import cast_once, merged_weight

    worst = [0.0, 0.0, 0.0]
    base, state = dict(tuned.named_parameters()), merged.state_dict()
    for target, (entry, *_) in P.adapter_of(tuned).targets().items():
        exact, _ = merged_weight(to_numpy(base[target]), None, entry)
        own = in_own_dtype(base[target].detach(), entry)
        once = cast_once(exact, to_numpy(base[target]).dtype)
        scale = float((exact**2).sum()) ** 0.5 or 1.0
        for i, got in enumerate((to_numpy(state[target]), own, once)):
            error = float(((got.astype("float64") - exact) ** 2).sum()) ** 0.5 / scale
            worst[i] = error if error != error else max(worst[i], error)
    return worst[0], worst[1], worst[2]


def in_own_dtype(weight: Any, entry: Any) -> Any:
    """The formula evaluated in the weight's dtype; NaN where torch has no such kernel."""
    from foldline.graph.fx.tensors import from_numpy, to_numpy

    kind, view = entry.definition(), entry.view
    g = view.geometry(tuple(weight.shape))
    tensors = {k: from_numpy(v).to(weight.dtype) for k, v in entry.tensors.items()}
    if kind.derived is not None:
        tensors |= {k: from_numpy(v).to(weight.dtype) for k, v in kind.derived(g, entry.options).items()}
    try:
        new = kind.new_weight(view.canonical(weight), tensors, g, entry.options)
    except NotImplementedError:
        new = view.canonical(weight) * float("nan")
    return to_numpy(view.stored(new, weight))


def row(kind: str, model: Any, x: Any, rank: int, repeats: int) -> str:
    import torch
    from foldline import passes as P
    from foldline.passes.adapters import kind_of

    own = OPTIONS.get(kind, {})
    options = {**({"rank": rank} if "rank" in kind_of(kind).defaults and "rank" not in own else {}), **own}
    exclude = ["patch_embed", "head"] if kind in ("bone", "oft", "kron") else []
    common: dict[str, Any] = {"kind": kind, "options": options, "exclude": exclude}
    inserting, merging = [], []
    for _ in range(repeats):
        start = time.process_time()
        tuned = P.insert_adapter(model, **common).model
        inserting.append(time.process_time() - start)
        move(tuned)
        start = time.process_time()
        result = P.merge_adapter(tuned)
        merging.append(time.process_time() - start)
    with torch.no_grad():
        want, got = tuned(x), result.model(x)
    out = float((got - want).abs().max() / want.abs().max())
    back, state = result.unmerge().state_dict(), model.state_dict()
    same = all(torch.equal(back[k], state[k]) for k in state)
    single = errors(tuned, result.model)
    half = P.insert_adapter(copy.deepcopy(model).bfloat16(), **common).model
    move(half)
    brain = errors(half, P.merge_adapter(half).model)
    count = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    cells = [
        kind, f"{count:,}", f"{statistics.median(inserting):.2f}", f"{statistics.median(merging):.2f}",
        f"{single[0]:.1e}", f"{single[1]:.1e}", f"{brain[0]:.2e}", f"{brain[1]:.2e}", f"{brain[2]:.2e}",
        f"{out:.1e}", "yes" if same else "NO",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    from foldline.passes.adapters import kinds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=[k for k, v in kinds().items() if v.foldable])
    given = parser.parse_args()
    model, x = build(given.model)
    tools = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy"))
    print(f"{given.model}, {sum(p.numel() for p in model.parameters()):,} parameters, rank {given.rank}; {tools},")
    print(f"Python {platform.python_version()}\n")
    print(
        "| kind | trained | insert s | merge s | fp32 error | in fp32 | bf16 error | in bf16 | half ulp | outputs "
        "| base restored |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for kind in given.kinds:
        print(row(kind, model, x, given.rank, given.repeats), flush=True)


if __name__ == "__main__":
    main()
