"""Quantize's own cost: placement and the whole pass on chains of residual blocks, from ONNX and from torch.

    OMP_NUM_THREADS=1 python benchmarks/quantize_overhead.py [--nodes 500 2000] [--front onnx fx] [--out FILE]

Processor seconds of one thread (``time.process_time``). "place" is the solver alone; "quantize" the whole pass with one
calibration image of 8 x 8, so that its time is edits of the graph and not arithmetic; "weights" the peak of memory that
Python allocates while a model of one large layer is quantized, over the size of its weight.
"""

from __future__ import annotations

import argparse
import platform
import time
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import torch
from foldline.backends import get
from foldline.graph.fx import load_torch
from foldline.graph.ir import Graph
from foldline.graph.onnx import load_onnx
from foldline.passes.base import Context
from foldline.passes.quantize import Quantize
from foldline.passes.quantize.placement import place
from onnx import TensorProto, helper, numpy_helper
from torch import nn


class Block(nn.Module):
    """Two convolutions and a skip: five nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + x)


def as_onnx(net: nn.Sequential) -> onnx.ModelProto:
    """The chain written node by node (the exporter would take minutes)."""
    nodes, stored = [], []

    def conv(x: str, y: str, layer: nn.Conv2d) -> None:
        for part in ("weight", "bias"):
            stored.append(numpy_helper.from_array(getattr(layer, part).detach().numpy(), f"{y}.{part}"))
        pads = [layer.padding[0]] * 4
        nodes.append(helper.make_node("Conv", [x, f"{y}.weight", f"{y}.bias"], [y], name=y, pads=pads))

    conv("x", "h0", net[0])
    for k, block in enumerate(list(net)[1:]):
        conv(f"h{k}", f"a{k}", block.a)
        nodes.append(helper.make_node("Relu", [f"a{k}"], [f"r{k}"]))
        conv(f"r{k}", f"b{k}", block.b)
        nodes.append(helper.make_node("Add", [f"b{k}", f"h{k}"], [f"s{k}"]))
        nodes.append(helper.make_node("Relu", [f"s{k}"], [f"h{k + 1}"]))
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
    outs = [helper.make_tensor_value_info(f"h{len(net) - 1}", TensorProto.FLOAT, [1, 8, 8, 8])]
    graph = helper.make_graph(nodes, "chain", ends, outs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def timed(front: str, nodes: int) -> tuple[int, float, float]:
    """(nodes, seconds to place, seconds of the pass)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *(Block() for _ in range(nodes // 5))).eval()
    x = torch.randn(1, 3, 8, 8)
    graph: Graph = load_torch(net, x) if front == "fx" else load_onnx(as_onnx(net))
    spec = get("onnxruntime-cpu").spec
    assert spec is not None
    count = len(graph.nodes)
    start = time.process_time()
    place(graph, spec, set())
    placed = time.process_time()
    Quantize().apply(graph, Context(calibration=[x.numpy()], backends=get))
    return count, placed - start, time.process_time() - placed


def memory(width: int = 4096) -> float:
    """Peak of allocations over the weight's bytes, for one linear layer of ``width`` squared."""
    w = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[1, {width}] x) => (float[1, {width}] y) {{ y = MatMul(x, w) }}"""
    )
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    graph = load_onnx(model)
    batch = np.ones((1, width), np.float32)
    tracemalloc.start()
    Quantize().apply(graph, Context(calibration=[batch], backends=get))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / w.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--front", nargs="+", choices=["onnx", "fx"], default=["onnx", "fx"])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    lines = ["| front end | nodes | place s | quantize s |", "|---|---|---|---|"]
    for front in chosen.front:
        for nodes in chosen.nodes:
            count, placed, whole = timed(front, nodes)
            lines.append(f"| {front} | {count} | {placed:.3f} | {whole:.1f} |")
    lines += ["", f"Peak allocations for one 64 MB weight: {memory():.2f} times the weight."]
    lines.append(f"python {platform.python_version()}, torch {torch.__version__}, onnx {onnx.__version__}")
    text = "\n".join(lines)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
