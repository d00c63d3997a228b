"""foldline: prune, fold, quantize and lower PyTorch and ONNX models by knowing where every tensor index flows.

The names below are the whole public face; passes live in :mod:`foldline.passes`. Everything is loaded when first
used, so that ``import foldline`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .graph.errors import (
    BackendError,
    ConfigError,
    ConstraintError,
    FoldlineError,
    ModelFileError,
    TraceError,
    UnsupportedOp,
    VerificationError,
)
from .graph.version import VERSION
from .passes.backend import set_resolver

if TYPE_CHECKING:
    from .backends.check import check
    from .backends.fix import fix
    from .graph.actions import Plan, apply_plan
    from .graph.cost import cost
    from .graph.execute import run_graph
    from .graph.fx.pruned import load_pruned
    from .graph.groups import axis_groups
    from .graph.ir import Graph
    from .graph.load import load
    from .graph.save import save
    from .graph.verify import compare
    from .passes.checks import verify
    from .passes.pipeline import Pipeline
    from .passes.prune.session import PruneSession
    from .passes.report import Report
    from .passes.result import Result
    from .passes.targets import bytes, latency, macs, params

__version__ = VERSION


def _backend(name: str) -> Any:
    return importlib.import_module(".backends.base", __name__).get(name)


set_resolver(_backend)

_HOME = {
    "Graph": ".graph.ir",
    "Pipeline": ".passes.pipeline",
    "Plan": ".graph.actions",
    "PruneSession": ".passes.prune.session",
    "Report": ".passes.report",
    "Result": ".passes.result",
    "apply_plan": ".graph.actions",
    "axis_groups": ".graph.groups",
    "bytes": ".passes.targets",
    "check": ".backends.check",
    "compare": ".graph.verify",
    "cost": ".graph.cost",
    "fix": ".backends.fix",
    "latency": ".passes.targets",
    "load": ".graph.load",
    "load_pruned": ".graph.fx.pruned",
    "macs": ".passes.targets",
    "params": ".passes.targets",
    "run_graph": ".graph.execute",
    "save": ".graph.save",
    "verify": ".passes.checks",
}

__all__ = [
    "BackendError",
    "ConfigError",
    "ConstraintError",
    "FoldlineError",
    "Graph",
    "ModelFileError",
    "Pipeline",
    "Plan",
    "PruneSession",
    "Report",
    "Result",
    "TraceError",
    "UnsupportedOp",
    "VerificationError",
    "apply_plan",
    "axis_groups",
    "bytes",
    "check",
    "compare",
    "cost",
    "fix",
    "latency",
    "load",
    "load_pruned",
    "macs",
    "params",
    "run_graph",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
