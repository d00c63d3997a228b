"""FlatTransform: learned Kronecker-factored affine maps before linear layers, two small products at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from .affine import insert_kronecker, near_square
from .boundary import environment, find_boundaries
from .common import Scaler, Site, sites_of
from .grids import Formats, formats_of
from .hadamard import random_orthogonal
from .learning import fake_quantize
from .samples import Rows, sample


@dataclass(frozen=True)
class Flat:
    """The learned map of one site.

    Attributes:
        left, right: float64 [a, a], [b, b]: the channels x, as [a, b], become ``left^T x right``.
        factors: [channels], what the channels are divided by first.
        clips: shares of the range that activations and weights use.
        before, after: relative squared error of the quantized outputs, without any transform and with it.
    """

    left: np.ndarray
    right: np.ndarray
    factors: np.ndarray
    clips: tuple[float, float]
    before: float
    after: float

    @property
    def condition(self) -> float:
        """Condition number of the whole map: the product of both factors'."""
        return float(np.linalg.cond(self.left) * np.linalg.cond(self.right))


class FlatTransform(Pass):
    """Learned affine maps that flatten activations and weights: ``y = Q(x / c P) Q(P^-1 c W^T)``, ``P = P1 kron P2``.

    Identity: ``(x P)(P^-1 W^T) = x W^T``. ``FlatQuant: Flatness Matters for LLM Quantization``: exactly two small
    matrix products per input stay in the graph (the layers that read one value share them), the inverse goes into the
    weights, the channel scale c into whatever absorbs it before (else there is none). Both factors and c are learned by
    the squared error of the block's output, all maps of a block together, as in the paper (``objective="blocks"``), or
    per input by that of the layers that read it; there the clipping of ranges is learned too (reported, not applied:
    ranges are the quantizer's business).

    Exact up to float rounding before quantization; the condition number of every P is reported.
    """

    name: ClassVar[str] = "flat_transform"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    target: str | None = None
    """Backend whose formats learning simulates."""
    weight_bits: int | None = Field(4, ge=2, le=8)
    """Width of the weights while learning."""
    activation_bits: int | None = Field(4, ge=2, le=16)
    """Width of the activations while learning."""
    block: int = Field(0, ge=0)
    """Input channels that share a weight scale; 0: one scale per output channel."""
    symmetric: bool | None = None
    """Weights without zero points while learning, or with them; None: as the target has them."""
    per_token: bool = False
    """Activations with a range per row while learning."""
    objective: Literal["layers", "blocks"] = "layers"
    """What learning lowers: the error of the layers that read an input, or of the output of the block they are in."""
    steps: int = Field(100, ge=1)
    """Steps of learning per input, or per block."""
    rate: float = Field(5e-3, gt=0)
    """Learning rate."""
    clip: bool = True
    """Learn how much of the ranges is used (``objective="layers"``)."""
    condition: float = Field(1e3, gt=1)
    """Largest condition number of a map; beyond it the site keeps its orthogonal start."""
    rows: int = Field(256, ge=16)
    """Rows of activations kept per layer."""
    targets: list[str] | None = None
    """Glob patterns of the layers whose inputs are transformed; all linear layers if None."""
    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of layers to leave alone."""
    calibration: Any = Field(None, exclude=True)
    """Batches; those of the run if None."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        from .common import matches

        graph.separate_shared()
        env = environment(graph, ctx)
        scaler = Scaler(graph, env)
        formats = formats_of(
            ctx, self.target, self.weight_bits, self.activation_bits, self.block, symmetric=self.symmetric,
            per_token=self.per_token,
        )  # fmt: skip
        sites = [
            site
            for site in sites_of(find_boundaries(graph), self.ignore)
            if self.targets is None or any(matches(node, self.targets) for node, _ in site.boundary.readers)
        ]
        decisions = []
        if self.objective == "blocks":
            from .flat_blocks import learn_blocks

            flats = learn_blocks(sites, self, scaler, formats, self.batches(ctx), ctx.seed)
            for site in sites:
                decisions.append(self._put(graph, env, scaler, site, flats.get(site.boundary.name), "block"))
        else:
            places = {site.boundary.name: site.boundary.axis for site in sites}
            rows = sample(graph, self.batches(ctx), places, Rows, self.rows, ctx.progress)
            for site in ctx.progress(sites, "learning affine maps"):
                decisions.append(self._site(graph, env, scaler, site, rows[site.boundary.name], formats, ctx.seed))
        graph.refresh()
        made = sum(d.action == "transformed" for d in decisions)
        return Outcome(decisions=decisions, details={"transformed": made, "products": 2 * made})

    def _site(
        self, graph: Graph, env: Any, scaler: Scaler, site: Site, rows: Rows, formats: Formats, seed: int
    ) -> Decision:
        if site.boundary.size < 4 or near_square(site.boundary.size)[0] == 1:
            return Decision(site.name, "kept", f"{site.boundary.size} channels have no two factors")
        fresh = sites_of([site.boundary], [])[0]
        classes, refused = scaler.probe(site.boundary)
        found = self._learn(fresh, rows.rows, formats, classes, refused is None, seed)
        if found.after >= found.before:
            errors = {"error_before": found.before, "error_after": found.after}
            return Decision(site.name, "kept", "no map lowers the error of the quantized outputs", errors)
        return self._put(graph, env, scaler, site, found, "layers")

    def _put(self, graph: Graph, env: Any, scaler: Scaler, site: Site, found: Flat | None, of: str) -> Decision:
        """Write a learned map: the scale into what takes it, two products before the readers, the rest into them."""
        if found is None:
            return Decision(site.name, "kept", f"no map lowers the error of the quantized {of}")
        scaled = bool((found.factors != 1).any()) and isinstance(scaler.fold(site.boundary, found.factors), list)
        inverses = [np.linalg.inv(m).T for m in (found.left, found.right)]
        done = insert_kronecker(graph, env, site.boundary, found.left, found.right, inverses[0], inverses[1], "flat")
        data: dict[str, Any] = {
            "sizes": [len(found.left), len(found.right)], "condition": found.condition, "error_before": found.before,
            "error_after": found.after, "activation_clip": found.clips[0], "weight_clip": found.clips[1],
            "scaled": scaled, "of": of,
        }  # fmt: skip
        if not isinstance(done, list):
            return Decision(site.name, "refused", done.reason, data)
        reason = f"error {found.before:.4g} -> {found.after:.4g}, cond(P) {found.condition:.1f}, two products inserted"
        return Decision(site.name, "transformed", reason, data | {"nodes": done})

    def _learn(
        self, site: Site, x: np.ndarray, formats: Formats, classes: np.ndarray | None, scalable: bool, seed: int
    ) -> Flat:
        import torch

        a, b = near_square(site.boundary.size)
        rng = np.random.default_rng(seed)
        starts = [random_orthogonal(size, rng) for size in (a, b)]
        left, right = (torch.from_numpy(m).float().requires_grad_() for m in starts)
        count = site.boundary.size if classes is None else int(classes.max()) + 1
        log = torch.zeros(count, requires_grad=scalable)
        clips = torch.full((2,), 4.0, requires_grad=self.clip)
        rows = torch.from_numpy(x)
        weight = torch.from_numpy(np.concatenate(site.matrices).astype(np.float32))
        reference = rows @ weight.T
        power = reference.square().mean().clamp(min=1e-12)
        where = torch.arange(count) if classes is None else torch.from_numpy(classes)

        def error(made_x: torch.Tensor, made_w: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
            cut = (None, None) if share is None else (share[0], share[1])
            qx = fake_quantize(made_x, formats.activation, per_row=formats.per_token, clip=cut[0])
            qw = fake_quantize(made_w, formats.weight, per_row=True, clip=cut[1])
            return (qx @ qw.T - reference).square().mean() / power

        before = float(error(rows, weight, None))
        optimizer = torch.optim.Adam([p for p in (left, right, log, clips) if p.requires_grad], lr=self.rate)
        best: tuple[float, list[torch.Tensor]] | None = None
        for step in range(self.steps + 1):
            s = log.exp()[where]
            cube = (rows / s).reshape(-1, a, b)
            made_x = (left.T @ cube @ right).reshape(rows.shape)
            inverse_left, inverse_right = torch.linalg.inv(left), torch.linalg.inv(right)
            made_w = (inverse_left @ (weight * s).reshape(-1, a, b) @ inverse_right.T).reshape(weight.shape)
            loss = error(made_x, made_w, torch.sigmoid(clips) if self.clip else None)
            steep = float(torch.linalg.cond(left.detach()) * torch.linalg.cond(right.detach()))
            if (best is None or loss.item() < best[0]) and steep <= self.condition:
                best = loss.item(), [p.detach().clone() for p in (left, right, log, clips)]
            if step < self.steps:
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        assert best is not None
        found = [p.double().numpy() for p in best[1]]
        shares = 1 / (1 + np.exp(-found[3])) if self.clip else np.ones(2)
        factors = np.exp(found[2])[where.numpy()]
        return Flat(found[0], found[1], factors, (float(shares[0]), float(shares[1])), before, best[0])
