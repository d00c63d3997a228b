"""Actions on axis groups: select, permute, scale (and mask, the oracle of select), applied everywhere at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .analysis import Resize
from .errors import ConstraintError, VerificationError
from .groups import AxisGroup, AxisGroups, axis_groups
from .holders import CHECKPOINTS, is_optimizer_state, on_checkpoint, on_file, on_optimizer, on_optimizer_state
from .ir import Graph, Node, Weight
from .ops.table import get_rule
from .plans import Plan, as_plan, groups_of_plan, positions_left
from .positions import kept_positions, spread
from .quantized import dequantizer, is_numeric, zero_points
from .space import Atom, atoms

__all__ = ["Plan", "apply_kept", "apply_plan", "groups_of_plan", "mask", "permute", "scale", "select"]


def _legal(groups: AxisGroups, chosen: Mapping[AxisGroup, Any], action: str) -> None:
    for g in chosen:
        if groups.by_atom(g.atom) is not g:
            raise ConstraintError(
                "the axis group belongs to an earlier state of the graph", node=g.name, hint="call fl.axis_groups again"
            )
        if not g.can(action):
            raise ConstraintError(
                f"axis group cannot be acted on with {action}",
                node=g.name,
                found=g.why(action),
                hint="leave this group out, or see groups.explain(...)",
            )


def select(groups: AxisGroups, kept: Mapping[AxisGroup, np.ndarray]) -> Plan:
    """Keep only the given indices of each given group, in the graph the groups were found in, in place.

    Exact: equals the original with the removed slabs zeroed, for groups whose ``exact`` holds.
    Raises ConstraintError for a frozen group, an empty or out-of-range index list, VerificationError if the graph's
    own shapes disagree with the analysis afterwards.
    """
    _legal(groups, kept, "select")
    selection: dict[Atom, np.ndarray] = {}
    for g, k in kept.items():
        index = np.unique(np.asarray(k, dtype=np.int64))
        if len(index) == 0 or index[0] < 0 or index[-1] >= g.size:
            raise ConstraintError(
                "indices to keep are empty or out of range", node=g.name, expected=f"0..{g.size - 1}", found=list(k)[:8]
            )
        if len(index) < g.size:
            selection[g.atom] = index
    return _gather(groups, selection)


def apply_kept(groups: AxisGroups, kept: Mapping[AxisGroup, np.ndarray]) -> Plan:
    """Keep what :func:`groups_of_plan` returned (checked there): subsets, new orders, or both, in place."""
    return _gather(groups, {g.atom: np.array(k, dtype=np.int64) for g, k in kept.items()})


def permute(groups: AxisGroups, orders: Mapping[AxisGroup, np.ndarray]) -> Plan:
    """Reorder the indices of each given group everywhere: new index j is old index ``order[j]``. Exact."""
    _legal(groups, orders, "permute")
    for g, order in orders.items():
        if sorted(np.asarray(order).tolist()) != list(range(g.size)):
            raise ConstraintError(
                "not a permutation of the group's indices", node=g.name, expected=f"0..{g.size - 1} once each"
            )
    return _gather(groups, {g.atom: np.array(o, dtype=np.int64) for g, o in orders.items()})


def scale(groups: AxisGroups, factors: Mapping[AxisGroup, np.ndarray]) -> None:
    """Multiply each group index by a positive factor at its producers and divide by it at its consumers. Exact."""
    _legal(groups, factors, "scale")
    vectors: dict[Atom, np.ndarray] = {}
    for g, s in factors.items():
        v = np.asarray(s, dtype=np.float64)
        if v.shape != (g.size,) or not bool((v > 0).all()) or not bool(np.isfinite(v).all()):
            raise ConstraintError(
                "scale factors must be positive and finite", node=g.name, expected=f"shape ({g.size},)", found=v.shape
            )
        vectors[g.atom] = v
    per_axis: dict[tuple[Weight, int], dict[str, np.ndarray]] = {}
    for r in groups.analysis.roles:
        if r.exponent and any(a in vectors for a in atoms(r.space)):
            use = per_axis.setdefault((r.weight, r.axis), {})
            factor = spread(r.space, vectors) ** r.exponent
            use[r.node.name] = use[r.node.name] * factor if r.node.name in use else factor
    by_weight: dict[Weight, np.ndarray] = {}
    for (w, axis), uses in per_axis.items():
        factor = next(iter(uses.values()))
        shape = [1] * len(w.shape)
        shape[axis] = w.shape[axis]
        by_weight[w] = by_weight.get(w, np.ones(1)) * factor.reshape(shape)
    for w, total in by_weight.items():
        data = w.numpy()
        groups.graph.set_weight(w, (data.astype(np.float64) * total).astype(data.dtype))


def _gather(groups: AxisGroups, selection: dict[Atom, np.ndarray]) -> Plan:
    graph, re = groups.graph, Resize(groups.analysis, selection)
    if not selection:
        return Plan({}, {})
    left = positions_left(groups, selection)
    plan = as_plan(groups, left)
    changes = [(n, c) for n in graph.nodes if (c := _update(re, n))]
    predicted = {v: re.shape(v) for v in graph.values.values() if v in groups.analysis.spaces and v.weight is None}
    for name, axes in left.items():
        graph.slice_weight(graph.weight(name), axes)
    for node, change in changes:
        for key in [k for k in change if k.startswith("input:")]:
            value = graph.add_weight(f"{node.name}_index", change.pop(key))
            graph.set_input(node, int(key.split(":")[1]), value)
        if change:
            graph.set_attr(node, **change)
    graph.refresh()
    for v, shape in predicted.items():
        now = graph.values.get(v.name)
        if now is not None and now.hint is not None and list(now.hint) != shape and now.producer is not None:
            raise VerificationError(
                "after the action the graph's shapes disagree with the analysis",
                node=now.producer.name,
                value=v.name,
                expected=shape,
                found=list(now.hint),
                hint="please report this model; leave the groups of this node out meanwhile",
            )
    return plan


def _update(re: Resize, node: Node) -> dict[str, Any]:
    rule = get_rule(node.op)
    if rule is None or rule.update is None or any(v is not None and v not in re.analysis.spaces for v in node.inputs):
        return {}
    return dict(rule.update(re, node))


def mask(groups: AxisGroups, kept: Mapping[AxisGroup, np.ndarray]) -> Graph:
    """The oracle of select: a clone with every removed slab zeroed in all weights but running statistics."""
    graph = groups.graph.clone()
    selection = {g.atom: np.unique(np.asarray(k, dtype=np.int64)) for g, k in kept.items()}
    touched: dict[Weight, dict[int, np.ndarray]] = {}
    for atom in selection:
        group = groups.by_atom(atom)
        assert group is not None
        for m in group.members:
            if not m.stat and is_numeric(m.weight):
                touched.setdefault(m.weight, {})[m.axis] = kept_positions(m.space, selection)
    for w, axes in touched.items():
        target = graph.weight(w.name)
        data = target.numpy().copy()
        zero = np.broadcast_to(0 if dequantizer(w) is None else zero_points(w), w.shape)
        for axis, keep in axes.items():
            gone = (slice(None),) * axis + (np.setdiff1d(np.arange(w.shape[axis]), keep),)
            data[gone] = zero[gone]
        graph.set_weight(target, data)
    return graph


# ---- plans on other holders of the same weights -------------------------------------------------------------------
def apply_plan(
    target: Any, plan: Plan | str | Path, example_inputs: Any = None, *, model: Any = None, original: Any = None
) -> Any:
    """Apply a plan to another holder of the same model's weights; nothing is half done when it raises.

    Args:
        target: a state dict (a new dict is returned), the path of a checkpoint file (a dict of tensors is returned),
            a torch optimizer (its state is sliced in place; its parameters become those of ``model``), what
            ``optimizer.state_dict()`` returned (a new dict), or a model as :func:`foldline.load` takes it, an EMA
            copy (``AveragedModel``) among them (a pruned model of the same kind is returned).
        plan: a Plan or the path of a plan.json.
        example_inputs: of a model.
        model: the pruned module, for an optimizer.
        original: the unpruned module, for an optimizer whose parameters cannot be told apart by their order.

    Raises:
        ConstraintError: the plan is for another model (missing weight, other shape) or cuts frozen axes.
    """
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    if is_optimizer_state(target):
        return on_optimizer_state(target, plan, original)
    if isinstance(target, Mapping):
        return on_checkpoint(target, plan, original)
    if isinstance(target, (str, Path)) and Path(target).suffix.lower() in CHECKPOINTS:
        return on_file(Path(target), plan, original)
    if hasattr(target, "param_groups") and hasattr(target, "state"):
        return on_optimizer(target, plan, model, original)
    if isinstance(target, Graph):
        target.separate_shared()
        groups = axis_groups(target)
        apply_kept(groups, groups_of_plan(groups, plan))
        return target
    from .load import load

    return apply_plan(load(target, example_inputs, static=True), plan).to_model()
