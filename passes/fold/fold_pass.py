"""The pass Fold: everything that can be absorbed into the weights is, the graph is tidied, and the rest is refused."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...graph.garbage import undisturbed
from ...graph.ir import Graph
from ..base import Context, Contract, Needs, Outcome, Pass
from ..clean import CLEAN_RULES
from ..clean.whole import but_whole, tidy_after, tidy_before
from ..rewrite import Env, Rule, rewrite
from ..rewrite.choice import chosen
from .affine_rules import AFFINE_RULES
from .constants import CONSTANT_RULES
from .linear_rules import LINEAR_RULES


class Fold(Pass):
    """Fold everything constant into the weights: norms, scales, branches, chains, parametrizations; then tidy up.

    One engine call runs all rules to their fixed point: constants, affine maps (batch norms and other scales and
    shifts) into the linear operators before or behind them, chains and branches of linear operators, and (unless
    ``clean=False``) the rules of the pass ``clean``. All arithmetic is float64, cast once to the stored dtype. What
    would be wrong is refused, with the reason: a second consumer, a graph output in between, training mode, a tied
    weight, a statistic or bias computed at run time, a zero-padded border under a shift, an operator in between that
    does not commute, a result that does not fit its dtype. Each rule states its identity, conditions and refusals.
    """

    name: ClassVar[str] = "fold"
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"folded"})

    clean: bool = True
    """Also run the clean-up rules (constant folding, identities, common subexpressions, ...)."""
    verify: Literal["window", "model", "off"] = "model"
    """What is checked: "model" compares the whole model before and after; "window" also runs every rewrite alone, on a
    small graph cut out round it, and leaves it undone where the numbers differ; "off" checks nothing."""
    rules: list[str] | None = None
    """Only the rules of these names; all if None."""
    disable: list[str] = []
    """Names of rules not to run."""

    def prepare(self, ctx: Context) -> None:
        """Every name in ``rules`` and ``disable`` must be a rule's."""
        chosen(self.described_rules(), self.rules, but_whole(self.disable), self.name)

    def verified(self) -> bool:
        """Not under ``verify="off"``."""
        return self.verify != "off"

    def described_rules(self) -> list[Rule]:
        """The rules it runs under these options, in the order in which they are tried at a node."""
        return [*fold_rules(), *(CLEAN_RULES if self.clean else [])]

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        """Fold what can be folded, to a fixed point; the graph's function stays the same to float tolerance."""
        with undisturbed():
            return self._apply(graph, ctx)

    def _apply(self, graph: Graph, ctx: Context) -> Outcome:
        rules = chosen(self.described_rules(), self.rules, but_whole(self.disable), self.name)
        whole = self.clean and self.rules is None
        before = tidy_before(graph, self.disable) if whole else []
        log = rewrite(graph, rules, Env(graph, ctx, windows=self.verify == "window"))
        after = tidy_after(graph, self.disable) if whole else []
        if log.applied or before or after:
            graph.refresh()
        decisions = [*before, *log.decisions, *after]
        counts = {name: sum(d.action == name for d in decisions) for name in ("folded", "refused", "stored")}
        return Outcome(decisions=decisions, details={**counts, "rewrites": len(log.applied) + len(before) + len(after)})


def fold_rules() -> list[Rule]:
    """All rules of the fold family, in the order in which they are tried at a node."""
    return [*CONSTANT_RULES, *AFFINE_RULES, *LINEAR_RULES]
