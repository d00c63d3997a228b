"""ReplaceBlock: one linear map, fitted by least squares, in the place of a run of residual blocks or layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from ...graph.errors import ConstraintError
from ...graph.execute import batches_of, run_graph
from ...graph.ir import Graph, Value
from ..base import Context, Contract, Decision, Needs, Outcome, Pass
from ..prune.blocks import Block, Reach, drop, layers, residual_blocks

if TYPE_CHECKING:
    from .solve import Normal, Solution

Ridge = float | Literal["auto"]


class ReplaceBlock(Pass):
    """Replace blocks ``first .. last`` of the residual stream by ``y = A x + b``, fitted to what they gave.

    ``(A, b) = argmin |y - A x - b|^2 + ridge |A - I|^2`` over all positions of the calibration data, in closed form on
    streaming Gram matrices: where the data says nothing the stream passes on as it is, which is what P.DropBlocks
    does. Exact (to rounding) where the blocks are affine in the stream; otherwise the best map of its kind. Maps of
    adjacent runs compose: P.Fold merges ``A2 (A1 x)`` into one. From a block to the last one it is an early exit.
    Source: "Jump to Conclusions: Short-Cutting Transformers With Linear Transformations" (without its own bias: 0).

    The channels are the last axis, or axis 1 of feature maps of convolutions, which get a 1x1 convolution. Weights
    that only the blocks used go.

    Memory: 32 C^2 bytes for C channels, and one batch's activations.

    Raises:
        ConstraintError: there is no such run of blocks on one stream, its ends differ in shape, or no data came.
    """

    name: ClassVar[str] = "replace_block"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    first: int = Field(ge=0)
    """Position of the first block that is replaced, from 0."""
    last: int | None = Field(None, ge=0)
    """Position of the last one, inclusive; None: the first alone."""
    unit: Literal["block", "layer"] = "layer"
    """"block": single residual branches (attention or MLP alone); "layer": the run of branches that repeats."""
    bias: bool = True
    """Fit b too."""
    ridge: Ridge = "auto"
    """Relative to the mean diagonal of the Gram matrix; "auto": what does best on samples left out."""
    calibration: Any = Field(default=None, exclude=True, repr=False)
    """Batches of typical inputs; the run's own when absent."""

    @field_validator("ridge")
    @classmethod
    def _positive(cls, value: Ridge) -> Ridge:
        if value != "auto" and value < 0:
            raise ValueError("a ridge is not negative")
        return value

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        import torch  # listing the passes must not wait for it

        from .solve import solve

        run = self._run(graph)
        start, stop = run[0].start, run[-1].stop
        axis = _channel_axis(graph, run)
        folds = _moments(graph, self.batches(ctx), start, stop, axis, ctx)
        eye = torch.eye(folds[0].x.shape[1], dtype=torch.float64)[None]
        found = solve(folds, eye, self.ridge, self.bias)
        scope, name = run[0].join.scope, f"{run[0].name}_linear"
        self._insert(graph, found, start, stop, axis, name, scope)
        before = len(graph.weights)
        erased = drop(graph, [(graph.node(name).output.name, stop.name)])
        data = {
            "blocks": [b.name for b in run], "channels": eye.shape[1], "rows": sum(f.rows for f in folds),
            "error_dropped": found.before, "error": found.after, "ridge": found.ridge, "nodes": erased,
            "weights": before - len(graph.weights),
        }  # fmt: skip
        reason = f"{len(run)} of the stream's blocks became one product; relative error {found.after:.3g}, "
        reason += f"{found.before:.3g} where they are dropped"
        return Outcome(decisions=[Decision(b.name, "replaced", reason, data) for b in run], details=data)

    def _run(self, graph: Graph) -> list[Block]:
        reach = Reach(graph)
        blocks = residual_blocks(graph, reach)
        if self.unit == "layer":
            blocks = layers(graph, blocks, reach)
        else:
            inner = {id(n) for b in blocks for n in b.body if n is not b.join}
            blocks = [b for b in blocks if id(b.join) not in inner]
        last = self.first if self.last is None else self.last
        if not self.first <= last < len(blocks):
            raise ConstraintError(
                "there is no such run of residual blocks", node=graph.name, value=f"{self.first} .. {last}",
                expected=f"positions 0 .. {len(blocks) - 1} in order", found=f"{len(blocks)} of unit {self.unit!r}",
            )  # fmt: skip
        run = blocks[self.first : last + 1]
        start, stop = run[0].start, run[-1].stop
        if not reach.depends(stop, start) or start.hint is None or start.hint != stop.hint:
            raise ConstraintError(
                "the blocks are no run on one stream", node=run[-1].name, value=f"{start.name} .. {stop.name}",
                expected=f"a value of shape {start.hint} computed from {start.name}", found=str(stop.hint),
                hint="a stage that changes the shape cannot be replaced; choose blocks of one stage",
            )  # fmt: skip
        if start.dtype != "float32" and start.dtype != "float64":
            raise ConstraintError("only streams in full precision are fitted", value=start.name, found=start.dtype)
        return run

    def _insert(
        self, graph: Graph, found: Solution, start: Value, stop: Value, axis: int, name: str, scope: str
    ) -> None:
        dtype = np.dtype(start.dtype)
        matrix = found.matrix[0].numpy().astype(dtype)
        conv = axis == 1 and start.rank == 4
        stored = [graph.add_weight(f"{name}.weight", matrix[:, :, None, None] if conv else matrix, trainable=True)]
        if self.bias:
            stored.append(graph.add_weight(f"{name}.bias", found.shift[0].numpy().astype(dtype), trainable=True))
        attrs: dict[str, Any] = {}
        if conv:
            attrs = {
                "stride": [1, 1], "padding": [(0, 0), (0, 0)], "dilation": [1, 1], "groups": 1, "transposed": False,
                "output_padding": [0, 0],
            }  # fmt: skip
        graph.insert(
            "conv" if conv else "linear", [start, *stored], attrs, name=name, after=start.producer, scope=scope
        )


def _channel_axis(graph: Graph, run: list[Block]) -> int:
    """Where the channels lie: the last axis of rows and tokens, axis 1 where the blocks convolve feature maps."""
    rank = run[0].start.rank or 0
    dense = any(n.op in ("linear", "matmul") for b in run for n in b.body)
    return 1 if rank == 4 and not dense and any(n.op == "conv" for b in run for n in b.body) else rank - 1


def _moments(graph: Graph, batches: Any, start: Value, stop: Value, axis: int, ctx: Context) -> list[Normal]:
    """Normal equations of what goes in and comes out, in two lots of whole samples, taken in turn."""
    import torch

    from .solve import Normal

    assert start.hint is not None
    channels = start.hint[axis]
    folds = [Normal(1, channels, channels), Normal(1, channels, channels)]
    seen = 0
    for arrays in batches_of(graph, ctx.progress(batches, "fitting")):
        tapped = run_graph(graph, arrays, [v.name for v in (start, stop) if not v.is_input])[1]
        x, y = (np.asarray(arrays[v.name] if v.is_input else tapped[v.name]) for v in (start, stop))
        for k, fold in enumerate(folds):
            lot = slice((seen + k) % 2, None, 2)
            fold.update(*(torch.from_numpy(_rows(a[lot], axis)) for a in (x, y)))
        seen += len(x)
    if not seen:
        raise ConstraintError("the calibration data is empty", value=start.name, expected="at least one batch")
    return folds


def _rows(x: np.ndarray, axis: int) -> np.ndarray:
    """float64 [1, positions, channels]."""
    return np.moveaxis(x, axis, -1).reshape(1, -1, x.shape[axis]).astype(np.float64)
