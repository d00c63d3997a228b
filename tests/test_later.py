"""A fold of an ONNX file imports neither sympy nor torch; symbolic sizes are computed when they are met, by sympy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def _run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _save(path: Path, size: int | str) -> None:
    stored = [numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")]
    stored += [numpy_helper.from_array(np.full(4, 2.0, np.float32), n) for n in ("g", "b", "m", "v")]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"], "norm"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, k, size, 8]) for n, k in (("x", 3), ("y", 4))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)


def test_a_fold_of_a_file_imports_neither_sympy_nor_torch(tmp_path: Path) -> None:
    _save(tmp_path / "m.onnx", "height")
    code = """
import sys
from foldline import cli
try:
    cli.main(["run", "fold", sys.argv[1], "-o", sys.argv[2], "-q", "--no-verify"])
except SystemExit as done:
    assert not done.code, done.code
print(sorted({"mpmath", "torch", "scipy", "onnxruntime"} & set(sys.modules)))
"""
    assert _run(code, str(tmp_path / "m.onnx"), str(tmp_path / "out")).splitlines()[-1] == "[]"
    (written,) = (tmp_path / "out").glob("*.onnx")
    assert [n.op_type for n in onnx.load(written).graph.node] == ["Conv"]


def test_symbolic_sizes_are_computed_when_they_are_met(tmp_path: Path) -> None:
    _save(tmp_path / "m.onnx", "2*half")
    code = """
import sys
import foldline as fl
graph = fl.load(sys.argv[1])
import onnx_ir as ir, sympy.core.symbol, sympy
print(ir.SymbolicDim("2*n + 1").evaluate({"n": 3}), sympy.Symbol("x") + 1, type(sympy.core).__name__)
"""
    assert _run(code, str(tmp_path / "m.onnx")).split("\n")[0] == "7 x + 1 module"


def test_sympy_that_is_there_already_stays_as_it_is() -> None:
    code = """
import sympy
before = sympy.Symbol
import foldline.graph.onnx, sys
assert sys.modules["sympy"] is sympy and sympy.Symbol is before
assert not any("later" in str(finder) for finder in sys.meta_path)
"""
    _run(code)


def test_two_threads_may_meet_the_first_symbol(tmp_path: Path) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
import foldline.graph.onnx
import onnx_ir as ir
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda n: ir.SymbolicDim(f"3*n{n}").evaluate({f"n{n}": n}), range(4)))
print(found)
"""
    assert _run(code).strip() == "[0, 3, 6, 9]"
