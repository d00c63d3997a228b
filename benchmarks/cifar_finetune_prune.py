"""Pruning one ResNet-56 by foldline and by torch-pruning to the same MACs, saved as plain state dicts.

A setting is ``side:criterion/scope[/option...]``: ``foldline:taylor/isomorphic``, ``peer:l2/local/inner``. Sides:
foldline, peer. Options of both: ``inner`` (the widths between blocks stay whole). Of foldline: ``recover`` (P.Recover
after the cut), ``scratch`` (reinitialised afterwards). Of the peer: ``rewritten`` (the padded shortcuts written by
hand as 1x1 convolutions of zeros and ones: the same function, in an operator that it knows).
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar_finetune_model import CHANGES, cost, rebuild, reinitialize, shortcuts_of, sources, widths, with_convolutions
from support.resnet_cifar import ResNetCifar
from torch import nn

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Setting:
    """One way to prune; parsed from its name."""

    text: str
    side: str
    criterion: str
    scope: str
    options: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Setting:
        side, _, rest = text.partition(":")
        criterion, scope, *options = rest.split("/")
        allowed = {"foldline": {"inner", "recover", "scratch"}, "peer": {"inner", "rewritten"}}
        if side not in allowed or not set(options) <= allowed[side]:
            raise SystemExit(f"no such setting: {text!r}")
        return cls(text, side, criterion, scope, frozenset(options))


@dataclass
class Pruned:
    """A pruned network as data."""

    state: dict[str, torch.Tensor]
    shortcuts: dict[str, list[int]]


def by_foldline(base: ResNetCifar, share: float, setting: Setting, pairs: Pairs, seed: int) -> Pruned:
    """foldline's generic call; ``share`` of the MACs is to remain. Checks that the saved data gives its outputs."""
    import foldline as fl
    from foldline import passes as P

    inputs = [x for x, _ in pairs]
    needs: dict[str, Any] = {"data": pairs, "calibration": inputs}
    if "inner" in setting.options:
        needs["ignore"] = ["bn1", "layer?.*.bn2"]
    result, wanted_share = None, share
    for _ in range(3):  # a coarse selection may land up to 2 % off: ask again, the rows of the table must compare
        steps: list[Any] = [P.Prune(criterion=setting.criterion, scope=setting.scope, target=fl.macs(share), **needs)]
        if "recover" in setting.options:
            steps.append(P.Recover(calibration=inputs))
        again = fl.Pipeline(steps, seed=seed).run(base, (pairs[0][0][:4],), verify=False)
        reached = cost_share(again)
        if result is None or abs(reached - wanted_share) < abs(cost_share(result) - wanted_share):
            result = again
        if abs(reached / wanted_share - 1) < 0.01:
            break
        share *= wanted_share / reached
    assert result is not None
    plan = result.plan.weights
    state = {k: v.detach().clone() for k, v in result.model.state_dict().items()}
    shortcuts = {}
    for name in CHANGES:
        block = base.get_submodule(name)
        inside = plan.get(f"{name}.conv1.weight", {}).get(1, range(block.conv1.in_channels))
        outside = plan.get(f"{name}.conv2.weight", {}).get(0, range(block.conv2.out_channels))
        shortcuts[name] = sources([int(i) for i in inside], [int(i) for i in outside], block.padding)
    made = rebuild(state, shortcuts)
    x = pairs[0][0][:16]
    with torch.no_grad():
        wanted = result.model.eval()(x)
        error = float((made(x) - wanted).abs().max() / wanted.abs().max())
    if error > 1e-4:
        raise AssertionError(f"{setting.text}: the rebuilt network differs from foldline's by {error:.1e}")
    if "scratch" in setting.options:
        made = reinitialize(made, seed)
    return Pruned({k: v.clone() for k, v in made.state_dict().items()}, shortcuts)


def cost_share(result: Any) -> float:
    """What remains of the MACs."""
    return float(result.report.after.macs / result.report.before.macs)


def by_peer(base: ResNetCifar, share: float, setting: Setting, pairs: Pairs, seed: int) -> Pruned:
    """torch-pruning, its ratio found by bisection so that its own result has the MACs asked for.

    One ratio moves all layers of a width at once, too coarse for 1 % where it ranks per layer: then the first layers
    in order get the ratio of the next step (``pruning_ratio_dict``), as many as come closest.
    """
    wanted = share * cost(base)[0]
    best: tuple[float, ResNetCifar] | None = None

    def attempt(ratio: float, more: float, count: int) -> float:
        nonlocal best
        model = _peer_once(base, setting, ratio, more, count, pairs, seed)
        macs = cost(model)[0]
        if best is None or abs(macs - wanted) < abs(best[0] - wanted):
            best = (macs, model)
        return macs

    low, high = 0.0, 0.95
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if attempt(middle, middle, 0) > wanted else (low, middle)
    first, last = 0, 3 * 9
    while best is not None and abs(best[0] - wanted) > 0.005 * wanted and first < last:
        count = (first + last) // 2
        first, last = (count + 1, last) if attempt(low, high, count) > wanted else (first, count)
    assert best is not None
    model = best[1]
    return Pruned({k: v.detach().clone() for k, v in model.state_dict().items()}, shortcuts_of(model))


def _peer_once(
    base: ResNetCifar, setting: Setting, ratio: float, more: float, count: int, pairs: Pairs, seed: int
) -> ResNetCifar:
    import torch_pruning as tp

    torch.manual_seed(seed)
    model = copy.deepcopy(base).eval()
    if "rewritten" in setting.options:
        with_convolutions(model)
    ignored: list[nn.Module] = [model.linear]
    blocks = [b for stage in (model.layer1, model.layer2, model.layer3) for b in stage]
    if "inner" in setting.options:
        ignored += [model.conv1, *(b.conv2 for b in blocks)]
    importance: Any = {
        "l1": lambda: tp.importance.MagnitudeImportance(p=1),
        "l2": lambda: tp.importance.MagnitudeImportance(p=2),
        "group": lambda: tp.importance.MagnitudeImportance(p=2),
        "taylor": lambda: tp.importance.TaylorImportance(),
        "hessian": lambda: tp.importance.HessianImportance(),
        "random": lambda: tp.importance.RandomImportance(),
    }[setting.criterion]()
    pruner = tp.pruner.GroupNormPruner if setting.criterion == "group" else tp.pruner.MagnitudePruner
    run = pruner(
        model,
        pairs[0][0][:4],
        importance=importance,
        pruning_ratio=ratio,
        pruning_ratio_dict={b.conv1: more for b in blocks[:count]},
        ignored_layers=ignored,
        global_pruning=setting.scope != "local",
        isomorphic=setting.scope == "isomorphic",
    )
    if setting.criterion == "taylor":
        for p, grad in zip(model.parameters(), _gradients(model, pairs), strict=True):
            p.grad = grad.clone()
    elif setting.criterion == "hessian":
        importance.zero_grad()
        for x, y in pairs[:2]:
            for loss in F.cross_entropy(model(x), y, reduction="none"):
                model.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(model)
    run.step()
    with torch.no_grad():
        model(pairs[0][0][:4])
    return model


_known: dict[bytes, list[torch.Tensor]] = {}


def _gradients(model: nn.Module, pairs: Pairs) -> list[torch.Tensor]:
    """Gradients of the loss summed over the batches; the bisection asks for those of one network again and again."""
    key = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).digest()
    if key not in _known:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in pairs:
            torch._foreach_add_(total, torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))
        _known[key] = total
    return _known[key]


def prune_all(
    base: ResNetCifar,
    settings: list[str],
    speedups: list[float],
    pairs: Pairs,
    folder: Path,
    seed: int,
    test: Any = None,
) -> list[dict[str, Any]]:
    """Prune by every setting to every speed-up; what fails is recorded with its reason. Writes ``index.json``.

    Settings that an earlier call left in ``folder`` stay, those asked for again are replaced. ``test``: images and
    labels on which each is judged right after the cut.
    """
    folder.mkdir(parents=True, exist_ok=True)
    full = cost(base)[0]
    index = folder / "index.json"
    entries: list[dict[str, Any]] = json.loads(index.read_text()) if index.is_file() else []
    start = _save(folder, "base", "base", 1.0, Pruned(base.state_dict(), shortcuts_of(base)), full)
    entries = [start, *(e for e in entries if e["name"] != "base")]
    for text in settings:
        setting = Setting.parse(text)
        for speedup in speedups:
            name = f"{text.replace(':', '-').replace('/', '-')}-{speedup:g}x"
            started = time.monotonic()
            entries = [e for e in entries if e["name"] != name]
            try:
                side = by_foldline if setting.side == "foldline" else by_peer
                pruned = side(base, 1 / speedup, setting, pairs, seed)
                entries.append(_save(folder, name, text, speedup, pruned, full))
                e = entries[-1]
                print(f"{name}: {e['speedup']:.3f}x, {e['parameters']:,} parameters{_judge(folder, e, test)}", end="")
            except (Exception, SystemExit) as error:  # a failure is a row of the table, not the end of the run
                entries.append({"name": name, "setting": text, "asked": speedup, "failed": _reason(error)})
                print(f"{name}: failed: {entries[-1]['failed']}", end="")
            print(f" ({time.monotonic() - started:.1f} s)", flush=True)
            index.write_text(json.dumps(entries, indent=1))
    return entries


@torch.no_grad()
def _judge(folder: Path, entry: dict[str, Any], test: Any) -> str:
    if test is None:
        return ""
    model = rebuild(torch.load(folder / f"{entry['name']}.pt", weights_only=True), entry["shortcuts"])
    batches = zip(test[0].split(500), test[1].split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return f", {100 * right / len(test[1]):.2f} % right after"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _save(folder: Path, name: str, text: str, asked: float, pruned: Pruned, full: int) -> dict[str, Any]:
    model = rebuild(pruned.state, pruned.shortcuts)
    macs, parameters = cost(model)
    torch.save(pruned.state, folder / f"{name}.pt")
    return {
        "name": name,
        "setting": text,
        "asked": asked,
        "macs": macs,
        "speedup": full / macs,
        "parameters": parameters,
        "widths": widths(model),
        "shortcuts": pruned.shortcuts,
    }
