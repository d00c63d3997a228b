"""Which architectures a generic prune call handles, beside torch-pruning: no per-model code, ratio 0.5, head kept.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py [--peer] [--timeout 120] [MODEL ...]

Each model and each side runs in a process of its own (10 GiB of address space). foldline: ``P.prune(model, x,
ratio=0.5, verify=True)``, the whole call; "error" is masked against sliced, relative to the largest output. The peer:
``MagnitudePruner(pruning_ratio=0.5, ignored_layers=[classifier])``, build, init and step, then one forward. Weights
are random; constant ones (zero-initialised gates) are made random, so that no branch is hidden. Needs the extras
timm, bench; models named ``tv:`` are torchvision's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

MODELS = """
tv:shufflenet_v2_x0_5 tv:googlenet tv:squeezenet1_1 tv:mobilenet_v2 vgg11_bn resnet50 resnext50_32x4d seresnet50
res2net50_14w_8s resnest14d skresnet18 ecaresnet26t cspdarknet53 dla34 dpn68 densenet121 hrnet_w18_small selecsls42b
regnety_004 nfnet_f0 tresnet_m ese_vovnet19b_dw mnasnet_100 mobilenetv3_large_100 mobilenetv4_conv_small
efficientnet_b0 tf_efficientnetv2_b0 rexnet_100 ghostnet_100 repvit_m1 mobileone_s0 fastvit_t8 starnet_s1
edgenext_xx_small mobilevit_xxs efficientformer_l1 efficientvit_b0 tiny_vit_5m_224 levit_128s convnext_tiny
inception_next_tiny mambaout_femto poolformer_s12 vit_small_patch16_224 deit_tiny_patch16_224 cait_xxs24_224
beit_base_patch16_224 eva02_tiny_patch14_224 xcit_nano_12_p16_224 crossvit_tiny_240 convit_tiny twins_svt_small
pvt_v2_b0 visformer_tiny nest_tiny swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 gcvit_xxtiny volo_d1_224
davit_tiny focalnet_tiny_srf coat_lite_tiny maxvit_rmlp_pico_rw_256 hiera_tiny_224 sequencer2d_s mixer_s16_224
resmlp_12_224 gmlp_s16_224
""".split()


def build(name: str) -> tuple[Any, Any]:
    import torch
    from support import timm_models

    torch.manual_seed(0)
    if name.startswith("tv:"):
        model = timm_models.torchvision_models().get_model(name[3:], weights=None).eval()
    else:
        model = timm_models.create(name)
    size = model.default_cfg["input_size"][-1] if hasattr(model, "default_cfg") else 224
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                p.add_(0.1 * torch.randn_like(p))
    return model, torch.randn(2, 3, size, size)


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def ours(name: str) -> dict[str, Any]:
    from foldline import passes as P

    model, x = build(name)
    before, start = count(model), time.perf_counter()
    result = P.prune(model, (x,), ratio=0.5, verify=True)
    seconds = time.perf_counter() - start
    identity = result.report.passes[0].details["identity"]
    out = result.model(x)
    assert out.shape == model(x).shape
    return {
        "share": count(result.model) / before,
        "error": identity.get("relative_error"),
        "same_class": type(result.model) is type(model),
        "seconds": seconds,
    }


def peer(name: str) -> dict[str, Any]:
    import torch
    import torch_pruning as tp

    model, x = build(name)
    shape, before, start = model(x).shape, count(model), time.perf_counter()
    last = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    head = model.get_classifier() if hasattr(model, "get_classifier") else last
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[head]
    )
    pruner.step()
    seconds = time.perf_counter() - start
    assert model(x).shape == shape
    return {"share": count(model) / before, "seconds": seconds}


def isolated(side: str, name: str, limit: float) -> dict[str, Any]:
    return isolated_command([sys.executable, __file__, "--one", side, name], limit)


def isolated_command(command: list[str], limit: float) -> dict[str, Any]:
    """The JSON that a command prints last, or ``{"failed": why}``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"over {limit:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
        return {"failed": lines[-1][:80].replace("|", "/") if lines else f"exit {done.returncode}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "MODEL"), help="run one side in this process, print JSON")
    parser.add_argument("--peer", action="store_true", help="run torch-pruning too")
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("models", nargs="*", default=MODELS)
    args = parser.parse_args()
    if args.one:
        resource.setrlimit(resource.RLIMIT_AS, (10 << 30, 10 << 30))
        print(json.dumps({"ours": ours, "peer": peer}[args.one[0]](args.one[1])))
        return
    print("| model | parameters left | error | comes back as | s |" + (" torch-pruning | s |" if args.peer else ""))
    print("|---|---|---|---|---|" + ("---|---|" if args.peer else ""))
    good = other = 0
    for name in args.models:
        a = isolated("ours", name, args.timeout)
        if "failed" in a:
            row = f"| {name} | {a['failed']} | | | |"
        else:
            good += 1
            kind = "its class" if a["same_class"] else "GraphModule"
            error = "statistics only" if a["error"] is None else f"{a['error']:.0e}"
            row = f"| {name} | {a['share']:.2f} | {error} | {kind} | {a['seconds']:.1f} |"
        if args.peer:
            b = isolated("peer", name, args.timeout)
            other += "failed" not in b
            row += f" {b['failed']} | |" if "failed" in b else f" {b['share']:.2f} | {b['seconds']:.1f} |"
        print(row, flush=True)
    print(f"\nfoldline {good} of {len(args.models)}" + (f", torch-pruning {other}" if args.peer else ""))


if __name__ == "__main__":
    main()
