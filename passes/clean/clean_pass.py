"""The pass Clean: what a user expects of a graph optimizer, run to a fixed point, without changing one number."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...graph.garbage import undisturbed
from ...graph.ir import Graph
from ..base import Context, Contract, Needs, Outcome, Pass
from ..rewrite import Env, Rule, rewrite
from ..rewrite.choice import chosen
from . import CLEAN_RULES
from .whole import but_whole, tidy_after, tidy_before


class Clean(Pass):
    """Tidy the graph: constants, sizes, dead code, common subexpressions, identities and inverse pairs.

    One call reaches the fixed point. What the user knows stays as it is: graph inputs and outputs, initializers that a
    caller can override, metadata, opset, random operators, nodes in training mode. Each rule states its identity, its
    conditions and its refusals; every rewrite is in the report with the nodes it touched.
    """

    name: ClassVar[str] = "clean"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.NOTHING

    verify: Literal["window", "model", "off"] = "model"
    """What is checked: "model" compares the whole model before and after; "window" also runs every rewrite alone, on a
    small graph cut out round it, and leaves it undone where the numbers differ; "off" checks nothing."""
    rules: list[str] | None = None
    """Only the rules of these names; all if None."""
    disable: list[str] = []
    """Names of rules not to run."""

    def described_rules(self) -> list[Rule]:
        """The rules it runs, in the order in which they are tried at a node."""
        return list(CLEAN_RULES)

    def prepare(self, ctx: Context) -> None:
        """Every name in ``rules`` and ``disable`` must be a rule's."""
        chosen(CLEAN_RULES, self.rules, but_whole(self.disable), self.name)

    def verified(self) -> bool:
        """Not under ``verify="off"``."""
        return self.verify != "off"

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Run the clean-up rules to their fixed point."""
        with undisturbed():
            return self._apply(graph, ctx)

    def _apply(self, graph: Graph, ctx: Context) -> Outcome:
        rules = chosen(CLEAN_RULES, self.rules, but_whole(self.disable), self.name)
        whole = self.rules is None
        before = tidy_before(graph, self.disable) if whole else []
        log = rewrite(graph, rules, Env(graph, ctx, windows=self.verify == "window"))
        after = tidy_after(graph, self.disable) if whole else []
        if log.applied or before or after:
            graph.refresh()
        details = {"rewritten": len(log.applied) + len(before) + len(after), "refused": len(log.refused)}
        return Outcome(decisions=[*log.decisions, *before, *after], details=details)
