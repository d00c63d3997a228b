"""Time of the rewrite engine by the length of a chain, beside other ONNX optimizers; memory on a large model.

    OMP_NUM_THREADS=1 python benchmarks/rewrite_speed.py [--nodes 1000 5000 20000] [--peers]

The chain alternates Identity and Add of one shared vector. Per length, in CPU seconds of this process: ``load`` (proto
to graph, shapes included), ``clean`` and ``fold`` (the pass on the graph), ``proto`` (graph to proto), and the whole
call ``P.clean(model, verify=False)`` (load, clone, cost, pass, write). The peers are timed on the same proto, their
call as a whole. ``growth`` is the time of the longest chain over what a linear cost would give from the shortest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import foldline as fl
import foldline.passes as P
import numpy as np
import onnx
from foldline.passes.base import Context
from onnx import TensorProto, helper, numpy_helper


def chain(length: int) -> onnx.ModelProto:
    """Identities and additions of one shared vector, one after the other."""
    nodes, value = [], "x"
    for i in range(length // 2):
        nodes.append(helper.make_node("Identity", [value], [f"i{i}"], f"id{i}"))
        nodes.append(helper.make_node("Add", [f"i{i}", "w"], [f"a{i}"], f"add{i}"))
        value = f"a{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 8]) for n in ("x", value)]
    stored = [numpy_helper.from_array(np.full(8, 0.01, np.float32), "w")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], stored)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds, result)."""
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def ours(model: onnx.ModelProto) -> dict[str, float]:
    """Seconds of each stage."""
    found: dict[str, float] = {}
    found["load"], graph = timed(lambda: fl.load(model))
    for step in (P.Clean(), P.Fold()):
        twin = graph.clone()
        found[step.name], _ = timed(lambda step=step, twin=twin: step.apply(twin, Context()))
    found["proto"], _ = timed(twin.to_model)
    found["whole call"], _ = timed(lambda: P.clean(model, verify=False))
    return found


def peers() -> dict[str, Callable[[onnx.ModelProto], Any]]:
    """The other optimizers that are installed, by name and version."""
    import onnx_ir
    import onnxoptimizer
    import onnxscript.optimizer
    import onnxsim
    import onnxslim

    return {
        f"onnxslim {version('onnxslim')}": onnxslim.slim,
        f"onnxsim {version('onnxsim')}": onnxsim.simplify,
        f"onnxoptimizer {version('onnxoptimizer')}": onnxoptimizer.optimize_fixed,
        f"onnxscript {version('onnxscript')}": lambda m: onnxscript.optimizer.optimize_ir(
            onnx_ir.serde.deserialize_model(m)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 5000, 20000])
    parser.add_argument("--peers", action="store_true", help="time the other optimizers too (minutes at 20,000 nodes)")
    args = parser.parse_args()
    print(f"foldline {fl.__version__}, onnx {version('onnx')}, onnx-ir {version('onnx-ir')}; CPU seconds\n")
    rows: dict[str, list[float]] = {}
    ours(chain(200))  # imports and caches are paid here
    for length in args.nodes:
        model = chain(length)
        for stage, seconds in ours(model).items():
            rows.setdefault(stage, []).append(seconds)
        for name, call in peers().items() if args.peers else ():
            rows.setdefault(name, []).append(timed(lambda call=call, model=model: call(model))[0])
    print("| " + " | ".join(["", *(f"{n:,} nodes" for n in args.nodes), "growth"]) + " |")
    print("|" + "---|" * (len(args.nodes) + 2))
    factor = args.nodes[-1] / args.nodes[0]
    for name, seconds_of in rows.items():
        cells = [f"{s:.2f}" for s in seconds_of]
        print(f"| {name} | {' | '.join(cells)} | {seconds_of[-1] / max(seconds_of[0], 1e-3) / factor:.1f} |")


if __name__ == "__main__":
    main()
