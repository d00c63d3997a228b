"""Block reconstruction: blocks found in the graph are tuned, one after the other, to give what they gave in float.

Sources: "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (blocks in sequence on the
inputs that the quantized part gives), "QDrop" (activations quantized at random during reconstruction), "Gradient-Based
Post-Training Quantization: Challenging the Status Quo" (loss, degrees of freedom, optimizer, batches as a recipe),
"LiDAR-PTQ" (a task loss on the network's outputs beside the block's own).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...recover.runner import bound
from .activations import Activation
from .grid import Grid, is_integer
from .job import Rounded, RoundingJob
from .layerwise import LayerWalk, first_samples
from .nearest import nearest
from .options import BlockOptions, GPTQOptions, options
from .regions import Region, blocks, merged
from .samples import Samples
from .simulate import Env, Hooks, Simulation, checked, tensor, use
from .variables import Variable, variable

BITS_LEARNED = 255
"""Activation grids with fewer points than this have their scales learned by default."""


def reconstruct(job: RoundingJob) -> dict[str, Rounded]:
    """Every block of the job in execution order. Memory: live values of both networks for the samples used."""
    chosen = options(BlockOptions, job.options, job.method)
    sim = Simulation(job)
    checked(sim, job.batches, job.method)
    return _Reconstruction(sim, chosen).run(first_samples(bound(sim.graph, job.batches), chosen.samples))


@dataclass
class _Block:
    """What is learned of one region."""

    region: Region
    variables: dict[str, Variable] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    activations: list[Activation] = field(default_factory=list)

    def hooks(self, base: Hooks) -> Hooks:
        """Soft weights on top of what is fixed already."""
        weights = {name: v.soft() for name, v in self.variables.items()}
        return Hooks({**base.weights, **weights}, {**base.biases, **self.biases}, base.points)

    def state(self) -> list[Tensor]:
        tensors = [t for v in self.variables.values() for t in (*v.variables(), v.log_scale)]
        tensors += [*self.biases.values(), *(a.scale for a in self.activations if a.scale is not None)]
        return tensors


class _Reconstruction:
    def __init__(self, sim: Simulation, chosen: BlockOptions) -> None:
        self.sim, self.job, self.chosen = sim, sim.job, chosen
        self.hooks = Hooks({}, {}, sim.quantizers(sim.activations))
        self.found: dict[str, Rounded] = {}
        self.settled: set[int] = set()
        self.tied: dict[str, Rounded] = {}
        self.outputs: list[list[Tensor]] = []

    def run(self, fed: list[dict[str, Any]]) -> dict[str, Rounded]:
        regions = blocks(self.sim, self.chosen.most)
        regions = merged(self.sim, regions, self.chosen.merge) if self.chosen.merge > 1 else regions
        self.floats, self.quants = self.sim.envs(fed), self.sim.envs(fed)
        if self.chosen.task:
            self._final(fed)
        for region in self.job.progress(regions, "reconstructing"):
            self._region(region)
        return {name: self.found[name] for name in (s.node.name for s in self.job.placement.weights)}

    @torch.no_grad()
    def _final(self, fed: list[dict[str, Any]]) -> None:
        """The float network's own outputs per batch, for the task loss."""
        for env in self.sim.envs(fed):
            self.sim.execute(range(self.sim.length), env, free=True)
            self.outputs.append([self.sim.value(v, env) for v in self.sim.graph.outputs])

    def _region(self, region: Region) -> None:
        sim = self.sim
        if not region.sites:
            with torch.no_grad():
                self._pass(region)
            return
        if self.chosen.inputs == "float":
            self.quants = [dict(env) for env in self.floats]
        with torch.no_grad():
            start = self._start(region)
            samples = Samples.of(sim, region, self.floats, self.quants)
        block = self._block(region, start)
        facts = self._learn(block, samples)
        self._settle(block, facts)
        with torch.no_grad():
            self._pass(region, floats=False)
        for env in (*self.floats, *self.quants):
            for i in region.calls:
                for key in sim.runner.dead(i):
                    env.pop(key, None)

    def _pass(self, region: Region, floats: bool = True) -> None:
        for env in self.floats if floats else ():
            self.sim.execute(region.calls, env, free=True)
        for env in self.quants:
            self.sim.execute(region.calls, env, self.hooks, free=True)

    def _start(self, region: Region) -> dict[str, Rounded]:
        """Integers to begin with; leaves the float network's values of the whole region in its environments."""
        found: dict[str, Rounded] = {}
        if self.chosen.start == "gptq" and self.chosen.freedom in ("adaround", "adaquant"):
            walk = LayerWalk(self.sim, GPTQOptions(rows=self.chosen.rows, bias=self.chosen.bias))
            inner = Hooks(dict(self.hooks.weights), dict(self.hooks.biases), self.hooks.points)
            quants = [dict(env) for env in self.quants]
            return walk.region(region, self.floats, quants, inner)
        for env in self.floats:
            self.sim.execute(region.calls, env)
        return found

    def _block(self, region: Region, start: dict[str, Rounded]) -> _Block:
        chosen, block = self.chosen, _Block(region)
        for name in region.sites:
            site, params = self.sim.sites[name], self.job.weight_params[name]
            if not is_integer(params) or site.node.op not in ("conv", "linear", "matmul", "gemm"):
                data = site.weight.numpy().astype(np.float32, copy=False)
                self.found[name] = Rounded(nearest(data, params), params, details={"rounding": "nearest"})
                use(self.hooks, site, self.found[name])
                continue
            twin = next((n for n in block.variables if self.sim.sites[n].weight is site.weight), None)
            if twin is not None:  # one weight for several layers: learned once, for all of them in the block
                block.variables[name] = block.variables[twin]
                continue
            if site.weight.name in self.tied:
                self.found[name] = replace(self.tied[site.weight.name], bias=None, points={}, details={"tied": True})
                use(self.hooks, site, self.found[name])
                continue
            weight = tensor(site.weight)
            begun = start.get(name)
            grid = Grid.of(params if begun is None else begun.params, tuple(weight.shape))
            integers = None if begun is None else torch.from_numpy(begun.integers.astype(np.float32))
            block.variables[name] = variable(
                chosen.freedom, weight, grid, integers, chosen.scales, chosen.rank, self.job.seed
            )
            if chosen.bias and site.bias is not None and site.bias_position in region.calls:
                bias = tensor(site.bias) if begun is None or begun.bias is None else torch.from_numpy(begun.bias.copy())
                block.biases[name] = bias.reshape(site.bias.shape).requires_grad_()
        for name in region.points:
            a = self.sim.activations[name]
            few = a.high - a.low < BITS_LEARNED
            learn = few if chosen.activations is None else chosen.activations
            if learn and a.scale is not None and id(a) not in self.settled:
                self.settled.add(id(a))
                block.activations.append(a)
        return block

    # ---- learning ------------------------------------------------------------------------------------------------
    def _learn(self, block: _Block, samples: Samples) -> dict[str, Any]:
        chosen = self.chosen
        if not block.variables:
            return {}
        begin = self._snapshot(block)
        before = self._judge(block, samples)
        draw = torch.Generator().manual_seed(self.job.seed)
        points = [self.sim.activations[name] for name in block.region.points]
        for a in points:
            a.drop, a.generator = self._drop(block.region), draw
        for a in block.activations:
            assert a.scale is not None
            a.scale.requires_grad_()
        optimizer, schedule = self._optimizer(block)
        for step in range(chosen.steps):
            loss = self._loss(block, samples, draw) / max(before, 1e-30)
            for v in block.variables.values():
                extra = v.penalty(step / chosen.steps)
                loss = loss if extra is None else loss + extra
            optimizer.zero_grad()
            loss.backward()
            if chosen.optimizer == "sign":
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = None if p.grad is None else p.grad.sign()
            optimizer.step()
            schedule.step()
        for a in points:
            a.drop, a.generator = 0.0, None
        for a in block.activations:
            assert a.scale is not None
            a.scale.requires_grad_(False)
        after = self._judge(block, samples)
        if not after <= before:  # also where it diverged
            self._restore(block, begin)
        return {"block": block.region.sites, "loss_before": before, "loss_after": min(before, after)}

    def _drop(self, region: Region) -> float:
        if self.chosen.drop is not None:
            return self.chosen.drop
        inside = [self.sim.activations[name] for name in region.points]
        return 0.5 if any(a.high - a.low < BITS_LEARNED for a in inside) else 0.0

    def _optimizer(self, block: _Block) -> tuple[torch.optim.Optimizer, Any]:
        chosen = self.chosen
        groups: list[dict[str, Any]] = []
        for v in {id(v): v for v in block.variables.values()}.values():
            groups += v.groups(chosen.rate)
        if block.biases:
            size = sum(float(b.detach().abs().mean()) for b in block.biases.values()) / len(block.biases)
            groups.append({"params": list(block.biases.values()), "lr": 1e-3 * max(size, 1e-3)})
        groups += [
            {"params": [a.scale], "lr": 5e-3 * float(a.scale.detach())}
            for a in block.activations
            if a.scale is not None
        ]
        kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
            "adam": lambda g: torch.optim.Adam(g, betas=(0.9, 0.99)),
            "sgd": lambda g: torch.optim.SGD(g, momentum=0.9, nesterov=True, lr=1e-2),
            "sign": lambda g: torch.optim.SGD(g, lr=1e-2),
        }
        optimizer = kinds[chosen.optimizer](groups)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(chosen.steps, 1))

    def _loss(self, block: _Block, samples: Samples, draw: torch.Generator) -> Tensor:
        picked = samples.draw(self.chosen.batch, draw)
        env = picked.env(self._drop(block.region), draw)
        self.sim.execute(block.region.calls, env, block.hooks(self.hooks))
        loss = self._distance(block.region, env, picked.wanted)
        if self.chosen.task:
            loss = loss + self.chosen.task * self._task(block.region, env, picked)
        return loss

    def _distance(self, region: Region, env: Env, wanted: dict[Hashable, Tensor]) -> Tensor:
        total = torch.zeros(())
        for key, y in wanted.items():
            z = env[key]
            if self.chosen.loss == "cosine":
                a, b = (t.flatten(1) if t.dim() > 1 else t[None] for t in (z, y))
                total = total + (1 - F.cosine_similarity(a, b, dim=1)).mean()
            elif self.chosen.loss == "l1":
                total = total + F.l1_loss(z, y)
            elif self.chosen.loss == "huber":
                total = total + F.smooth_l1_loss(z, y, beta=float(y.std()) * 0.1 + 1e-12)
            else:
                total = total + F.mse_loss(z, y)
        return total

    def _task(self, region: Region, env: Env, picked: Any) -> Tensor:
        """How far the network's outputs move when this block's result goes through the float rest."""
        rest = {**picked.rest, **{key: env[key] for key in region.exits}}
        self.sim.execute(range(region.last, self.sim.length), rest)
        total = torch.zeros(())
        for v, wanted in zip(self.sim.graph.outputs, picked.outputs(self.outputs), strict=True):
            y = self.sim.value(v, rest)
            if y.dim() == 2:
                total = total + F.kl_div(y.log_softmax(1), wanted.softmax(1), reduction="batchmean")
            else:
                total = total + F.mse_loss(y, wanted) / wanted.square().mean().clamp_min(1e-30)
        return total

    @torch.no_grad()
    def _judge(self, block: _Block, samples: Samples) -> float:
        """The loss of hard integers with everything quantized, on all samples."""
        weights = {name: v.hard() for name, v in block.variables.items()}
        hooks = Hooks(
            {**self.hooks.weights, **weights}, {**self.hooks.biases, **block.biases}, self.hooks.points
        )  # fmt: skip
        total, count = 0.0, 0
        for picked in samples.all(max(self.chosen.batch, 64)):
            env = picked.env(0.0, None)
            self.sim.execute(block.region.calls, env, hooks)
            total += float(self._distance(block.region, env, picked.wanted)) * picked.size
            count += picked.size
        return total / max(count, 1)

    def _snapshot(self, block: _Block) -> list[Tensor]:
        return [t.detach().clone() for t in block.state()]

    @torch.no_grad()
    def _restore(self, block: _Block, state: list[Tensor]) -> None:
        for t, old in zip(block.state(), state, strict=True):
            t.copy_(old)

    def _settle(self, block: _Block, facts: dict[str, Any]) -> None:
        """Fix the block: hard integers, scales, biases, activation grids."""
        learned = {id(a): a.learned() for a in block.activations}
        points = {
            name: learned[id(a)] for name, a in self.sim.activations.items() if id(a) in learned
        }  # fmt: skip
        for i, (name, v) in enumerate(block.variables.items()):
            params = v.grid.rescaled(v.scale) if v.learn_scale else v.grid.params
            bias = block.biases.get(name)
            self.found[name] = Rounded(
                v.grid.stored(v.integers()),
                params,
                None if bias is None else bias.detach().reshape(-1).numpy().copy(),
                points if i == 0 else {},
                {**facts, "learned": v.count()},
            )
            use(self.hooks, self.sim.sites[name], self.found[name])
            self.tied[self.sim.sites[name].weight.name] = self.found[name]
