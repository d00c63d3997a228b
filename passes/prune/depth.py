"""DropBlocks: take whole residual blocks or layers out of the network, the least important first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from ...graph.cost import cost
from ...graph.errors import ConfigError, ConstraintError
from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Needs, Outcome, Pass, nearest
from ..targets import Target
from .blocks import Block, Reach, drop, layers, residual_blocks
from .candidates import matches_name, unmatched
from .depth_scores import Ranking, rank
from .reach import TOLERANCE

Criterion = Literal["influence", "output", "magnitude", "random"]


def _known(criterion: Any) -> Any:
    if isinstance(criterion, str) and criterion not in get_args(Criterion):
        near = nearest(criterion, get_args(Criterion))
        raise ValueError(f"unknown criterion {criterion!r}" + (f": did you mean {near!r}?" if near else ""))
    return criterion


class DropBlocks(Pass):
    """Depth pruning: replace ``x + f(x)`` by ``x`` in the least important residual blocks.

    Blocks are found from the graph alone: sums one of whose operands is computed from the other, in which layers take
    part. Dropping a block whose branch gives zero leaves the function as it was; otherwise the branch's contribution
    is lost. Weights that only the branch used go; what others read of it (a position bias that later layers share)
    stays.

    "influence" is the block influence of "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect": one minus the cosine of a block's input and output.

    Raises:
        ConstraintError: there is no residual block, more are asked for than there are, an ignore pattern matches
            nothing, or the target cannot be reached.
    """

    name: ClassVar[str] = "drop_blocks"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.NOTHING
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    establishes: ClassVar[frozenset[str]] = frozenset({"pruned"})

    count: int | None = Field(None, ge=1)
    """Number of blocks to drop, or"""
    ratio: float | None = Field(None, gt=0, lt=1)
    """share of the blocks to drop, or"""
    target: Target | None = None
    """what is to remain: macs(0.7), params(0.7), bytes(1e6)."""
    unit: Literal["block", "layer"] = "block"
    """"block": single residual branches; "layer": the run of branches that repeats along the network (attention and
    MLP together), as configurations count layers."""
    criterion: Annotated[str | Callable[..., Any], AfterValidator(_known)] = "influence"
    """"influence" (1 - cosine of input and output), "output" (change of the network's output without the block),
    "magnitude" (mean absolute weight), "random", or a callable (block, graph) -> number; the lowest go first."""
    calibration: Any = None
    """Batches of model inputs (those of the run, if None; made-up ones, if there are none)."""
    samples: int = Field(64, ge=1)
    """Inputs that "influence" and "output" look at."""
    ignore: list[str] = Field(default_factory=list)
    """Patterns (fnmatch) of names of blocks, their nodes, weights or modules; such blocks stay."""

    @model_validator(mode="after")
    def _one_goal(self) -> DropBlocks:
        if sum(x is not None for x in (self.count, self.ratio, self.target)) != 1:
            raise ValueError("give exactly one of count, ratio and target")
        return self

    def prepare(self, ctx: Context) -> None:
        """A latency is no target here: blocks are too coarse to settle one."""
        if self.target is not None and self.target.metric == "latency":
            raise ConfigError(
                "blocks are dropped to a count, a ratio, MACs, parameters or bytes",
                node="target",
                value=str(self.target),
                hint="drop a count of blocks first, then P.Prune(target=fl.latency(...))",
            )

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        reach = Reach(graph)
        blocks = residual_blocks(graph, reach)
        if self.unit == "layer":
            blocks = layers(graph, blocks, reach)
        if not blocks:
            raise ConstraintError(
                "there is no residual block to drop",
                node=graph.name,
                expected="sums x + f(x) of equal shapes",
                hint="use P.Prune for networks without residual connections",
            )
        free = self._free(blocks)
        batches = ctx.calibration if self.calibration is None else self.calibration
        ranking = rank(graph, free, self.criterion, batches, self.samples, ctx)
        gone, details = self._choose(graph, blocks, ranking)
        before = len(graph.weights)
        decisions = [self._decision(b, ranking, b in gone) for b in blocks]
        erased = drop(graph, _pairs(gone))
        details["blocks"] = [
            {"name": b.name, "kept": b not in gone, "score": ranking.scores.get(b), "start": start, "stop": stop}
            for b, (start, stop) in zip(blocks, _names(blocks), strict=True)
        ]
        details.update(dropped=len(gone), of=len(blocks), nodes=erased, weights=before - len(graph.weights))
        return Outcome(decisions=decisions, details=details)

    def _free(self, blocks: list[Block]) -> list[Block]:
        unused = {p for p in self.ignore if not any(_hit(p, b) for b in blocks)}
        if unused:
            raise unmatched("an ignore pattern", "ignore", unused)
        return [b for b in blocks if not any(_hit(p, b) for p in self.ignore)]

    def _choose(self, graph: Graph, blocks: list[Block], ranking: Ranking) -> tuple[list[Block], dict[str, Any]]:
        order = ranking.order
        if self.target is None:
            wanted = self.count if self.count is not None else round((self.ratio or 0) * len(blocks))
            if not wanted or wanted > len(order):
                raise ConstraintError(
                    "that many blocks cannot be dropped" if wanted else "the ratio drops no block",
                    node="count" if self.count is not None else "ratio",
                    expected=f"1 to {len(order)} blocks",
                    found=wanted,
                    hint="ask for another number, or shorten `ignore`",
                )
            return order[:wanted], {"criterion": ranking.name}
        return self._reach(graph, order, self.target, ranking.name)

    def _reach(self, graph: Graph, order: list[Block], target: Target, name: str) -> tuple[list[Block], dict[str, Any]]:
        """The number of blocks whose removal comes closest to the target."""
        whole = target.of(cost(graph))
        wanted = target.amount(whole)
        costs: dict[int, float] = {0: whole}

        def left(count: int) -> float:
            if count not in costs:
                clone = graph.clone()
                drop(clone, _pairs(order[:count]))
                costs[count] = target.of(cost(clone))
            return costs[count]

        low, high = 0, len(order)
        if left(high) > wanted * (1 + TOLERANCE):
            raise ConstraintError(
                "the target cannot be reached by dropping blocks",
                node=str(target),
                expected=f"at most {wanted:,.0f} {target.metric}",
                found=f"{left(high):,.0f} left without any of {len(order)} blocks",
                hint="raise the target, shorten `ignore`, or prune widths too (P.Prune)",
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if left(middle) > wanted else (low, middle)
        count = min((low, high), key=lambda n: abs(left(n) - wanted))
        if count == 0:
            raise ConstraintError(
                "the target is nearer to the whole network than to one without its least important block",
                node=str(target),
                expected=f"{wanted:,.0f} {target.metric}",
                found=f"{left(1):,.0f} without it",
                hint="lower the target, or prune widths instead (P.Prune)",
            )
        facts = {"criterion": name, "target": str(target), "reached": left(count) / whole}
        return order[:count], facts

    def _decision(self, b: Block, ranking: Ranking, gone: bool) -> Decision:
        score = ranking.scores.get(b)
        data = {"weights": [w.name for w in b.weights], "score": score}
        if score is None:
            return Decision(b.name, "kept", "ignored by a pattern", data)
        place = sorted(ranking.scores.values()).index(score) + 1
        why = f"{ranking.name} of {score:.4g}, {place} of {len(ranking.scores)} from below"
        return Decision(b.name, "dropped" if gone else "kept", why, data)


def _names(blocks: list[Block]) -> list[tuple[str, str]]:
    return [(b.start.name, b.stop.name) for b in blocks]


def _pairs(blocks: list[Block]) -> list[tuple[str, str]]:
    """(start, stop) names, inner blocks before those that hold them and earlier ones before later ones."""
    return _names(sorted(blocks, key=lambda b: (len(b.body), b.name)))


def _hit(pattern: str, b: Block) -> bool:
    names = [b.name, *(n.name for n in b.body)]
    names += [a for w in b.weights for a in (w.name, *w.aliases)]
    names += [n.scope for n in b.body if n.scope]
    return any(matches_name(pattern, n) for n in names)
