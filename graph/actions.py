"""Actions on axis groups: select, permute, scale (and mask, the oracle of select), applied everywhere at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .analysis import Resize
from .errors import ConstraintError, VerificationError
from .groups import AxisGroup, AxisGroups, axis_groups
from .ir import Graph, Node, Weight
from .ops.table import get_rule
from .positions import kept_positions, spread
from .space import Atom, atoms, norm

PlanData: TypeAlias = dict[str, dict[int, list[int]]]


@dataclass
class Plan:
    """What a selection keeps, as data: ``{weight name: {axis: kept indices}}``; JSON round trips it.

    Applies to any checkpoint of the same model: weights, optimizer state, EMA copies (:func:`apply_plan`).
    """

    weights: PlanData
    shapes: dict[str, list[int]]

    def to_dict(self) -> PlanData:
        """The kept indices per weight and axis, as plain data."""
        return self.weights

    def to_json(self) -> str:
        data = {
            "format": "foldline-plan",
            "version": 1,
            "weights": {n: {str(a): k for a, k in sorted(axes.items())} for n, axes in sorted(self.weights.items())},
            "shapes": dict(sorted(self.shapes.items())),
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse a plan. Raises ConstraintError if the text is not one."""
        try:
            data = json.loads(text)
            weights = {n: {int(a): [int(i) for i in k] for a, k in axes.items()} for n, axes in data["weights"].items()}
            return cls(weights, {n: list(s) for n, s in data["shapes"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConstraintError(
                "not a foldline plan", found=str(e), hint="pass the plan.json that a run wrote"
            ) from e

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        return cls.from_json(Path(path).read_text())

    def __bool__(self) -> bool:
        return bool(self.weights)

    def __repr__(self) -> str:
        axes = sum(len(a) for a in self.weights.values())
        return f"Plan({len(self.weights)} weights, {axes} axes)"


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


def permute(groups: AxisGroups, orders: Mapping[AxisGroup, np.ndarray]) -> Plan:
    """Reorder the indices of each given group everywhere: new index j is old index ``order[j]``. Exact."""
    _legal(groups, orders, "permute")
    for g, order in orders.items():
        if sorted(np.asarray(order).tolist()) != list(range(g.size)):
            raise ConstraintError(
                "not a permutation of the group's indices", node=g.name, expected=f"0..{g.size - 1} once each"
            )
    return _gather(groups, {g.atom: np.asarray(o, dtype=np.int64) for g, o in orders.items()})


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
    plan = Plan({}, {})
    if not selection:
        return plan
    slices: dict[Weight, dict[int, np.ndarray]] = {}
    for atom in selection:
        group = groups.by_atom(atom)
        assert group is not None
        for m in group.members:
            if m.axis not in slices.setdefault(m.weight, {}):
                slices[m.weight][m.axis] = kept_positions(m.space, selection)
    changes = [(n, c) for n in graph.nodes if (c := _update(re, n))]
    predicted = {v: re.shape(v) for v in graph.values.values() if v in groups.analysis.spaces and v.weight is None}
    for w, axes in slices.items():
        plan.weights[w.name] = {a: k.tolist() for a, k in axes.items()}
        plan.shapes[w.name] = list(w.shape)
        graph.slice_weight(w, axes)
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
            if not m.stat and m.weight.dtype.startswith(("float", "bfloat")):
                touched.setdefault(m.weight, {})[m.axis] = kept_positions(m.space, selection)
    for w, axes in touched.items():
        target = graph.weight(w.name)
        data = target.numpy().copy()
        for axis, keep in axes.items():
            gone = np.setdiff1d(np.arange(w.shape[axis]), keep)
            data[(slice(None),) * axis + (gone,)] = 0
        graph.set_weight(target, data)
    return graph


# ---- plans on other holders of the same weights -------------------------------------------------------------------
def apply_plan(target: Any, plan: Plan | str | Path, example_inputs: Any = None, *, model: Any = None) -> Any:
    """Apply a plan to another holder of the same model's weights.

    Args:
        target: a state dict (new dict returned), a torch optimizer (its state is sliced in place; ``model`` is the
            pruned module whose parameters replace the old ones), or a model as :func:`foldline.load` takes it
            (a pruned model of the same kind is returned).
        plan: a Plan or the path of a plan.json.

    Raises:
        ConstraintError: the plan is for another model (missing weight, other shape) or cuts frozen axes.
    """
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    if isinstance(target, Mapping):
        return _plan_on_state(target, plan)
    if hasattr(target, "param_groups") and hasattr(target, "state"):
        return _plan_on_optimizer(target, plan, model)
    if isinstance(target, Graph):
        target.separate_shared()
        groups = axis_groups(target)
        select(groups, groups_of_plan(groups, plan))
        return target
    from .load import load

    graph = load(target, example_inputs)
    return apply_plan(graph, plan).to_model()


def _check(plan: Plan, name: str, shape: tuple[int, ...]) -> None:
    if tuple(plan.shapes[name]) != tuple(shape):
        raise ConstraintError(
            "the plan is for another model",
            node=name,
            expected=plan.shapes[name],
            found=list(shape),
            hint="use the unpruned checkpoint",
        )


def _take(tensor: Any, axes: dict[int, list[int]]) -> Any:
    import torch

    for axis, keep in axes.items():
        if isinstance(tensor, torch.Tensor):
            tensor = tensor.index_select(axis, torch.as_tensor(keep, device=tensor.device))
        else:
            tensor = np.take(tensor, keep, axis=axis)
    return tensor


def _plan_on_state(state: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    out = dict(state)
    for name, axes in plan.weights.items():
        if name not in out:
            raise ConstraintError(
                "the plan names a weight the checkpoint lacks", node=name, hint="use a checkpoint of the same model"
            )
        _check(plan, name, tuple(out[name].shape))
        out[name] = _take(out[name], axes)
    return out


def _plan_on_optimizer(optimizer: Any, plan: Plan, model: Any) -> Any:
    if model is None:
        raise ConstraintError("an optimizer holds no names", hint="pass model=<the pruned module> to apply_plan")
    import torch

    named = [(n, p) for n, p in model.named_parameters()]
    old = [p for g in optimizer.param_groups for p in g["params"]]
    if len(named) != len(old):
        raise ConstraintError(
            "optimizer and model hold different numbers of parameters", expected=len(named), found=len(old)
        )
    fresh = {}
    for p, (name, q) in zip(old, named, strict=True):
        axes = plan.weights.get(name, {})
        if axes:
            _check(plan, name, tuple(p.shape))
        state = optimizer.state.pop(p, {})
        optimizer.state[q] = {
            k: _take(v, axes) if isinstance(v, torch.Tensor) and v.shape == p.shape else v for k, v in state.items()
        }
        fresh[p] = q
    for g in optimizer.param_groups:
        g["params"] = [fresh[p] for p in g["params"]]
    return optimizer


def groups_of_plan(groups: AxisGroups, plan: Plan) -> dict[AxisGroup, np.ndarray]:
    """The indices each group keeps under a plan; ConstraintError where the plan does not fit the groups."""
    chosen: dict[AxisGroup, set[int]] = {}
    for name, axes in plan.weights.items():
        w = groups.graph.weight(name)
        _check(plan, name, w.shape)
        for axis, keep in axes.items():
            for g in groups.of(w, axis):
                member = next(m for m in g.members if m.weight is w and m.axis == axis)
                at = member.positions(g.atom)
                indices = set(at[np.asarray(keep, dtype=np.int64)].tolist()) - {-1}
                if g in chosen and chosen[g] != indices:
                    raise ConstraintError(
                        "the plan keeps different indices of one axis group",
                        node=f"{name}[{axis}]",
                        hint="edit the plan so that all members agree",
                    )
                chosen[g] = indices
    kept = {g: np.array(sorted(k)) for g, k in chosen.items() if len(k) < g.size}
    selection = {g.atom: k for g, k in kept.items()}
    for name, axes in plan.weights.items():
        w = groups.graph.weight(name)
        assert w.value is not None
        for axis, keep in axes.items():
            if kept_positions(norm(groups.analysis.of(w.value)[axis]), selection).tolist() != sorted(keep):
                raise ConstraintError("the plan cuts an axis where its group cannot be cut", node=f"{name}[{axis}]")
    return kept
