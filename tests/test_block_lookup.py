"""Embedding tables in blocks: written as DequantizeLinear and Gather, run by ONNX Runtime as GatherBlockQuantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from foldline import passes as P
from foldline.backends import get
from foldline.backends.onnxruntime.lookup import block_lookup
from foldline.graph.onnx import load_onnx
from torch import nn


class Bag(nn.Module):
    """Two look-ups in one table, and a matrix behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 64), nn.Linear(64, 6)

    def forward(self, ids: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids) + self.table(more))


def quantized(options: dict[str, Any], **more: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    ids = (torch.randint(0, 50, (4, 7)), torch.randint(0, 50, (4, 7)))
    program = torch.onnx.export(Bag().eval(), ids, dynamo=True, verbose=False, opset_version=21)
    assert program is not None
    graph = load_onnx(program.model)
    passes = P.WeightOnly(embeddings=True, embedding_options={"format": "int", **options}, ignore=("head",), **more)
    return P.Pipeline([passes]).run(graph, ids, verify=False).graph, ids


@pytest.mark.parametrize(("bits", "block", "symmetric"), [(4, 16, True), (4, 32, False), (8, 16, False), (8, 32, True)])
def test_rows_are_looked_up_as_integers_with_the_same_numbers(bits: int, block: int, symmetric: bool) -> None:
    graph, ids = quantized({"bits": bits, "block": block, "symmetric": symmetric})
    artifact = get("onnxruntime").lower(graph, ids)
    counts = Counter(n.op_type for n in artifact.model.graph)
    assert counts["GatherBlockQuantized"] == 2 and not counts["Gather"] and not counts["DequantizeLinear"]
    assert artifact.profile().counts.get("GatherBlockQuantized") == 2
    wanted = graph.run(graph.bind(ids))[0][0]
    np.testing.assert_allclose(artifact.run(tuple(i.numpy() for i in ids))[0], wanted, rtol=1e-5, atol=1e-5)
    table = sum(v.const_value.nbytes for n, v in artifact.model.graph.initializers.items() if "table" in n)
    scales = 50 * 64 // block * (4 if symmetric else 4 + bits / 8)
    assert table <= 50 * 64 * bits / 8 + scales + 8


def test_tables_of_one_scale_per_row_and_odd_blocks_stay_as_they_are() -> None:
    for options in ({"bits": 8, "block": 0}, {"bits": 4, "block": 8}):
        graph, ids = quantized(options, storage="dequantize")
        artifact = get("onnxruntime").lower(graph, ids)
        assert not any(n.op_type == "GatherBlockQuantized" for n in artifact.model.graph)
        wanted = graph.run(graph.bind(ids))[0][0]
        np.testing.assert_allclose(artifact.run(tuple(i.numpy() for i in ids))[0], wanted, rtol=1e-5, atol=1e-5)


def test_another_axis_or_a_missing_zero_point_of_uint8_is_left() -> None:
    def look_up(axis: int, dtype: type, along: int = 1) -> ir.Node:
        data = ir.tensor(np.zeros((32, 32), dtype), name="t")
        table = ir.Value(name="t", const_value=data)
        scale = ir.Value(name="s", const_value=ir.tensor(np.ones((32, 2) if along == 1 else (2, 32), np.float32)))
        dq = ir.node("DequantizeLinear", [table, scale], {"axis": along, "block_size": 16})
        rows = ir.Value(name="i")
        node = ir.node("Gather", [dq.outputs[0], rows], {"axis": axis})
        ir.Graph([rows], node.outputs, nodes=[dq, node], initializers=[table, scale])
        return node

    assert block_lookup(look_up(0, np.int8))
    assert not block_lookup(look_up(1, np.int8))
    assert not block_lookup(look_up(0, np.uint8))
    assert not block_lookup(look_up(0, np.int8, along=0))
