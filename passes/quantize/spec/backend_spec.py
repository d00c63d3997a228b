"""BackendSpec: where and how one target wants Q/DQ, a versioned and validated document without code."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ....graph.errors import ConfigError
from ....graph.ir import Node
from .formats import STRICT, TensorFormat, TypeName
from .op_rules import OpPlacement
from .validate import located, malformed, meaningful

SCHEMA = 1
"""Version of the document's form."""

Region: TypeAlias = Literal["attention", "mask", "shape"]


@dataclass(frozen=True, config=STRICT)
class RoundingArithmetic:
    """How the target rounds: x divided by the scale or times its reciprocal; a tie to even or away from zero."""

    scale: Literal["divide", "reciprocal"] = "divide"
    ties: Literal["even", "away"] = "even"


@dataclass(frozen=True, config=STRICT)
class ExportRules:
    """What the written file must look like.

    Attributes:
        zero_points: ``always`` writes zero points even where they are 0; ``nonzero`` leaves those out.
        opset: least ONNX opset of the file; None: what the model has, raised where a type needs it.
    """

    zero_points: Literal["always", "nonzero"] = "always"
    opset: int | None = None


@dataclass(frozen=True, config=STRICT)
class BackendSpec:
    """Where and how one target wants Q/DQ pairs.

    Attributes:
        target: name of the target, e.g. ``"onnxruntime-cpu"``.
        activations, weights: formats of the two roles.
        ops: canonical op -> alternatives, of which the first whose ``when`` holds applies. Absent ops stay float.
        schema: version of the document's form.
        release: release of the target that this was measured with.
        description: one sentence.
        extends: the spec this one was written on top of, as its file named it.
        inputs, outputs: formats of points at the graph's inputs and outputs, where they differ from ``activations``.
        activation_dtypes, weight_dtypes: further stored types that the target takes; fewer bits than these offer are
            kept in the smallest type that holds them, with a narrower range.
        rounding: how the target rounds.
        commutes: ops that Q/DQ commute with, short for a rule of role ``carry``. Padding only with zeros.
        hoist: move a Q up across commuting ops that only rearrange, as far as nobody reads the values in float.
        forbidden: parts of the graph that stay in float, found by structure: ``attention`` (from the product of
            queries and keys to the product with the values, softmax between), ``mask`` (what is added to its scores),
            ``shape`` (arithmetic on sizes).
        export: rules of the written file.
        channel_multiple: widths that the target computes well; what `P.Prune(round_to=TARGET)` rounds to.
        notes: facts about the target worth keeping beside the rules.
    """

    target: str
    activations: TensorFormat
    weights: TensorFormat
    ops: dict[str, tuple[OpPlacement, ...]]
    schema: Literal[1] = SCHEMA  # type: ignore[assignment]
    release: str = ""
    description: str = ""
    extends: str = ""
    inputs: TensorFormat | None = None
    outputs: TensorFormat | None = None
    activation_dtypes: tuple[TypeName, ...] = ()
    weight_dtypes: tuple[TypeName, ...] = ()
    rounding: RoundingArithmetic = field(default_factory=RoundingArithmetic)
    commutes: tuple[str, ...] = ()
    hoist: bool = False
    forbidden: tuple[Region, ...] = ()
    export: ExportRules = field(default_factory=ExportRules)
    channel_multiple: int = 1
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.target

    @property
    def zero_points(self) -> str:
        return self.export.zero_points

    @property
    def quantizes_activations(self) -> bool:
        """Whether any rule asks for quantized operands; else weights alone are stored as integers."""
        return any(rule.role in ("anchor", "join", "residual") for rules in self.ops.values() for rule in rules)

    def alternatives(self, op: str) -> tuple[OpPlacement, ...]:
        """The rules of an op, in the order in which they are tried."""
        own = self.ops.get(op, ())
        return (*own, CARRY) if op in self.commutes else own

    def placement(self, node: Node) -> tuple[OpPlacement | None, str]:
        """The rule for a node, or None and the reason."""
        alternatives = self.alternatives(node.op)
        if not alternatives:
            return None, f"{self.target} computes {node.op} in float"
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
            ConfigError: naming the key that is wrong: a field, a type or a version that there is not, an operator,
                condition or operand that cannot be (see :mod:`.validate`).
        """
        plain = dict(data)
        if isinstance(plain.get("ops"), dict):
            plain["ops"] = {op: [_rule(r) for r in _many(rules)] for op, rules in plain["ops"].items()}
        if plain.get("schema", SCHEMA) != SCHEMA:
            raise ConfigError(
                "this spec is written for another version of the form",
                node=origin,
                value="schema",
                expected=SCHEMA,
                found=repr(plain["schema"]),
            )
        try:
            spec = _ADAPTER.validate_python(plain)
        except ValidationError as exc:
            classes = (BackendSpec, OpPlacement, TensorFormat, ExportRules, RoundingArithmetic)
            raise malformed(exc, origin, classes) from exc
        except ConfigError as exc:
            raise located(exc, plain, origin) from exc
        meaningful(spec, origin)
        return spec

    @classmethod
    def from_yaml(cls, path: str | Path) -> BackendSpec:
        """Read and validate a spec file; see :func:`..files.read_spec` for ``extends``.

        Raises:
            ConfigError: the file cannot be read or is not valid; names the key.
        """
        from .files import read_spec

        return cls.from_dict(read_spec(Path(path)), Path(path).name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` takes."""
        found: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return found

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """JSON schema of the document, for editors and for checks before loading."""
        return _ADAPTER.json_schema()


CARRY = OpPlacement("carry")
_ADAPTER: TypeAdapter[BackendSpec] = TypeAdapter(BackendSpec)


def _many(rules: Any) -> list[Any]:
    return list(rules) if isinstance(rules, (list, tuple)) else [rules]


def _rule(rule: Any) -> Any:
    return {**rule, "data": None} if isinstance(rule, dict) and rule.get("data") == "all" else rule
