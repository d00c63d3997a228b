"""Perplexity of small language models under weight-only quantization and with 4-bit activations, method by method.

    python benchmarks/language_models.py train                 # once: two checkpoints into .bench/lm
    python benchmarks/quantize_language_models.py              # the tables
    python benchmarks/quantize_language_models.py --part weights --shapes gpt2 --bits 3 2

The models are those of language_models.py: 4 layers of width 256, trained by that benchmark on the Python standard
library's source. Matrices of the blocks and the output matrix are quantized; embeddings stay in float (GPT-2's output
matrix is tied to its embedding, so it stays too). Weight-only tables: integers with zero points in blocks of
``--block`` input channels (0: one scale per output channel), scales in float16, counted as stored. W4A4: weights per
output channel, activations per token, asymmetric, ranges found at run time (simulated in torch); the output matrix
keeps float inputs, and so do the two small products of a map at run time. Behind every perplexity: the difference to
RTN's of the same bits, as the mean over the held-out sequences of the difference in natural logarithm per token, in
hundredths, and its standard error (paired: the same sequences).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import foldline as fl
from foldline import passes as P
from language_models_data import SHAPES, Text, sequence_losses, text, trained


@dataclass
class Row:
    """A line of a table: its name, the passes for a number of bits, the bits it is for, what to expect of it."""

    name: str
    steps: Callable[[int, int], list[Any]]
    bits: tuple[int, ...] = (4, 3, 2)


def integers(bits: int, block: int, method: str = "rtn", **options: Any) -> Any:
    options = {"scale": "float16", **options}
    return P.WeightOnly(bits=bits, block=block, method=method, options=options)


def weight_rows() -> list[Row]:
    def awq(b: int, g: int, **more: Any) -> Any:
        return P.AwqScale(bits=b, block=g, **more)

    searched = {"search": True, "gain": True}
    return [
        Row("RTN", lambda b, g: [integers(b, g)]),
        Row("RTN, ranges by weight error", lambda b, g: [integers(b, g, search=True)]),
        Row("RTN, ranges by weight error, gain kept", lambda b, g: [integers(b, g, **searched)]),
        Row("RTN, ranges by output error, gain kept", lambda b, g: [integers(b, g, "weighted", **searched)]),
        Row("AWQ, scales", lambda b, g: [awq(b, g), integers(b, g)]),
        Row("AWQ, scales and cuts", lambda b, g: [awq(b, g, clip=True, clip_gain=False), integers(b, g)]),
        Row("AWQ, scales and cuts, gain kept", lambda b, g: [awq(b, g, clip=True), integers(b, g)]),
        Row("GPTQ", lambda b, g: [integers(b, g, "gptq")]),
        Row("GPTQ, ranges searched, gain kept", lambda b, g: [integers(b, g, "gptq", **searched)]),
        Row("AWQ + GPTQ", lambda b, g: [awq(b, g), integers(b, g, "gptq")]),
        Row("SmoothQuant", lambda b, g: [P.Smooth(weight_bits=b), integers(b, g)]),
        Row("rotation", lambda b, g: [P.Rotate(), integers(b, g)]),
        Row("rotation + GPTQ", lambda b, g: [P.Rotate(), integers(b, g, "gptq")]),
        Row("learned rotation and scales, layer error", lambda b, g: [learned(b, g, "layers"), integers(b, g)]),
        Row("learned rotation and scales, KL-Top (OSTQuant)", lambda b, g: [learned(b, g), integers(b, g)]),
        Row("FlatQuant-like, layer error", lambda b, g: [flat(b, g, "layers"), integers(b, g)]),
        Row("FlatQuant-like, block error", lambda b, g: [flat(b, g), integers(b, g)]),
        Row("binary-coded, weight error", lambda b, g: [P.WeightOnly(format="bcq", bits=b, block=g)]),
        Row("binary-coded, output error", lambda b, g: [P.WeightOnly(format="bcq", bits=b, block=g, method="gptq")]),
        Row("codebook (k-means)", lambda b, g: [P.WeightOnly(format="kmeans", bits=b, method="weighted")]),
        Row("codebook (k-means) + GPTQ", lambda b, g: [P.WeightOnly(format="kmeans", bits=b, method="gptq")]),
        Row("power exponent + GPTQ", lambda b, g: [P.WeightOnly(format="power", bits=b, block=g, method="gptq")]),
        Row("NF4, blocks of 64", lambda b, g: [P.WeightOnly(format="nf4", options={"scale": "float16"})], (4,)),
        Row("MXFP4", lambda b, g: [P.WeightOnly(format="mxfp4")], (4,)),
        Row("NVFP4", lambda b, g: [P.WeightOnly(format="nvfp4")], (4,)),
    ]


def activation_rows() -> list[Row]:
    def per_channel(method: str = "rtn") -> Any:
        return P.WeightOnly(bits=4, block=0, symmetric=True, method=method)

    return [
        Row("RTN", lambda b, g: [per_channel()], (4,)),
        Row("GPTQ", lambda b, g: [per_channel("gptq")], (4,)),
        Row("SmoothQuant", lambda b, g: [P.Smooth(weight_bits=4, activation_bits=4), per_channel()], (4,)),
        Row("rotation, merged alone", lambda b, g: [P.Rotate(), per_channel()], (4,)),
        Row("rotation (QuaRot)", lambda b, g: [P.Rotate(online=ONLINE), per_channel()], (4,)),
        Row("rotation + GPTQ", lambda b, g: [P.Rotate(online=ONLINE), per_channel("gptq")], (4,)),
        Row("learned rotation and scales, layer error", lambda b, g: [learned(4, 0, "layers", 4), per_channel()], (4,)),
        Row(
            "learned rotation and scales, KL-Top (OSTQuant)",
            lambda b, g: [learned(4, 0, "outputs", 4), per_channel()],
            (4,),
        ),
        Row("the same + GPTQ", lambda b, g: [learned(4, 0, "outputs", 4), per_channel("gptq")], (4,)),
        Row("FlatQuant-like, layer error", lambda b, g: [flat(4, 0, "layers", 4), per_channel()], (4,)),
        Row("FlatQuant-like, block error", lambda b, g: [flat(4, 0, "blocks", 4), per_channel()], (4,)),
        Row("the same + GPTQ", lambda b, g: [flat(4, 0, "blocks", 4), per_channel("gptq")], (4,)),
    ]


def simulated(bits: int, block: int, activation_bits: int) -> dict[str, Any]:
    """What learning simulates: the rounding that follows."""
    return {
        "weight_bits": bits, "activation_bits": activation_bits, "block": block, "symmetric": activation_bits < 16,
        "per_token": True, "clip": False,
    }  # fmt: skip


def learned(bits: int, block: int, objective: Any = "outputs", activation_bits: int = 16) -> Any:
    options = simulated(bits, block, activation_bits) | {"online": ONLINE if activation_bits < 16 else []}
    if objective == "outputs":
        options |= {"float_inputs": ["*lm_head"], "steps": learning["steps"]}
    return P.Rotate(method="learned", objective=objective, **options)


def flat(bits: int, block: int, objective: Any = "blocks", activation_bits: int = 16) -> Any:
    """Maps before every layer that is quantized on both sides; the output matrix has none where activations are."""
    options = simulated(bits, block, activation_bits)
    if objective == "blocks":
        options |= {"steps": learning["steps"]}
    return P.FlatTransform(objective=objective, ignore=["*lm_head"] if activation_bits < 16 else [], **options)


ONLINE = ["*down_proj", "*mlp.c_proj"]
"""Layers whose input is rotated at run time with 4-bit activations, as QuaRot does: no merged rotation reaches it."""

learning = {"steps": 100}
"""Steps of learning through blocks or the whole network (``--steps``)."""


# ---- one cell -----------------------------------------------------------------------------------------------------
def calibration(corpus: Text, count: int) -> list[torch.Tensor]:
    return list(corpus.train_sequences(count, 3)[:, :-1].split(8))


def quantized(model: nn.Module, steps: list[Any], batches: list[torch.Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """The model after the passes, and what the last one reports."""
    result = fl.Pipeline(steps).run(model, (batches[0][:2],), calibration=batches, verify=False)
    return result.model, result.report.passes[-1].details


LINEAR = ("aten.linear.default", "aten.addmm.default", "aten.matmul.default", "foldline.matmul_nbits.default")


def per_token(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of the last axis on 2**bits levels between their own extremes (zero among them)."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def _small(name: str) -> bool:
    """Whether a product is one of the two of a map at run time: these come before the rounding."""
    return "_flat_" in name or "_rotation_" in name


def with_quantized_inputs(module: nn.Module, bits: int, keep: str) -> nn.Module:
    """Quantize what every matrix product with a stored weight reads (a traced module), but the one called ``keep``."""
    graph: Any = module.graph
    stored: set[Any] = set()
    for node in graph.nodes:  # values computed from weights alone
        if node.op == "get_attr" or (node.op == "call_function" and node.all_input_nodes and
                                     all(n in stored for n in node.all_input_nodes)):  # fmt: skip
            stored.add(node)
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) not in LINEAR or _small(node.name):
            continue
        at = 1 if str(node.target) == LINEAR[1] else 0
        weight = node.args[2] if at else node.args[1]
        if weight not in stored or node.args[at] in stored or keep in str(node.meta.get("nn_module_stack", "")):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(per_token, (node.args[at], bits))
        node.update_arg(at, made)
        count += 1
    module.recompile()
    if not count:
        raise ValueError("no product was found")
    return module


def cell(
    model: nn.Module, row: Row, bits: int, args: argparse.Namespace, corpus: Text, activations: bool
) -> dict[str, Any]:
    """Perplexity, bytes of the quantized weights and seconds; or why there is none."""
    begun = time.process_time()
    try:
        low, details = quantized(model, row.steps(bits, args.block), calibration(corpus, args.calibration))
        seconds = time.process_time() - begun
        if activations:
            low = with_quantized_inputs(low, 4, "lm_head")
        losses = sequence_losses(low, corpus.held_out_sequences(args.held_out))
    except fl.FoldlineError as error:
        return {"row": row.name, "bits": bits, "failed": " ".join(str(error).split())[:80].replace("|", "/")}
    facts = {"row": row.name, "bits": bits, "losses": losses.tolist(), "perplexity": math.exp(losses.mean())}
    facts |= {"bytes": details["bytes"], "seconds": seconds}
    return facts | {"bits_per_weight": 32 * details["bytes"] / details["float_bytes"]}


def against(one: dict[str, Any], first: dict[str, Any] | None) -> str:
    """Mean difference to RTN in log perplexity, in hundredths, and its standard error over the sequences."""
    if first is None or first is one:
        return ""
    off = 100 * (torch.tensor(one["losses"]) - torch.tensor(first["losses"]))
    return f" [{float(off.mean()):+.2f} ± {float(off.std() / len(off) ** 0.5):.2f}]"


def table(
    shape: str, rows: list[Row], args: argparse.Namespace, corpus: Text, activations: bool
) -> list[dict[str, Any]]:
    model, facts = trained(shape, args.cache, args.kv_heads)
    start = math.exp(sequence_losses(model, corpus.held_out_sequences(args.held_out)).mean())
    of = f"blocks of {args.block}" if args.block else "one scale per output channel"
    title = "W4A4" if activations else f"weights only, {of}"
    print(f"\n**{shape}, {title}**: perplexity {start:.2f} in float32 ({facts['steps']} steps of {facts['batch']})\n")
    columns = [4] if activations else args.bits
    print("| method | " + " | ".join(f"{b} bits" for b in columns) + " |\n|---|" + "---|" * len(columns), flush=True)
    found: list[dict[str, Any]] = []
    for row in rows:
        if args.methods and row.name != "RTN" and not any(m.lower() in row.name.lower() for m in args.methods):
            continue
        cells = []
        for bits in columns:
            if bits not in row.bits:
                cells.append("")
                continue
            one = cell(model, row, bits, args, corpus, activations) | {"shape": shape, "activations": activations}
            found.append(one)
            if "failed" in one:
                cells.append(f"not run: {one['failed']}")
            else:
                first = next((f for f in found if f["row"] == "RTN" and f["bits"] == bits and "losses" in f), None)
                about = f"{one['bits_per_weight']:.2f} b, {one['seconds']:.0f} s"
                cells.append(f"{one['perplexity']:.2f}{against(one, first)} ({about})")
        print(f"| {row.name} | " + " | ".join(cells) + " |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(__file__).resolve().parents[1] / ".bench" / "lm")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--part", nargs="+", default=["weights", "w4a4"], choices=["weights", "w4a4"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--methods", nargs="+", help="only rows whose name holds one of these")
    parser.add_argument("--calibration", type=int, default=64, help="training sequences of 128 tokens")
    parser.add_argument("--held-out", type=int, default=128, help="held-out sequences of 128 tokens")
    parser.add_argument("--steps", type=int, default=100, help="of learning through blocks or the whole network")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    learning["steps"] = args.steps
    warnings.simplefilter("ignore")
    corpus = text(args.cache)
    print("; ".join(f"{n} {version(n)}" for n in ("torch", "transformers")), f"; {corpus.about}; cell: perplexity")
    print("[difference to RTN, 100 x log perplexity, ± standard error] (bits per weight as stored, process seconds)")
    found = []
    for shape in args.shapes:
        if "weights" in args.part:
            found += table(shape, weight_rows(), args, corpus, False)
        if "w4a4" in args.part:
            found += table(shape, activation_rows(), args, corpus, True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
