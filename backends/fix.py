"""fl.fix: the mechanical fixes for what fl.check finds in an ONNX file, on a copy, with their effect on its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..graph.errors import BackendError, ConfigError, FoldlineError
from ..graph.load import is_onnx_model
from .base import Diagnostic
from .check import check, is_onnx
from .rules.editor import Editor
from .rules.onnx_file import read
from .rules.validity import RULES as VALIDITY

STEPS = 60
"""A repair may uncover the next thing to repair; more steps than this would be a circle."""


@dataclass(frozen=True)
class FixStep:
    """One repair.

    Attributes:
        repair: its name, as the tables of rules have it.
        places: actions taken.
        before, after: number of diagnostics.
        sqnr_db: per output, after all repairs so far against the input file; empty where that was not measured.
    """

    repair: str
    places: int
    before: int
    after: int
    sqnr_db: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = f", {min(self.sqnr_db.values()):.1f} dB" if self.sqnr_db else ""
        places = "1 place" if self.places == 1 else f"{self.places} places"
        return f"{self.repair} ({places}): diagnostics {self.before} -> {self.after}{worst}"


@dataclass
class FixReport:
    """What was done, and what is left.

    Attributes:
        actions: (rule that fired or "", node, what was done), in order.
        before, after: diagnostics of the input and of the result.
        steps: what each repair did to the diagnostics and to the numbers.
        sqnr_db: per output, of the result against the input file, both computed as written (no fusion) on the same
            inputs; inf where they are equal. Empty where the input file does not run.
        note: why ``sqnr_db`` is empty.
    """

    actions: list[tuple[str, str, str]] = field(default_factory=list)
    before: list[Diagnostic] = field(default_factory=list)
    after: list[Diagnostic] = field(default_factory=list)
    steps: list[FixStep] = field(default_factory=list)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "actions": [list(a) for a in self.actions],
            "before": [d.to_dict() for d in self.before],
            "after": [d.to_dict() for d in self.after],
            "steps": [asdict(step) for step in self.steps],
            "sqnr_db": self.sqnr_db,
            "note": self.note,
        }

    def __str__(self) -> str:
        lines = [f"{what}: {node}" for _, node, what in self.actions] or ["nothing to do"]
        lines += [str(step) for step in self.steps]
        lines += [f"SQNR of {name}: {value:.1f} dB" for name, value in self.sqnr_db.items()]
        return "\n".join([*lines, *([self.note] if self.note else []), *(f"left: {d}" for d in self.after)])


class Fixed(NamedTuple):
    """The result of :func:`fix`: the model, and what was done to it."""

    model: Any
    report: FixReport


def _repairs() -> dict[str, Callable[[Editor, set[str]], None]]:
    """Repairs by name, in the order in which they are tried."""
    from .rules import repairs_numbers as numbers
    from .rules import repairs_places as places
    from .rules.repairs_qoperator import qdq

    return {
        "qdq": qdq,
        "dequantize_first": places.dequantize_first,
        "shapes": places.shapes,
        "float_bias": numbers.float_bias,
        "zero_points": numbers.zero_points,
        "int8": numbers.int8,
        "scalars": numbers.scalars,
        "per_tensor": numbers.per_tensor,
        "weight_axis": numbers.weight_axis_repair,
        "quantize_weights": numbers.quantize_weights,
        "strip_attention": places.strip,
        "strip_twice": places.strip_twice,
        "requantize": places.requantize,
        "share_scales": places.share_scales,
        "residual": places.residual,
        "strip_float": places.strip,
        "single_reader": places.single_reader,
        "uint8": numbers.uint8,
        "int32_bias": numbers.int32_bias,
        "bias_scale": numbers.int32_bias,
        "int8_weights": numbers.int8_weights,
    }


INVALID = frozenset(("onnx", "load", *(rule.id for rule in VALIDITY)))
"""What a repair may never leave behind: the repairs begin with a valid file."""
EXACT = frozenset(("qdq", "dequantize_first", "shapes", "float_bias", "zero_points", "scalars"))
"""Repairs that write the same numbers in another form, up to the rounding of a float addition."""


def fix(
    model: Any,
    target: str,
    example_inputs: Any = None,
    *,
    only: frozenset[str] | None = None,
    compare: bool = True,
    **options: Any,
) -> Fixed:
    """Apply the mechanical fixes of a target's rules until none applies.

    Args:
        model: an ONNX file, ``ModelProto`` or ``onnx_ir.Model``; it is not changed.
        target: name of the backend.
        example_inputs: one call's arguments for the numerical comparison; made up when None.
        only: names of the repairs to use; all when None.
        compare: measure the difference (runs both models once).
        options: of ``fl.check``.

    Returns:
        ``(model, report)``: the model as ``onnx_ir.Model``, or as a ``ModelProto`` where one came in. What has no
        mechanical fix is left, and listed in ``report.after``.

    Raises:
        ConfigError: the model is no ONNX model, or there is no such backend.
        BackendError: a fix made the model invalid (a fault of foldline; the input is untouched).
    """
    if not is_onnx(model):
        raise ConfigError(
            "fl.fix takes ONNX models", expected="a path, ModelProto or onnx_ir.Model", found=type(model).__name__
        )
    found = check(model, target, **options)
    report = FixReport(before=found)
    original = read(model)
    meter = _Meter(original, example_inputs) if compare else None
    editor = Editor(original.clone())
    repair_of = rules_of(target)
    repairs = {name: repair for name, repair in _repairs().items() if only is None or name in only}
    applied: set[tuple[str, str, str]] = set()
    for _ in range(STEPS):
        wanted = {d.rule: repair_of[d.rule] for d in found if repair_of.get(d.rule)}
        step = next((name for name in repairs if _fresh(name, wanted, found, applied)), None)
        if step is None:
            break
        chosen = [d for d in found if wanted.get(d.rule) == step]
        applied |= {(step, d.rule, d.node) for d in chosen}
        before = len(editor.done)
        repairs[step](editor, {d.node for d in chosen})
        editor.clean()
        report.actions += [(chosen[0].rule, node, what) for what, node in editor.done[before:]]
        told, found = len(found), _checked(editor, target, step, options)
        if len(editor.done) > before:
            measured = {} if meter is None else meter.against(editor.model)[0]
            report.steps.append(FixStep(step, len(editor.done) - before, told, len(found), measured))
    report.after = found
    if meter is not None:
        report.sqnr_db, report.note = meter.against(editor.model)
    return Fixed(_same_kind(editor.model, model), report)


def _fresh(name: str, wanted: dict[str, str], found: list[Diagnostic], applied: set[tuple[str, str, str]]) -> bool:
    """Whether a repair has something to do that it was not yet tried on."""
    return any(wanted.get(d.rule) == name and (name, d.rule, d.node) not in applied for d in found)


def _checked(editor: Editor, target: str, step: str, options: dict[str, Any]) -> list[Diagnostic]:
    found = check(editor.model, target, **options)
    broken = next((d for d in found if d.rule in INVALID), None)
    if broken is not None:
        raise BackendError("a fix made the model invalid", node=step, found=broken.message, hint="please report it")
    return found


def rules_of(target: str) -> dict[str, str]:
    """Rule -> repair of a target's rules; {} for targets without."""
    if target.startswith("tensorrt"):
        from .tensorrt.rules import RULES
    elif target.startswith("onnxruntime") and "cuda" not in target and "tensorrt" not in target:
        from .onnxruntime.rules import RULES
    else:
        return {}
    return {rule.id: rule.repair for rule in RULES if rule.repair}


def _same_kind(result: Any, given: Any) -> Any:
    import onnx_ir as ir

    proto = is_onnx_model(given) and not isinstance(given, ir.Model)
    return ir.serde.serialize_model(result) if proto else result


class _Meter:
    """SQNR per output against the input file, both as written in ONNX Runtime without its rewrites."""

    def __init__(self, original: Any, example_inputs: Any) -> None:
        from ..graph.execute import synthesize_inputs
        from ..graph.load import load
        from .onnxruntime.plain import run_plain

        self.note = ""
        try:
            graph = load(original)
            self.feeds = synthesize_inputs(graph) if example_inputs is None else graph.bind(example_inputs)
            self.first = run_plain(original, self.feeds)
        except FoldlineError as exc:
            self.note = f"not compared: {exc.message}"

    def against(self, fixed: Any) -> tuple[dict[str, float], str]:
        """The numbers, or none and why."""
        from ..passes.quantize.numerics import sqnr_db
        from .onnxruntime.plain import run_plain

        if self.note:
            return {}, self.note
        try:
            second = run_plain(fixed, self.feeds)
        except FoldlineError as exc:
            return {}, f"not compared: {exc.message}"
        found = {}
        for (name, a), (_, b) in zip(self.first.items(), second.items(), strict=True):
            equal = a.shape == b.shape and bool(np.array_equal(a, b))
            found[name] = float("inf") if equal else sqnr_db(a.astype(np.float64), b.astype(np.float64))
        return found, ""
