"""Where a node came from: module path and source line, as torch's two ONNX exporters record them."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
TRACE = "pkg.torch.onnx.stack_trace"
NAMESPACE = "namespace"


def scope_of(node: ir.Node) -> str:
    """Module path (``"layer1.0.conv1"``); "" where neither metadata nor the node's name tells it."""
    props = node.metadata_props
    recorded = props.get(SCOPES) if props else None
    if recorded:
        try:
            names = ast.literal_eval(recorded)
        except (ValueError, SyntaxError):
            names = []
        modules = [n for n in names[:-1] if isinstance(n, str) and not n.startswith("_empty_nn_module_stack")]
        return modules[-1] if modules else ""
    recorded = props.get(NAMESPACE) if props else None
    if recorded:
        return next((p.split(":")[0].strip() for p in reversed(recorded.split("/")[:-1])), "")
    name = node.name
    if name and name.startswith("/"):
        return _from_path(name.split("/")[1:-1])
    return ""


def _from_path(parts: list[str]) -> str:
    """The older exporter's node names: ``/blocks/blocks.0/attn/Gather`` lies in ``blocks.0.attn``."""
    path: list[str] = []
    for part in parts:
        if path and part.startswith(path[-1] + "."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def location_of(node: ir.Node) -> str:
    """``"file:line"`` of the user's code that made the node; "" if unknown."""
    trace = node.metadata_props.get(TRACE)
    found = re.findall(r'File "([^"]+)", line (\d+)', trace) if trace else []
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""
