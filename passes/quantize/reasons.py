"""Why: a decision per node that takes part, and the groups of values that share a scale."""

from __future__ import annotations

from typing import Any

from ..base import Decision
from .placement import Placement


def decisions_of(placement: Placement, facts: dict[str, dict[str, Any]]) -> list[Decision]:
    """What was quantized, how, and how well. What was not is among the placement's own decisions."""
    found = []
    for name, rule in placement.quantized.items():
        data = facts.get(name, {})
        if rule.role in ("anchor", "weight_only") and data:
            how = "integer kernel" if rule.role == "anchor" else "its weight alone, dequantized in front of it"
            found.append(Decision(name, "quantized", f"{how}; {_weight(data)}", data))
        elif rule.role == "anchor":
            found.append(Decision(name, "quantized", "a product of two quantized activations"))
        elif rule.role == "residual":
            reason = "added inside the layer before it: its skip operand is quantized, the layer's result is not"
            found.append(Decision(name, "quantized", reason))
        elif rule.role == "join":
            same = ", all with one scale" if rule.same_scale else ""
            found.append(Decision(name, "quantized", f"all operands are quantized and so is its result{same}"))
        else:
            found.append(Decision(name, "quantized", "moves quantized elements on with the same scale"))
    for site in placement.tables:
        data = facts[site.node.name]
        reason = f"rows are looked up as integers and dequantized behind; {_weight(data)}"
        found.append(Decision(site.node.name, "quantized", reason, data))
    return found


def _weight(data: dict[str, Any]) -> str:
    return f"weight {data['weight']} in {data['weight_dtype']} at {data['weight_sqnr_db']:.1f} dB"


def scale_groups(placement: Placement) -> list[dict[str, Any]]:
    """Groups of more than one point that share a scale: members, the one it is named after, and the reasons."""
    members: dict[str, list[str]] = {}
    for name, point in placement.points.items():
        members.setdefault(point.root, []).append(name)
    reasons: dict[str, list[str]] = {}
    for tie in placement.ties:
        reasons.setdefault(placement.points[tie.first].root, []).append(f"{tie.node}: {tie.why}")
    return [
        {"scale_of": root, "members": names, "because": reasons.get(root, [])}
        for root, names in members.items()
        if len(names) > 1
    ]
