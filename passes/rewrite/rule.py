"""What a rewrite rule is: where it looks, what it finds, and the typed reason where it refuses."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from ...graph.ir import Graph, Node, Value
from ..base import Context

ANY = "*"
"""In ``Rule.ops``: the rule looks at every node, whatever its op."""


class Why(StrEnum):
    """Kinds of reasons for which a rewrite does not happen."""

    SECOND_CONSUMER = "second consumer"
    GRAPH_OUTPUT = "graph output"
    GRAPH_INPUT = "graph input"
    CAPTURED = "read by a subgraph"
    NOT_CONSTANT = "not a constant"
    TIED = "tied weight"
    TRAINING = "training mode"
    BORDER = "padded border"
    SIGN = "sign"
    SHAPE = "shape"
    DTYPE = "dtype"
    RANGE = "does not fit the dtype"
    COMMUTE = "does not commute"
    SIZE = "size guard"
    RANDOM = "random"
    WINDOW = "window check failed"
    OTHER = "other"


@dataclass(frozen=True)
class Refusal:
    """Why a rewrite does not happen, as a value: the pass reports it instead of guessing.

    Attributes:
        reason: one sentence.
        node: name of the node in the way, where it is not the one to be rewritten.
        why: the kind of reason.
        data: numbers for the log.
    """

    reason: str
    node: str = ""
    why: Why = Why.OTHER
    data: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(eq=False)
class Rewrite:
    """A change that was found and not yet made.

    Attributes:
        nodes: the window: every node that it removes or changes, or whose weight it changes, the anchor included.
        apply: makes the change through the graph's edit methods; returns nodes it made or rewired, to be looked at
            again. Nodes that nobody reads afterwards are removed by the engine.
        action: one or two words in the past tense for the log (``"folded"``).
        reason: one sentence for the log.
        data: numbers for the log.
    """

    nodes: Sequence[Node]
    apply: Callable[[Graph], Sequence[Node] | None]
    action: str = "rewritten"
    reason: str = ""
    data: dict[str, Any] = field(default_factory=dict)


class Env:
    """What rules may ask about the graph while it is being rewritten.

    Attributes:
        graph: the graph being rewritten.
        ctx: the pass's context.
        windows: whether every rewrite is first checked alone, on a graph cut out round it.
        layers_only: whether only layers and weights may change, so that a user's class still expresses the program.
        memo: what rules found out about the graph; hints that a rewrite may make stale, never the ground of one.
    """

    def __init__(self, graph: Graph, ctx: Context, *, windows: bool = False, layers_only: bool = False) -> None:
        self.graph = graph
        self.ctx = ctx
        self.windows = windows
        self.layers_only = layers_only
        self.memo: dict[str, Any] = {}
        self.captured: set[int] = set()
        self._capturing: dict[Node, None] = {}
        self.look_again()

    def look_again(self) -> None:
        """Find out anew which values subgraphs read: some may be gone (a rule that adds any adds them here itself)."""
        self._capturing = dict.fromkeys(node for node in self.graph.nodes if node.captured)
        self.captured = {id(v) for node in self._capturing for v in node.captured}

    def follow(self, made: Iterable[Node]) -> None:
        """After a rewrite: what subgraphs read may have become another value, and ``made`` may hold subgraphs."""
        self._capturing.update((node, None) for node in made if node.captured)
        self.captured.update(id(v) for node in self._capturing for v in node.captured)

    def sole_reader(self, value: Value, reader: Node) -> Refusal | None:
        """Why ``value`` may not change under ``reader``: somebody besides it sees its numbers. None: nobody does."""
        if value.is_output:
            return Refusal(f"{value.name} is an output of the graph", why=Why.GRAPH_OUTPUT)
        if id(value) in self.captured:
            return Refusal(f"{value.name} is read by a subgraph", why=Why.CAPTURED)
        for user, _ in value.uses:
            if user is not reader and user.op != "shape_of":
                return Refusal(f"{value.name} has a second consumer, {user.name}", user.name, Why.SECOND_CONSUMER)
        return None


class Rule(abc.ABC):
    """One rewrite rule. Its docstring states the identity it relies on, its conditions and what it refuses.

    Class variables:
        name: how options, logs and the documentation call it.
        ops: canonical ops of the nodes at which it looks (the anchor); :data:`ANY` for every op.
    """

    name: ClassVar[str] = ""
    ops: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        """What can be done at ``node``; None where the rule has no business there (nothing is reported then)."""
