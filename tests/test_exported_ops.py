"""Operators that exported files hold in place of a module's own: pruned from the file alone, equal to masking."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from foldline import passes as P
from foldline.graph.groups import axis_groups
from foldline.graph.onnx import load_onnx
from support.onnx_models import parsed, rand


def pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Half of every axis goes; the pass itself compares sliced with masked."""
    result = P.prune(model, ratio=0.5, verify=True)
    details = result.report.passes[0].details
    assert details["identity"]["checked"] and details["identity"]["relative_error"] <= 1e-5
    return result.model


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


def test_channels_pass_a_gather_nd_over_positions() -> None:
    """Adaptive pooling to a size that does not divide is exported as GatherND over positions, channels last."""
    text = """<ir_version: 9, opset_import: ["": 18]>
    net (float[2,3,6,6] x) => (float[2,5,3,3] y) {
      h = Conv <pads = [1,1,1,1]> (x, w)
      t = Transpose <perm = [2,3,0,1]> (h)
      g = GatherND (t, where)
      c = Transpose <perm = [2,3,0,1]> (g)
      y = Conv <pads = [1,1,1,1]> (c, v)
    }"""
    rows, columns = np.meshgrid([0, 2, 5], [1, 1, 4], indexing="ij")
    where = np.stack([rows, columns], -1).astype(np.int64)
    after = sizes(pruned(parsed(text, w=rand(8, 3, 3, 3), v=rand(5, 8, 3, 3), where=where)))
    assert after["w"] == (4, 3, 3, 3) and after["v"] == (5, 4, 3, 3) and after["where"] == where.shape


@pytest.mark.parametrize("batch", [0, 1])
def test_what_a_gather_nd_indexes_stays_whole_and_what_it_passes_on_is_pruned(batch: int) -> None:
    size = "3,5" if batch == 0 else "4,2,5"
    text = f"""<ir_version: 9, opset_import: ["": 18]>
    net (float[4,3] x) => (float[{size}] y) {{
      h = MatMul (x, w)
      r = Reshape (h, shape)
      g = GatherND <batch_dims = {batch}> (r, where)
      y = MatMul (g, v)
    }}"""
    # r is 4 x 6 x 8; where names rows of it: of the whole, or of each of the four.
    rows = [[[5], [0]], [[1], [1]], [[2], [3]], [[4], [0]]]
    where = np.array([[0, 5], [3, 1], [2, 2]] if batch == 0 else rows)
    arrays = {"where": where.astype(np.int64), "shape": np.array([4, 6, 8])}
    model = parsed(text, w=rand(3, 48), v=rand(8, 5), **arrays)
    graph = load_onnx(model)
    assert graph.values["g"].hint == ((3, 8) if batch == 0 else (4, 2, 8))
    assert not [n.op for n in graph if n.op == "GatherND"]
    after = sizes(pruned(model))
    assert after["v"] == (4, 5) and after["w"] == (3, 24), "eight columns of each of six rows become four"
    rows = next(g for g in axis_groups(graph) if g.size == 6)
    assert "indexed by data" in rows.why()


@pytest.mark.parametrize("shared", [False, True])
def test_channels_pass_a_gather_that_lays_positions_out_in_order(shared: bool) -> None:
    """as_strided of a contiguous tensor is exported as a reshape to one axis and a gather of 0, 1, 2, ..."""
    text = f"""<ir_version: 9, opset_import: ["": 18]>
    net (float[2,3,6,6] x) => (float[2,5] y, float[2,5] z) {{
      h = Conv (x, w)
      m = GlobalAveragePool (h)
      r = Reshape (m, flat)
      g = Gather <axis = 0> (r, where)
      f = Flatten (g)
      y = Gemm <transB = 1> (f, v)
      h2 = Conv (x, w2)
      m2 = GlobalAveragePool (h2)
      r2 = Reshape (m2, flat)
      g2 = Gather <axis = 0> (r2, {"where" if shared else "where2"})
      f2 = Flatten (g2)
      z = Gemm <transB = 1> (f2, v2)
    }}"""
    order = {k: np.arange(16).reshape(2, 8, 1, 1) for k in (["where"] if shared else ["where", "where2"])}
    weights = {"w": rand(8, 3, 3, 3), "v": rand(5, 8), "w2": rand(8, 3, 3, 3), "v2": rand(5, 8)}
    model = parsed(text, **weights, flat=np.array([-1]), **order)
    after = sizes(pruned(model))
    assert after["v"] == after["v2"] == (5, 4) and after["w"] == after["w2"] == (4, 3, 3, 3)
    # One branch loses more than the other: each gather gets positions of its own.
    result = P.prune(model, ratio=0.5, overrides={"w2*": 0.25}, verify=True)
    assert result.report.passes[0].details["identity"]["relative_error"] <= 1e-5
    assert sizes(result.model)["v2"] == (5, 6) and sizes(result.model)["v"] == (5, 4)


@pytest.mark.parametrize("told", ["all", "listed", "computed"])
def test_the_sizes_that_a_resize_is_told_follow_its_channels(told: str) -> None:
    """interpolate to a size is exported as Resize with the sizes of all axes, channels included."""
    axes = ", axes = [1,2,3]" if told == "listed" else ""
    before = (
        """s = Shape <start = 0, end = 2> (h)
      sizes = Concat <axis = 0> (s, pixels)"""
        if told == "computed"
        else ""
    )
    text = f"""<ir_version: 9, opset_import: ["": 18]>
    net (float[2,3,6,6] x) => (float[2,5,12,12] y, float[2,4,12,12] z) {{
      h = Conv (x, w)
      {before}
      r = Resize <mode = "linear"{axes}> (h, , , sizes)
      y = Conv (r, v)
      h2 = Conv (x, w2)
      r2 = Resize <mode = "linear"{axes}> (h2, , , sizes)
      z = Conv (r2, v2)
    }}"""
    whole = np.array([2, 8, 12, 12])
    stored = {"pixels": whole[2:]} if told == "computed" else {"sizes": whole[1:] if told == "listed" else whole}
    weights = {"w": rand(8, 3, 1, 1), "v": rand(5, 8, 1, 1), "w2": rand(8, 3, 1, 1), "v2": rand(4, 8, 1, 1)}
    model = parsed(text, **weights, **stored)
    if told != "computed":
        result = P.prune(model, ratio=0.5, overrides={"w2*": 0.25}, verify=True)
        assert result.report.passes[0].details["identity"]["relative_error"] <= 1e-5
        assert sizes(result.model)["v2"] == (4, 6, 1, 1) and sizes(result.model)["v"] == (5, 4, 1, 1)
    assert sizes(pruned(model))["v"] == (5, 4, 1, 1)
