"""The pass Fold: everything that can be absorbed into the weights is, the graph is tidied, and the rest is refused."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...graph.garbage import undisturbed
from ...graph.ir import Graph
from ..base import Context, Contract, Needs, Outcome, Pass
from ..clean import CLEAN_RULES
from ..clean.whole import but_whole, tidy_after, tidy_before
from ..rewrite import Env, Log, Rule, rewrite
from ..rewrite.choice import chosen
from .affine_rules import AFFINE_RULES
from .constants import CONSTANT_RULES
from .linear_rules import LINEAR_RULES

WITHIN_CLASS = ("constant_subgraph", "fold_norm", "push_gain")
"""Rules whose rewrites a module's own class can express: layers get other weights, or become identities."""


FIRST = ("fold_norm", "fold_scale_shift", "push_gain", "merge_branches", "merge_chain", "merge_flattened")


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
    keep_class: bool = False
    """On an nn.Module, only what its own class can express: norms between layers, gains, parametrized weights. Implied
    by ``inplace=True``. Otherwise a fold that changes the program gives a GraphModule; tidying alone never does."""
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
        nodes = len(graph.nodes)
        before = tidy_before(graph, self.disable) if whole else []
        log = self._rewrite(graph, rules, ctx)
        after = tidy_after(graph, self.disable) if whole else []
        if log.applied or before or after:
            graph.refresh()
        decisions = [*log.decisions, *before, *after]
        decisions.sort(key=lambda d: d.data.get("rule") not in FIRST)  # what a reader looks for comes first
        counts = {name: sum(d.action == name for d in decisions) for name in ("folded", "refused", "stored")}
        made = len(log.applied) + len(before) + len(after)
        return Outcome(decisions=decisions, details={**counts, "rewrites": made, "nodes": [nodes, len(graph.nodes)]})

    def _rewrite(self, graph: Graph, rules: list[Rule], ctx: Context) -> Log:
        """All rules at once; on a module of the user's the ones first that leave its program alone."""
        windows = self.verify == "window"
        if not graph.user_class or self.rules is not None:
            return rewrite(graph, rules, Env(graph, ctx, windows=windows))
        within = Env(graph, ctx, windows=windows, layers_only=True)
        log = rewrite(graph, [r for r in rules if r.name in WITHIN_CLASS], within)
        if self.keep_class or ctx.inplace:
            return log
        tidying = {type(rule) for rule in CLEAN_RULES}
        more = rewrite(graph, [r for r in rules if type(r) not in tidying], Env(graph, ctx, windows=windows))
        log.refused = more.refused
        log.applied += more.applied
        if more.applied and len(more.applied) > sum(d.data["rule"] in WITHIN_CLASS for d in more.applied):
            last = rewrite(graph, rules, Env(graph, ctx, windows=windows))  # the program is another one anyway
            log.refused = last.refused
            log.applied += last.applied
        return log


def fold_rules() -> list[Rule]:
    """All rules of the fold family, in the order in which they are tried at a node."""
    return [*CONSTANT_RULES, *AFFINE_RULES, *LINEAR_RULES]
