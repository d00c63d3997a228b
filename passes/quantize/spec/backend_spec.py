"""What a backend wants quantized, and how: the declarative spec that passes read, with its YAML form."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ....graph.errors import ConfigError
from ....graph.ir import Node
from .formats import STRICT, TensorFormat


@dataclass(frozen=True, config=STRICT)
class OpPlacement:
    """How one canonical op takes part.

    Attributes:
        role: ``anchor`` computes in integers and asks for quantized operands; ``join`` follows when all its operands
            are quantized anyway and its result is wanted quantized (add, concat, ...); ``carry`` moves elements without
            changing them, so the result takes the operand's scale (max pool, reshape, ...); ``float`` stays as it is.
        data: operand positions that are activations; None means all operands.
        weight: operand position of the stored weight (anchors).
        bias: operand position of the bias, if it has one.
        bias_dtype: ``int32`` (scale = scale of x times scale of the weight) or ``float32`` (left alone).
        bias_add: an addition of one constant per output channel right behind the op counts as its bias.
        output: whether the result must carry a Q: ``required`` (then everybody reads the quantized result) or
            ``optional`` (only where a consumer asks for it).
        activations: ops that may stand between the op and the Q on its result, fused by the backend.
        same_scale: operands and result of a join share one scale.
        when: conditions on the node, all of which must hold: an attribute name with its value, or ``rank`` with the
            rank of operand 0, or ``float_operands: N`` for exactly N activations (others constant).
        reason: why, where it is worth telling the user (``float``).
    """

    role: Literal["anchor", "join", "carry", "float"]
    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    bias_dtype: Literal["int32", "float32"] = "float32"
    bias_add: bool = False
    output: Literal["required", "optional"] = "optional"
    activations: tuple[str, ...] = ()
    same_scale: bool = False
    when: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def unmet(self, node: Node) -> str | None:
        """The first condition of ``when`` that the node does not meet, in words; None if it meets all."""
        for key, wanted in self.when.items():
            if key == "rank":
                x = node.input(0)
                found: Any = None if x is None else x.rank
            elif key == "float_operands":
                found = sum(v is not None and not v.is_const for v in node.inputs)
            else:
                found = node.attrs.get(key)
            if found != wanted:
                return f"{key} is {found}, the target wants {wanted}"
        return None


@dataclass(frozen=True, config=STRICT)
class BackendSpec:
    """Where and how one target wants Q/DQ pairs.

    Attributes:
        name: target name, e.g. ``"onnxruntime-cpu"``.
        activations, weights: formats.
        zero_points: ``always`` writes zero points even where they are 0; ``nonzero`` leaves those out.
        ops: canonical op -> alternatives, of which the first whose ``when`` holds applies. Absent ops stay float.
        notes: facts about the target worth keeping beside the rules.
    """

    name: str
    activations: TensorFormat
    weights: TensorFormat
    ops: dict[str, tuple[OpPlacement, ...]]
    zero_points: Literal["always", "nonzero"] = "always"
    notes: tuple[str, ...] = ()

    def placement(self, node: Node) -> tuple[OpPlacement | None, str]:
        """The rule for a node, or None and the reason."""
        alternatives = self.ops.get(node.op, ())
        if not alternatives:
            return None, f"{self.name} computes {node.op} in float"
        unmet = ""
        for rule in alternatives:
            problem = rule.unmet(node)
            if problem is None:
                return rule, ""
            unmet = unmet or problem
        return None, unmet

    @classmethod
    def from_dict(cls, data: dict[str, Any], origin: str = "spec") -> BackendSpec:
        """Validate plain data. A single rule may stand for a list of one; ``data: all`` means every operand.

        Raises:
            ConfigError: naming the key that is wrong.
        """
        plain = dict(data)
        if isinstance(plain.get("ops"), dict):
            plain["ops"] = {op: [_rule(r) for r in _many(rules)] for op, rules in plain["ops"].items()}
        try:
            return TypeAdapter(cls).validate_python(plain)
        except ValidationError as exc:
            problem = exc.errors(include_url=False)[0]
            raise ConfigError(
                f"invalid backend spec: {problem['msg']}",
                node=origin,
                value=".".join(str(part) for part in problem["loc"]),
                found=repr(problem.get("input"))[:120],
            ) from exc

    @classmethod
    def from_yaml(cls, path: Path) -> BackendSpec:
        """Read and validate a spec file. Raises ConfigError if it is not valid."""
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as exc:
            raise ConfigError(f"the backend spec cannot be read: {exc}", node=path.name) from exc
        if not isinstance(data, dict):
            raise ConfigError("a backend spec is a mapping", node=path.name, found=type(data).__name__)
        return cls.from_dict(data, path.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` takes."""
        found: dict[str, Any] = TypeAdapter(BackendSpec).dump_python(self, mode="json")
        return found


def _many(rules: Any) -> list[Any]:
    return list(rules) if isinstance(rules, (list, tuple)) else [rules]


def _rule(rule: Any) -> Any:
    return {**rule, "data": None} if isinstance(rule, dict) and rule.get("data") == "all" else rule
