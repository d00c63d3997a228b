"""What is the same in every run about the padding of a sliding window."""

from __future__ import annotations

from typing import Any

from .ir import Node

FOLLOWS_SIZE = ("SAME_UPPER", "SAME_LOWER")


def padding_is_fixed(node: Node) -> bool:
    """Whether the padding that a conv or pool shows holds for inputs of every size.

    ONNX's ``auto_pad`` derives it from the size of the input: what the view shows then holds where that size is the
    same in every run.
    """
    x = node.inputs[0]
    if x is not None and x.shape is not None and all(isinstance(d, int) for d in x.shape[2:]):
        return True
    attributes: Any = getattr(node.native, "attributes", None)
    if attributes is None:
        return True  # an fx call: numbers, or "same" of the kernel alone
    auto = attributes.get("auto_pad")
    return auto is None or auto.value not in FOLLOWS_SIZE
