"""Training for pruning: sparsity-inducing penalties beside torch-pruning's, schedules, scratch, and PAT's speed.

    OMP_NUM_THREADS=1 python benchmarks/training_aware.py [--seeds 2] [--part penalties|schedules|scratch|pat]
        [--out FILE]

With --out every number is written as soon as it is known, and a run that was broken off goes on where it stopped.

The first three parts use scikit-learn's digits (1,200 training and 597 test images of 8x8) and a small residual CNN
trained by the script; every row starts from the same trained weights of its seed, cuts half of every axis and, where it
says so, trains as long as the others. The last part is a Llama-shaped model of random weights: 25 % of the residual
width folded away (F1-03 of the catalogue asks for more than 1.15 times the speed on a CPU), whole model against whole
model in turn. The peer is torch-pruning==1.6.1 (GroupNormPruner) in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPOCHS, TUNE, STEPS = 8, 6, 3
STRENGTHS = (1e-4, 1e-3, 1e-2)


class Net(nn.Module):
    """Three residual blocks of 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.convs = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(24) for _ in range(6))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for i in range(0, 6, 2):
            y = F.relu(self.norms[i](self.convs[i](x)))
            x = F.relu(x + self.norms[i + 1](self.convs[i + 1](y)))
        return self.head(x.mean((2, 3)))


class Digits:
    """The data, training and scoring, one seed's."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(found.images, dtype=torch.float32)[:, None][order] / 16
        y = torch.tensor(found.target)[order]
        self.train_set, self.test_set = (x[:1200], y[:1200]), (x[1200:], y[1200:])
        self.example = (x[:2],)
        self.seed = seed

    def train(self, model: nn.Module, epochs: int = TUNE, each: Callable[[nn.Module], None] | None = None) -> None:
        """SGD; ``each`` is called between the backward pass and the step."""
        torch.manual_seed(self.seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        model.train()
        x, y = self.train_set
        for _ in range(epochs):
            for i in torch.randperm(len(x)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[i]), y[i]).backward()
                if each is not None:
                    each(model)
                optimizer.step()

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        x, y = self.test_set
        return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()

    @cached_property
    def trained(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = Net()
        self.train(model, EPOCHS)
        return model.eval()

    def base(self) -> nn.Module:
        """The trained weights that every row of this seed starts from."""
        return copy.deepcopy(self.trained)


class Known:
    """What has been computed: in a file where one is given, so that nothing is computed twice."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.is_file() else {}

    def __call__(self, part: str, seed: int, name: str, compute: Callable[[], Any]) -> Any:
        key = f"{part}/{seed}/{name}"
        if key not in self.found:
            began = time.process_time()
            self.found[key] = compute()
            print(f"{key}: {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
            if self.path is not None:
                self.path.write_text(json.dumps(self.found, indent=1))
        return self.found[key]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):5.1f} ({min(values):.1f} to {max(values):.1f})"


def macs(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    import foldline as fl

    return fl.cost(fl.load(model, example)).macs


def peer(model: nn.Module, d: Digits, strength: float | None) -> nn.Module:
    """torch-pruning: half of every group by its group norm; with a strength, TUNE epochs of its regularizer first."""
    import torch_pruning as tp

    pruner = tp.pruner.GroupNormPruner(
        model, d.example[0], importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[model.head], reg=strength or 1e-4,
    )  # fmt: skip
    if strength is not None:
        pruner.update_regularizer()
        d.train(model, each=lambda m: pruner.regularize(m))
    pruner.step()
    return model


def under_penalty(d: Digits, kind: Any, strength: float, **options: Any) -> nn.Module:
    """foldline: TUNE epochs under a penalty, then half of every axis cut."""
    from foldline import passes as P

    model = d.base()
    with P.regularize(model, d.example, kind, strength, **options) as hooks:
        d.train(model)
    return hooks.prune(verify=False).model


def penalties(seeds: int, known: Known) -> None:
    """Accuracy right after the cut, with no training behind it."""
    from foldline import passes as P

    makers: dict[str, Callable[[Digits], nn.Module]] = {
        "trained, not cut": lambda d: d.base(),
        "cut by l2, no penalty before": lambda d: P.prune(d.base(), d.example, ratio=0.5, verify=False).model,
        "torch-pruning, no penalty before": lambda d: peer(d.base(), d, None),
    }
    for strength in STRENGTHS:
        makers[f"torch-pruning, penalty {strength:g}"] = lambda d, s=strength: peer(d.base(), d, s)
        for kind, mode in (("group_lasso", "gradient"), ("group_lasso", "proximal"), ("masked_l1", "proximal")):
            given = strength * (100 if kind == "masked_l1" else 1)  # gains alone, not whole slabs
            makers[f"{kind}, {mode}, {given:g}"] = lambda d, k=kind, m=mode, s=given: under_penalty(d, k, s, mode=m)
    for growth in (1e-2, 1e-1):
        makers[f"growing by {growth:g} every 4 steps"] = lambda d, s=growth: under_penalty(
            d, "growing", s, every=4, ceiling=5.0, mode="proximal"
        )
    rows: dict[str, list[tuple[float, int]]] = {}
    for seed in range(seeds):
        d = Digits(seed)
        for name, make in makers.items():

            def judged(make: Any = make, d: Digits = d) -> tuple[float, int]:
                model = make(d)
                return d.score(model), macs(model, d.example)

            rows.setdefault(name, []).append(known("penalties", seed, name, judged))
    print(f"\n## half of every axis cut after {TUNE} epochs under a penalty, accuracy with no training after the cut\n")
    print("| training before the cut | accuracy, mean (range) | MACs |\n|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {spread([v for v, _ in values])} | {values[-1][1]:,} |")


def schedules(seeds: int, known: Known) -> None:
    """One-shot and iterative at the same number of training epochs."""
    from foldline import passes as P

    def one_shot(d: Digits) -> nn.Module:
        model = P.prune(d.base(), d.example, ratio=0.75, verify=False).model
        d.train(model)
        return model

    def in_steps(d: Digits, schedule: Any) -> nn.Module:
        return P.prune_iteratively(
            d.base(), d.example, prune=P.Prune(ratio=0.75), steps=STEPS, schedule=schedule, verify=False,
            train=lambda m: d.train(m, TUNE // STEPS),
        ).model  # fmt: skip

    makers: dict[str, Callable[[Digits], nn.Module]] = {"one-shot": one_shot}
    for schedule in ("linear", "cubic", "geometric"):
        makers[f"{schedule}, {STEPS} steps"] = lambda d, s=schedule: in_steps(d, s)
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        d = Digits(seed)
        for name, make in makers.items():
            score = known("schedules", seed, name, lambda make=make, d=d: d.score(make(d)))
            rows.setdefault(name, []).append(score)
    print(f"\n## three quarters of every axis cut, {TUNE} epochs of training in all\n")
    print("| schedule | accuracy, mean (range) |\n|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {spread(values)} |")


def scratch(seeds: int, known: Known) -> None:
    """F1-05: the table of compare_with_scratch; no winner is expected."""
    from foldline import passes as P

    def compared(d: Digits) -> str:
        result = P.prune(d.base(), d.example, criterion="l1", ratio=0.4, verify=False)
        return str(P.compare_with_scratch(result, d.train, d.score, seed=d.seed))

    print(f"\n## inherited weights against scratch, 40 % by l1, {TUNE} epochs each\n")
    for seed in range(seeds):
        print(known("scratch", seed, "table", lambda seed=seed: compared(Digits(seed))))


def pat() -> None:
    """F1-03: time of a Llama-shaped model before and after a quarter of its residual width is folded away."""
    import foldline as fl
    from foldline import passes as P

    from tests.support.timm_models import transformers

    module = transformers()
    config = module.LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = module.LlamaForCausalLM(config).eval()
    x = {"input_ids": torch.randint(4000, (1, 128))}
    plain = fl.load(model, x).to_model()
    inserted = P.insert_linear_op(model, x, rank=16, where="both", verify=False)
    masked = P.shared_mask(inserted.model, x, ratio=0.25, round_to=16, verify=False)
    cut = P.fold_linear_op(masked.model, x)
    before, after = fl.cost(fl.load(model, x)), fl.cost(cut.graph)
    times: dict[str, list[float]] = {"before": [], "after": []}
    with torch.no_grad():
        for i in range(43):
            for name, m in (("before", plain), ("after", cut.model)):
                start = time.perf_counter()
                m(**x)
                if i > 2:
                    times[name].append(time.perf_counter() - start)
    outputs = (cut.report.comparison or {}).get("outputs", {}).values()
    error = max((o["max_rel"] for o in outputs), default=float("nan"))
    a, b = (1000 * statistics.median(times[n]) for n in ("before", "after"))
    print("\n## PAT: a quarter of a Llama-shaped residual width folded away (torch, medians of 40 in turn)\n")
    print("| | parameters | MACs | ms |\n|---|---|---|---|")
    print(f"| before | {before.parameters:,} | {before.macs:,} | {a:.1f} |")
    print(f"| after | {after.parameters:,} | {after.macs:,} | {b:.1f} |")
    print(f"\n{a / b:.2f} times as fast; largest relative error of the fold {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON of what is known; what it holds is not computed again")
    parser.add_argument("--part", choices=["penalties", "schedules", "scratch", "pat"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = Known(given.out)
    print(", ".join(f"{p} {version(p)}" for p in ("torch", "torch-pruning", "transformers", "scikit-learn")))
    for name, part in (("penalties", penalties), ("schedules", schedules), ("scratch", scratch)):
        if given.part in (None, name):
            part(given.seeds, known)
    if given.part in (None, "pat"):
        pat()


if __name__ == "__main__":
    main()
