"""What a spec names must exist: operators, conditions and operand positions; and where in a document an error lies."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from ....graph.errors import ConfigError
from .formats import TensorFormat
from .op_rules import FACTS, OpPlacement

if TYPE_CHECKING:
    from .backend_spec import BackendSpec

ATTRIBUTES = frozenset(
    "alpha axes axis batch batch_first beta bidirectional block bits causal ceil count_include_pad dilation dtype end "
    "ends eps equation factor fn full gates gqa groups has_biases hidden index k keepdims kernel "
    "layers layout max min mode n normalized_shape output_padding output_size p padding pads perm quant_max quant_min "
    "repeats rounding scale shape shifts size sizes slope start starts step steps stride training transposed "
    "transposed_weight value approximate".split()
)
"""Attributes of canonical operators (docs/ops.md), which a condition may name beside :data:`.op_rules.FACTS`."""
STORED = {"conv": 1, "linear": 1}
"""Operators whose weight always stands at this position."""
LARGEST_OPSET = 30
"""More than any ONNX release knows."""


def meaningful(spec: BackendSpec, origin: str) -> None:
    """Refuse a document that is well formed and says something that cannot be.

    Raises:
        ConfigError: naming the key; an unknown operator or condition comes with the nearest known one.
    """
    from ....graph.ops import known_ops

    ops = known_ops()
    for op in spec.ops:
        _known(op, ops, f"ops.{op}", "no such canonical operator", origin)
    for i, op in enumerate(spec.commutes):
        _known(op, ops, f"commutes.{i}", "no such canonical operator", origin)
    for op, rules in spec.ops.items():
        for i, rule in enumerate(rules):
            _rule(op, rule, ops, f"ops.{op}.{i}", origin)
    if spec.channel_multiple < 1:
        raise _problem("widths are multiples of a whole number", "channel_multiple", "1 or more", spec, origin)
    if spec.export.opset is not None and not 1 <= spec.export.opset <= LARGEST_OPSET:
        raise ConfigError(
            "there is no such ONNX opset", node=origin, value="export.opset", found=spec.export.opset,
            expected="the number of an opset, or nothing",
        )  # fmt: skip
    for role in ("activations", "inputs", "outputs"):
        _one_scale(getattr(spec, role), role, origin)
    if not spec.target:
        raise ConfigError("a target has a name", node=origin, value="target", expected="a name", found="''")


def _rule(op: str, rule: OpPlacement, ops: Iterable[str], key: str, origin: str) -> None:
    for name in ("activations", "behind"):
        for i, other in enumerate(getattr(rule, name)):
            _known(other, ops, f"{key}.{name}.{i}", "no such canonical operator", origin)
    for name in rule.when:
        _known(name, {*FACTS, *ATTRIBUTES}, f"{key}.when.{name}", "no such condition", origin)
    positions = [*(rule.data or ()), *(p for p in (rule.weight, rule.bias) if p is not None)]
    wrong = next((p for p in positions if p < 0), None)
    if wrong is not None:
        raise _problem("operands are counted from 0", f"{key}.data", "0, 1...", rule, origin)
    if len(set(positions)) != len(positions):
        raise ConfigError(
            "data, weight and bias are different operands", node=origin, value=key, found=", ".join(map(str, positions))
        )
    if rule.role in ("anchor", "weight_only") and op in STORED and rule.weight != STORED[op]:
        raise ConfigError(
            f"the weight of {op} is its operand {STORED[op]}", node=origin, value=f"{key}.weight",
            expected=STORED[op], found=rule.weight,
        )  # fmt: skip
    if rule.data_format is not None:
        _one_scale(rule.data_format, f"{key}.data_format", origin)


def _one_scale(form: TensorFormat | None, key: str, origin: str) -> None:
    if form is not None and form.granularity != "tensor":
        raise ConfigError(
            "an activation has one scale", node=origin, value=f"{key}.granularity", expected="tensor",
            found=form.granularity,
        )  # fmt: skip


def _known(name: str, choices: Iterable[str], key: str, text: str, origin: str) -> None:
    if name in choices:
        return
    raise ConfigError(text, node=origin, value=key, found=name, hint=_nearest(name, choices))


def _nearest(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "docs/ops.md lists the operators and their attributes"


def _problem(text: str, key: str, expected: str, holder: Any, origin: str) -> ConfigError:
    found = getattr(holder, key.rsplit(".", 1)[-1])
    return ConfigError(text, node=origin, value=key, expected=expected, found=found)


def located(problem: ConfigError, plain: dict[str, Any], origin: str) -> ConfigError:
    """The error that a part of the document raised, under its whole path."""
    path = next((key for key, part, adapter in _parts(plain) if _raises(adapter, part)), "")
    key = ".".join(part for part in (path, problem.node) if part)
    return ConfigError(problem.message, node=origin, value=key, expected=problem.expected, found=problem.found)


def _parts(plain: dict[str, Any]) -> Iterator[tuple[str, Any, TypeAdapter[Any]]]:
    form: TypeAdapter[Any] = TypeAdapter(TensorFormat)
    rule: TypeAdapter[Any] = TypeAdapter(OpPlacement)
    for key in ("activations", "weights", "inputs", "outputs"):
        if plain.get(key) is not None:
            yield key, plain[key], form
    for op, rules in (plain.get("ops") or {}).items():
        for i, own in enumerate(rules):
            for key in ("data_format", "weight_format"):
                if isinstance(own, dict) and own.get(key) is not None:
                    yield f"ops.{op}.{i}.{key}", own[key], form
            yield f"ops.{op}.{i}", own, rule


def _raises(adapter: TypeAdapter[Any], part: Any) -> bool:
    try:
        adapter.validate_python(part)
    except ConfigError:
        return True
    except ValidationError:
        return False  # another error, which would have come first
    return False


def malformed(exc: ValidationError, origin: str, classes: Iterable[Any]) -> ConfigError:
    """The first thing that pydantic found, with what was meant where that can be guessed."""
    problem = exc.errors(include_url=False)[0]
    key = str(problem["loc"][-1]) if problem["loc"] else ""
    hint = None
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        hint = _nearest(key, [f.name for c in classes for f in fields(c)])
    elif problem["type"] == "literal_error":
        names = str(problem.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(str(problem.get("input")), names, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]!r}?" if close else None
    missing = problem["type"].startswith("missing")
    return ConfigError(
        f"invalid backend spec: {problem['msg']}",
        node=origin,
        value=".".join(str(part) for part in problem["loc"]),
        found="nothing" if missing else repr(problem.get("input"))[:120],
        hint=hint,
    )
