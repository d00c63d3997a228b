"""Where an fx node comes from: the layer that made it and the line of the user's model."""

from __future__ import annotations

import linecache
import os
from functools import lru_cache

import torch
from torch import fx

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep


def scope_of(node: fx.Node) -> str:
    """Module path of the layer that made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        name = entry[0] if isinstance(entry, tuple) else ""
        if name and not name.startswith("_empty_nn_module_stack"):
            path = name
    return path.split("@")[0]


@lru_cache(maxsize=1024)
def _told(path: str, number: int, function: str) -> str:
    short = "/".join(path.replace("\\", "/").split("/")[-2:])
    return f"{short}:{number} in {function}: {linecache.getline(path, number).strip()}"


def location_of(node: fx.Node) -> str:
    """``file:line in function: code`` of the last line of the user's model on the node's stack."""
    if (recorded := node.meta.get("line")) is not None:
        return _told(*recorded)
    lines = (node.meta.get("stack_trace") or "").splitlines()
    best = ""
    for i, line in enumerate(lines):
        if line.lstrip().startswith("File ") and _TORCH_DIR not in line and 'File "torch/' not in line:
            head = line.strip().removeprefix("File ")
            path, _, rest = head.partition('", line ')
            number, _, function = rest.partition(", in ")
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            short = "/".join(path.strip('"').replace("\\", "/").split("/")[-2:])
            best = f"{short}:{number} in {function}: {code}"
    return best
