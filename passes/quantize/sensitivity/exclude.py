"""Layers that stay in float for a signal-to-noise ratio at the outputs: those that cost most noise per operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log10

import numpy as np

from ....graph.errors import ConstraintError
from ...allocate import Level, allocate
from ..numerics import QuantParams
from ..placement import Placement, WeightSite
from ..rounding import Rounded, RoundingJob
from .measured import Trial, measure, measure_together

ON = "int"


@dataclass
class Part:
    """Layers that read one activation grid: they stay in float together, since the pair goes only with its last reader.

    Attributes:
        sites: the layers.
        roots: grids that go with them.
        noise: energy of the error that they alone cause at the outputs, over the outputs' energy.
        work: multiply-accumulates, per call of the example inputs.
    """

    sites: list[WeightSite]
    roots: list[str] = field(default_factory=list)
    noise: float = 0.0
    work: int = 0


@dataclass
class Excluded:
    """What stays in float.

    Attributes:
        names: node -> the noise that its part causes when quantized, in dB below the outputs.
        sqnr_db: of the outputs with all of the placement quantized, measured on the samples.
        predicted_db: of the outputs without these nodes; the measured one where there are none.
        share: of the quantized layers' multiply-accumulates that goes back to float.
    """

    names: dict[str, float]
    sqnr_db: float
    predicted_db: float
    share: float

    def reasons(self, wanted_db: float) -> dict[str, str]:
        """Node -> why it stays in float, one sentence."""
        why = f"all in integers the outputs keep {self.sqnr_db:.1f} dB of {wanted_db:g} asked for"
        return {n: f"its noise lies {db:.1f} dB below the outputs; {why}" for n, db in self.names.items()}


def exclude(job: RoundingJob, rounded: Mapping[str, Rounded], sqnr_db: float, *, samples: int = 16) -> Excluded:
    """The layers to leave in float so that the outputs keep ``sqnr_db``, at the least multiply-accumulates.

    First everything is quantized at once and measured on all batches: if that is good enough, nothing stays. Else the
    noise of each point's grid and of each rounded weight is measured alone on the first ``samples`` samples. Noises of
    different layers add up (they are nearly uncorrelated); what they miss of the whole is shared out in proportion.
    Which layers to leave is then an exact knapsack: least work in float among the choices whose noise fits.

    Args:
        job: what was rounded, on which batches. rounded: integers per weight site.

    Raises:
        ConstraintError: what is left when every layer is in float (pairs at no layer) is still too noisy.
        UnsupportedOp: an ONNX operator has no torch implementation.
    """
    from ..bits.mixed import first_samples

    graph, placement = job.graph, job.placement
    trials = _trials(placement, job.params, rounded)
    allowed = 10 ** (-sqnr_db / 10)
    (whole,) = measure_together(graph, trials, [dict.fromkeys((t.name for t in trials), ON)], job.batches)
    if whole <= allowed:
        return Excluded({}, _db(whole), _db(whole), 0.0)
    alone = measure(graph, trials, first_samples(graph, job.batches, samples), "sqnr", job.progress)
    parts, fixed = _parts(placement, {name: found[ON] for name, found in alone.items()})
    total = sum(p.noise for p in parts) + fixed
    scale = whole / total if total else 0.0
    if fixed * scale > allowed:
        raise ConstraintError(
            "the outputs cannot keep this signal-to-noise ratio by leaving layers in float",
            node="sqnr", expected=f"at most {_db(fixed * scale):.1f} dB", found=f"{sqnr_db:g} dB",
        )  # fmt: skip
    items = {str(i): [Level(0.0, 0.0), Level(p.noise * scale, float(p.work))] for i, p in enumerate(parts)}
    chosen = allocate(items, saving=whole - allowed, method="milp").levels
    gone = [p for i, p in enumerate(parts) if chosen[str(i)]]
    names = {s.node.name: _db(p.noise * scale) for p in gone for s in p.sites}
    left = whole - scale * sum(p.noise for p in gone)
    work = sum(p.work for p in parts)
    return Excluded(names, _db(whole), _db(left), sum(p.work for p in gone) / max(work, 1))


def _trials(placement: Placement, params: Mapping[str, QuantParams], rounded: Mapping[str, Rounded]) -> list[Trial]:
    """Every point on its grid (named ``x:`` and its value), every site's weight as its integers stand for it."""
    found = []
    for name, point in placement.points.items():

        def on_grid(_: str, x: np.ndarray, grid: QuantParams = params[name]) -> np.ndarray:
            return grid.apply(x)

        found.append(Trial(f"x:{name}", point.value, (ON,), on_grid))
    for site in placement.weights:
        value, made = site.weight.value, rounded[site.node.name]
        assert value is not None

        def stored(_: str, w: np.ndarray, made: Rounded = made) -> np.ndarray:
            return made.params.dequantize(made.integers).astype(w.dtype, copy=False)

        found.append(Trial(f"w:{site.node.name}", value, (ON,), stored))
    return found


def _parts(placement: Placement, noise: Mapping[str, float]) -> tuple[list[Part], float]:
    """Layers by the grid that they read, with the noise that goes when they do; and the noise that no layer takes."""
    of_root: dict[str, Part] = {}
    makers: dict[str, Part] = {}
    for site in placement.weights:
        point = placement.points.get(site.x.name)
        part = of_root.setdefault(site.node.name if point is None else point.root, Part([]))
        part.sites.append(site)
        part.noise += noise[f"w:{site.node.name}"]
        part.work += _work(site)
        makers[site.node.name] = part
    fixed = 0.0
    for name, point in placement.points.items():
        maker = point.value.producer
        part_ = of_root.get(point.root) or (makers.get(maker.name) if maker is not None else None)
        if part_ is None:
            fixed += noise[f"x:{name}"]
        else:
            part_.noise += noise[f"x:{name}"]
            part_.roots.append(name)
    return list(of_root.values()), fixed


def _work(site: WeightSite) -> int:
    """Multiply-accumulates of a layer; where a size is unknown, those of one row."""
    from ....graph.ops.macs import macs

    found = macs(site.node)
    return site.weight.size if found is None else found


def _db(noise: float) -> float:
    return -10 * log10(max(noise, 1e-30))
