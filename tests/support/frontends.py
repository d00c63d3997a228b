"""One toy as a graph from either front end, built once per session and cloned for each use."""

from __future__ import annotations

import functools
import io
import warnings
from typing import Any

import onnx
import torch
from foldline.graph.ir import Graph

from .toys import toy

FRONT_ENDS = ("fx", "onnx")


@functools.cache
def _pristine(name: str, front: str) -> Graph:
    module, inputs = toy(name)
    return load(module, inputs, front)


def load(module: torch.nn.Module, inputs: Any, front: str) -> Graph:
    """Any module as a graph of the given front end (``onnx``: through torch.onnx.export)."""
    if front == "fx":
        from foldline.graph.fx import load_torch

        return load_torch(module, inputs)
    from foldline.graph.onnx import load_onnx

    return load_onnx(exported(module, inputs))


def exported(module: torch.nn.Module, inputs: Any) -> onnx.ModelProto:
    """The ONNX file of a module, as a proto, by torch's own exporter at a static batch."""
    args, kwargs = (tuple(), inputs) if isinstance(inputs, dict) else (tuple(inputs), None)
    program = torch.onnx.export(module, args, kwargs=kwargs, dynamo=True, verbose=False)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return onnx.load_from_string(buffer.getvalue())


def exported_legacy(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """The ONNX file that torch's older, TorchScript-based exporter writes (opset 17)."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (), buffer, kwargs=inputs, dynamo=False, opset_version=17, input_names=list(inputs), verbose=False
        )
    return onnx.load_from_string(buffer.getvalue())


def toy_graph(name: str, front: str) -> Graph:
    """A fresh clone of the toy's graph."""
    return _pristine(name, front).clone()
