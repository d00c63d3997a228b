"""A rule of `fl.check` as data: identifier, consequence, words, fix, and the function that finds where it fires."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..base import Diagnostic
from .onnx_file import OnnxFile

Consequence = Literal["error", "silently wrong", "inaccurate", "slow"]

SEVERITY: dict[str, Literal["error", "warning"]] = {
    "error": "error",
    "silently wrong": "error",
    "inaccurate": "warning",
    "slow": "warning",
}


@dataclass(frozen=True)
class Where:
    """What a rule is asked about: the file, and what is known of the target beyond its name.

    Attributes:
        file: the ONNX file.
        options: facts of the target such as ``compute_capability`` or ``vnni``; each rule reads those it needs.
    """

    file: OnnxFile
    options: dict[str, Any] = field(default_factory=dict)


Hit = tuple[str, str]
"""Name of the node (or "") and what is found there, in words that finish the rule's sentence."""

Finder = Callable[[Where], Iterable[Hit]]


@dataclass(frozen=True)
class Rule:
    """One thing that a target refuses, computes wrongly, or runs badly.

    Attributes:
        id: short stable name, unique within a target.
        consequence: ``error`` (refused, or the tool crashes), ``silently wrong`` (other numbers than the file's,
            without a word), ``inaccurate`` (as the file says, at a needless loss), ``slow`` (float, or a slow kernel).
        text: what is wrong and what the target makes of it; one sentence, for the table in docs/check.md.
        fix: what to do about it.
        find: yields a pair (node name, details) for every place where the rule fires.
        repair: name of the repair of ``fl.fix`` that removes it, or "" where there is none.
        severity: ``info`` for what is only worth knowing; else by the consequence.
    """

    id: str
    consequence: Consequence
    text: str
    fix: str
    find: Finder = field(repr=False)
    repair: str = ""
    severity: Literal["error", "warning", "info"] | None = None

    def run(self, where: Where) -> Iterator[Diagnostic]:
        """Diagnostics of this rule on one file."""
        for node, details in self.find(where):
            message = f"{self.text}: {details}" if details else self.text
            severity = self.severity or SEVERITY[self.consequence]
            yield Diagnostic(self.id, severity, node, message, self.fix, self.consequence)


def run_rules(rules: Sequence[Rule], where: Where) -> list[Diagnostic]:
    """Every rule on one file, in the order of the rules."""
    return [found for rule in rules for found in rule.run(where)]


def markdown(rules: Sequence[Rule]) -> str:
    """The rules as a markdown table; docs/check.md holds it and a test compares."""
    lines = ["| rule | consequence | what | fix | `fl.fix` |", "|---|---|---|---|---|"]
    lines += [f"| `{r.id}` | {r.consequence} | {r.text} | {r.fix} | {r.repair or '-'} |" for r in rules]
    return "\n".join(lines) + "\n"
