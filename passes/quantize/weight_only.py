"""The pass: weights of a few bits, computed with in float; for language models, where memory traffic is the cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...graph.errors import ConfigError, ConstraintError
from ...graph.ir import Graph, Node
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..calibrate import Gram, collect
from .formats import compensated, format_of
from .formats.protocol import Encoded
from .numerics import sqnr_db
from .weight_sites import WeightSite, find_sites, retie
from .weight_writer import Storage, WeightWriter

DEFAULT_BLOCKS = {"int": 32, "nf4": 64, "bcq": 64, "power": 0, "kmeans": 0}
BITS = {"int", "power", "bcq", "kmeans"}
"""Formats whose number of bits is a choice."""


class WeightOnly(Pass):
    """Quantize stored weights, activations stay float.

    Each weight W becomes codes with scales; the graph computes ``decode(codes)`` exactly (or multiplies with the codes
    in a kernel that does). ``method="rtn"`` takes the nearest code for each number; ``method="gptq"`` lets later
    columns take up the output error of earlier ones ("GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers"), for every format. Biases and norms stay as they are.
    """

    name: ClassVar[str] = "weight_only"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"weight_only"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float"})

    format: str = "int"
    """How codes become numbers: int, nf4, mxfp4, nvfp4, fp8, fp8_e5m2, int16, power, bcq, kmeans."""
    bits: int = Field(default=4, ge=1, le=12)
    """Bits of a code, for the formats that have a choice."""
    block: int | None = Field(default=None, ge=0)
    """Input channels that share a scale; 0: all of an output channel; None: what is usual for the format."""
    symmetric: bool = False
    """Integers without zero points."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the format: ``search``, ``gain``, ``scale``, ``powers``, ``step``, ``scaled``,
    ``exponent``."""
    method: Literal["rtn", "weighted", "gptq"] = "rtn"
    """Nearest codes; the same with ranges (``search``) chosen by the outputs of each block and codebooks for what the
    inputs weigh (format power: one exponent for the model, by its outputs); or GPTQ."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs, for every method but rtn; the run's own when absent."""
    damping: float = Field(default=0.01, gt=0)
    """Share of the mean squared input that is added to every input's, for gptq."""
    embeddings: bool = False
    """Quantize embedding tables too; a matrix tied to one is stored once with it."""
    embedding_options: dict[str, Any] = Field(default_factory=lambda: {"format": "int", "bits": 8, "block": 0})
    """Format of embedding tables (``format`` and its options), also of matrices tied to one."""
    convolutions: bool = False
    """Quantize kernels of convolutions too."""
    storage: Storage = "auto"
    """matmul_nbits (ONNX Runtime's MatMulNBits; a torch operator of the same meaning), dequantize (a stored type behind
    DequantizeLinear), packed (codes as bytes, unpacked by table lookups); auto: the first where it can, else packed."""
    formats: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Per weight, by a pattern of its name or module path: other ``format``, ``bits``, ``block`` or options."""
    ignore: tuple[str, ...] = ()
    """Nodes, module paths or weights that stay in float; ``*`` and ``?`` are wildcards."""

    def requirement(self) -> Needs:
        return Needs.NOTHING if self.method == "rtn" else Needs.CALIBRATION

    def prepare(self, ctx: Context) -> None:
        """The formats exist and take these options."""
        self._format({})
        for chosen in (*self.formats.values(), self.embedding_options if self.embeddings else {}):
            self._format(chosen)

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Encode and write.

        Raises:
            ConstraintError: there is no weight to quantize, or a pattern matches none.
        """
        ignored = {n.name for n in graph.nodes if any(matches(n, pattern) for pattern in self.ignore)}
        for pattern in (*self.ignore, *self.formats):
            if not any(matches(n, pattern) for n in graph.nodes):
                raise ConstraintError("a pattern matches nothing", value=pattern, hint="`foldline inspect MODEL`")
        tied = retie(graph) if self.embeddings else []
        sites, decisions = find_sites(
            graph, ignored, inserted=ctx.float_nodes, embeddings=self.embeddings, convolutions=self.convolutions
        )
        if not sites:
            raise ConstraintError(
                "there is no weight to quantize", node=graph.name, expected="a linear layer with a stored weight",
                found="; ".join(sorted({d.reason for d in decisions})[:3]) or "none",
            )  # fmt: skip
        decisions = [*tied, *decisions]
        grams = self._grams(graph, ctx, sites)
        tuning: dict[str, Any] = {}
        if self.format == "power" and self.method == "weighted" and "exponent" not in self.options:
            from .power_search import model_exponent

            exponent, errors = model_exponent(graph, sites, self._format({}), self.batches(ctx))
            tuning |= {"exponent": exponent, "exponents": errors}
        encode = self.encoder({k: v for k, v in tuning.items() if k == "exponent"})
        encoded: dict[str, Encoded] = {}
        for site in ctx.progress(sites, "quantizing weights"):
            encoded[site.name] = encode(site, site.weight.numpy().astype(np.float32), grams.get(site.name))
        encoded, facts_of_tuning = self.tuned(graph, ctx, sites, encoded)
        tuning |= facts_of_tuning
        writer = WeightWriter(graph, self.storage)
        layers: dict[str, dict[str, Any]] = {}
        before = after = 0
        for site in sites:
            float_bytes = site.weight.size * np.dtype(_numpy(site.weight.dtype)).itemsize
            stored = writer.emitter.bytes
            facts = self._facts(site, encoded[site.name], grams.get(site.name))
            form, why = writer.write(site, encoded[site.name])
            facts |= {"form": form, "bytes": writer.emitter.bytes - stored, "float_bytes": float_bytes}
            before, after = before + float_bytes, after + facts["bytes"]
            layers[site.name] = facts
            reason = (
                f"{facts['format']}, {facts['bits_per_weight']:.2f} bits a weight, {facts['weight_sqnr_db']:.1f} dB"
            )
            decisions.append(Decision(site.subject, "quantized", f"{reason}{'; ' + why if why else ''}", facts))
        graph.refresh()
        details = {
            "method": self.method,
            "weights": len(sites),
            "bytes": after,
            "float_bytes": before,
            "layers": layers,
        }
        details |= tuning
        return Outcome(decisions=decisions, details=details)

    def tuned(
        self, graph: Graph, ctx: Context, sites: Sequence[WeightSite], encoded: dict[str, Encoded]
    ) -> tuple[dict[str, Encoded], dict[str, Any]]:
        """The encoded weights as they are to be written, and facts for the report."""
        return encoded, {}

    def encoder(self, extra: dict[str, Any]) -> Callable[[WeightSite, np.ndarray, np.ndarray | None], Encoded]:
        """Site, weight and Gram matrix of its inputs (or None) -> the encoded weight; ``extra``: further options."""

        def encode(site: WeightSite, weight: np.ndarray, gram: np.ndarray | None) -> Encoded:
            chosen = dict(self.embedding_options) if site.tables else dict(extra)
            for pattern, other in self.formats.items():
                if any(matches(n, pattern) for n in (*site.matrices, *site.tables)):
                    chosen |= other
            fmt = self._format(chosen)
            if gram is None:
                return fmt.fit(weight, site.axis)
            if self.method == "weighted":
                whole = getattr(fmt, "takes_gram", False)
                return fmt.fit(weight, site.axis, gram if whole else np.einsum("ii->i", gram))
            return compensated(fmt, weight, site.axis, gram, damping=self.damping)  # type: ignore[no-any-return]

        return encode

    def _format(self, chosen: dict[str, Any]) -> Any:
        """The format of one weight: the pass's own options, where ``chosen`` says nothing else."""
        name = chosen.get("format", self.format)
        same = name == self.format
        options = dict(self.options) if same else {}
        block = chosen.get("block", self.block if same else None)
        if name in BITS:
            options["bits"] = chosen.get("bits", self.bits)
        if name not in ("mxfp4", "nvfp4"):
            options["block"] = DEFAULT_BLOCKS.get(name, 0) if block is None else block
        elif block not in (None, 16 if name == "nvfp4" else 32):
            raise ConfigError(
                "the format has blocks of its own", node="block", expected=f"none for {name}", found=block
            )
        if name == "int":
            options["symmetric"] = chosen.get("symmetric", self.symmetric)
        options |= {k: v for k, v in chosen.items() if k not in ("format", "bits", "block", "symmetric")}
        return format_of(name, **options)

    def _grams(self, graph: Graph, ctx: Context, sites: list[WeightSite]) -> dict[str, np.ndarray]:
        """X^T X of what each weight multiplies, by weight; none for tables, kernels and method rtn."""
        if self.method == "rtn":
            return {}
        wanted = {s.input.name: Gram() for s in sites if s.input is not None and not s.tables}
        if not wanted:
            return {}
        collect(graph, self.batches(ctx), wanted, progress=ctx.progress)
        found = {}
        for site in sites:
            if site.input is not None and site.input.name in wanted:
                matrix = wanted[site.input.name].matrix
                assert matrix is not None
                found[site.name] = matrix
        return found

    def _facts(self, site: WeightSite, encoded: Encoded, gram: np.ndarray | None) -> dict[str, Any]:
        weight, decoded = site.weight.numpy().astype(np.float32), encoded.decode()
        facts: dict[str, Any] = {
            "weight": site.name,
            "format": type(encoded).__name__.removesuffix("Encoded").lower(),
            "bits_per_weight": 8 * encoded.nbytes / weight.size,
            "weight_sqnr_db": sqnr_db(weight, decoded),
        }
        if gram is not None:
            layout = encoded.layout
            off, whole = layout.matrix(weight - decoded).astype(np.float64), layout.matrix(weight).astype(np.float64)
            noise, power = (float(np.einsum("rk,kl,rl->", m, gram, m, optimize=True)) for m in (off, whole))
            facts["output_sqnr_db"] = float("inf") if noise <= 0 else 10 * float(np.log10(max(power, 1e-300) / noise))
        return facts


def matches(node: Node, pattern: str) -> bool:
    """Whether a pattern names a node, its module path (or one around it) or one of its weights."""
    names = [node.name, node.scope]
    for value in node.inputs:
        if value is not None and value.weight is not None:
            names += [value.weight.name, *value.weight.aliases]
    return any(fnmatchcase(name, p) for name in names if name for p in (pattern, f"{pattern}.*"))


def _numpy(dtype: str) -> str:
    return "float16" if dtype == "bfloat16" else dtype
