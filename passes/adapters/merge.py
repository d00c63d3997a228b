"""MergeAdapter: adapters merged into the weights in float64, each checked against its base; and undone, bit for bit."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np

from ...graph.errors import ConfigError, ConstraintError
from ...graph.ir import Graph
from ..base import Context, Contract, Decision, Outcome, Pass
from ..result import Result
from .adapter import Adapter, Entry, base_hash, cast_once, merged_weight
from .insert import graph_of, module_of, run_pass
from .kinds import NotFoldable
from .peft import is_peft, load_peft

if TYPE_CHECKING:
    import torch
    from torch import nn

Originals = dict[str, "np.ndarray | None"]
"""Stored weights as they were; None for a bias that was not there."""

_merged: dict[str, set[str]] = {}
"""Fingerprint of an adapter -> hashes of the weights it has made in this process."""

_replaced: WeakKeyDictionary[Graph, Originals] = WeakKeyDictionary()
"""Graph of a merged module -> the tensors that the merge put aside, for the way back."""


class MergeAdapter(Pass):
    """Merge adapters into the weights they adapt: the model that comes out has neither their tensors nor their cost.

    Without ``adapter`` those in the ``nn.Module`` itself are merged, which preserves the function (EXACT); with one,
    it is merged into its base model, an ``nn.Module``, an ONNX file or a state dict (FRESH: it adds what was trained).
    W' is computed in float64 by the kind's formula and cast once. Base weights are recognised by hash.

    Raises:
        NotFoldable: an adapter that is no linear function of its target's input (bottleneck, prefix, dynamic gate).
        ConstraintError: another base, merged already, no such weight, shapes that do not fit, or values that are not
            finite in the weight's dtype.
    """

    name: ClassVar[str] = "merge_adapter"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"adapters"})

    adapter: Any = None
    """An ``Adapter``, the path of a file that ``Adapter.save`` wrote or of a directory that peft's ``save_pretrained``
    wrote; None: the adapters in the model."""
    any_base: bool = False
    """Merge although the base's hash is another (a base that was cast, or fine-tuned further)."""

    def promise(self) -> Contract:
        return Contract.EXACT if self.adapter is None else Contract.FRESH

    def prepare(self, ctx: Context) -> None:
        """The adapter can be read and merged."""
        if is_peft(self.adapter):
            load_peft(self.adapter).check()
        elif self.adapter is not None:
            for entry in self._given().entries:
                check_foldable(entry)

    def _given(self, base: Any = None) -> Adapter:
        if isinstance(self.adapter, Adapter):
            return self.adapter
        if is_peft(self.adapter):
            return load_peft(self.adapter).bind(base)
        if isinstance(self.adapter, (str, Path)):
            return Adapter.load(self.adapter)
        raise ConfigError(
            "not an adapter",
            node="adapter",
            expected="an Adapter or the path of one",
            found=type(self.adapter).__name__,
        )

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        given = None if self.adapter is None else self._given(graph)
        if graph.kind == "onnx" or isinstance(getattr(graph, "source", None), Mapping):
            if given is None:
                raise ConstraintError(
                    "a graph holds its adapters as nodes, not as data", hint="P.Fold merges parallel linear branches"
                )
            from .merge_graph import merge_into_graph

            changed = merge_into_graph(graph, given, self.any_base)
            return Outcome(decisions=_decisions(changed), details={"merged": len(changed)})
        module = module_of(graph)
        changed, originals = merge_into_module(module, given, self.any_base)
        details = {"merged": len(changed)}
        made = graph_of(module, graph, ctx)
        if graph.kind != "weights":  # the module may share its tensors with the caller's
            originals = {name: None if data is None else data.copy() for name, data in originals.items()}
        _replaced[made] = originals
        return Outcome(decisions=_decisions(changed), details=details, graph=made)


def _decisions(changed: Mapping[str, list[Entry]]) -> list[Decision]:
    return [
        Decision(name, "merged", f"{', '.join(e.kind for e in entries)} in float64, cast once")
        for name, entries in changed.items()
    ]


def check_foldable(entry: Entry) -> None:
    """Raises NotFoldable, naming the target, for an entry that is no function of the weight."""
    kind = entry.definition()
    if not kind.foldable:
        raise NotFoldable(kind, entry.target)
    if kind.checked is not None:
        kind.checked(entry.tensors, entry.options)


# ---- the arithmetic -------------------------------------------------------------------------------------------------
def merged(
    target: str,
    entries: list[Entry],
    weight: np.ndarray,
    bias: np.ndarray | None,
    fingerprint: str,
    any_base: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The stored weight and bias with all entries merged, in their own dtypes.

    Raises:
        ConstraintError: another base, merged already, or not finite in the dtype.
    """
    known = _merged.get(fingerprint)
    if known and _content(weight) in known:
        raise ConstraintError(
            "this adapter has been merged into this weight already", node=target, hint="unmerge first"
        )
    for entry in entries:
        check_foldable(entry)
        if entry.base is None or any_base:
            continue
        found = base_hash(weight, bias if entry.definition().bias is not None else None)
        if found != entry.base:
            raise ConstraintError(
                "the adapter belongs to another base weight (or has been merged into this one already)",
                node=target,
                expected=f"hash {entry.base[:16]}",
                found=f"hash {found[:16]}",
                hint="load the base that it was trained on; any_base=True merges all the same",
            )
    new, offset = weight, bias
    for entry in entries:
        new, offset = merged_weight(new, offset, entry)
    done = cast_once(np.asarray(new, dtype=np.float64), weight.dtype, target)
    like = weight.dtype if bias is None else bias.dtype
    moved = None if offset is None else cast_once(np.asarray(offset, dtype=np.float64), like, target)
    if not _equal(done, weight):
        _merged.setdefault(fingerprint, set()).add(_content(done))
    return done, moved


_BLOCK = 4096
"""Words whose sums are hashed in place of them."""


def _content(data: np.ndarray) -> str:
    """A key of a tensor's bits for this process alone: SHA-256 of sums over its words' rows and columns.

    Several times as fast as hashing every byte, and no two tensors of training share it by accident; what is stored in
    files is :func:`base_hash`.
    """
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    rows = raw.size // (8 * _BLOCK)
    words = raw[: rows * 8 * _BLOCK].view(np.uint64).reshape(rows, _BLOCK)
    digest = hashlib.sha256(f"{data.dtype.name} {data.shape} ".encode())
    digest.update(words.sum(axis=0).data)
    digest.update(words.sum(axis=1).data)
    digest.update(raw[rows * 8 * _BLOCK :].data)
    return digest.hexdigest()


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """``np.array_equal``, which mostly is settled by the first elements."""
    few = slice(0, 1024)
    return np.array_equal(a.reshape(-1)[few], b.reshape(-1)[few]) and np.array_equal(a, b)


def bias_name(entries: list[Entry]) -> str | None:
    """The stored bias that the entries concern, if any does."""
    return next((e.bias for e in entries if e.bias is not None), None)


def merge_into_module(
    module: nn.Module, adapter: Adapter | None, any_base: bool
) -> tuple[dict[str, list[Entry]], Originals]:
    """Merge into the module itself (give a copy); its own adapters if ``adapter`` is None, which are taken off.

    Returns the entries by target, and what was replaced: the very tensors that the module held.
    """
    import torch

    from ...graph.fx.tensors import to_numpy
    from .attach import adapted_layers, adapter_of, detach

    own = adapter is None
    given = adapter_of(module) if adapter is None else adapter
    if not own and any(True for _ in adapted_layers(module)):
        raise ConstraintError("the model has adapters of its own", hint="merge those first: merge_adapter(model)")
    fingerprint = given.fingerprint()
    for entry in given.entries:
        check_foldable(entry)
    work: list[tuple[torch.nn.Module, str, np.ndarray | None]] = []
    originals: Originals = {}
    for target, entries in given.targets().items():
        layer, leaf = _holder(module, target)
        stored, name = layer._parameters[leaf], bias_name(entries)
        assert stored is not None
        offset = None if name is None else layer._parameters.get(name.rpartition(".")[2])
        before = None if offset is None else to_numpy(offset)
        # a model's own adapters were hashed against these very weights a moment ago
        old = to_numpy(stored, target)
        w, b = merged(target, entries, old, before, fingerprint, any_base or own)
        work.append((layer, leaf, w))
        originals[target] = old
        if name is not None:
            originals[name] = before
            if b is not None:
                work.append((layer, name.rpartition(".")[2], b))
    for _, layer, _ in list(adapted_layers(module)):
        detach(layer)
    with torch.no_grad():
        for layer, leaf, data in work:
            _put(layer, leaf, data, _adopted)
    if own:
        for p in module.parameters():
            p.requires_grad_(p.is_floating_point())
    return given.targets(), originals


def _holder(module: nn.Module, target: str) -> tuple[nn.Module, str]:
    path, _, leaf = target.rpartition(".")
    try:
        layer = module.get_submodule(path)
    except AttributeError as exc:
        raise ConstraintError("the adapter's target is not in this model", node=target, found=str(exc)) from exc
    if layer._parameters.get(leaf) is None:
        expected = ", ".join(k for k, p in layer._parameters.items() if p is not None) or "no parameters"
        raise ConstraintError("the adapter's target is not in this model", node=target, expected=expected, found=leaf)
    return layer, leaf


def _adopted(data: np.ndarray) -> torch.Tensor:
    """A tensor over an array that nobody else holds."""
    import torch

    from ...graph.fx.tensors import from_numpy

    if not (data.flags.c_contiguous and data.flags.writeable and data.flags.owndata) or data.dtype.kind != "f":
        return from_numpy(data)
    return torch.from_numpy(data)


def _put(layer: nn.Module, leaf: str, data: np.ndarray | None, from_numpy: Any) -> None:
    """Set the data of a parameter (the same object, so ties hold); make or remove it where that is what it takes."""
    from torch import nn

    stored = layer._parameters.get(leaf)
    if data is None:
        layer._parameters[leaf] = None
    elif stored is None:
        like = next(p for p in layer._parameters.values() if p is not None)
        layer._parameters[leaf] = nn.Parameter(from_numpy(data).to(like.device))
    else:
        stored.data = from_numpy(data).to(stored.device)


# ---- as functions ---------------------------------------------------------------------------------------------------
@dataclass
class MergeResult(Result):
    """A :class:`Result` that can be undone.

    Attributes:
        originals: stored weights as they were before, by name; None for a bias that was not there.
    """

    originals: Originals = field(default_factory=dict)

    def unmerge(self) -> Any:
        """The base model: a copy of the merged one with the stored originals put back, bit for bit."""
        return unmerge_adapter(self.model, self.originals)

    def save_originals(self, path: str | Path) -> Path:
        """Write the originals as safetensors; ``unmerge_adapter(model, path)`` reads them."""
        return save_originals(self.originals, path)


def merge_adapter(
    model: Any,
    adapter: Any = None,
    example_inputs: Any = None,
    *,
    any_base: bool = False,
    verify: bool = True,
    inplace: bool = False,
) -> MergeResult:
    """Merge adapters into weights; see :class:`MergeAdapter`.

    Args:
        model: an ``nn.Module`` (with adapters in it, or the base of ``adapter``), ONNX, or a state dict.
        adapter: an ``Adapter``, the path of one, or None for those in the module.
        example_inputs: for a module, to have the merge verified on the captured graph; none are needed.

    Returns:
        ``result.model``, and ``result.unmerge()`` for the way back.
    """
    from ..inplace import is_module

    step = MergeAdapter(adapter=adapter, any_base=any_base)
    originals = {} if is_module(model) else _originals(model, step)
    result = run_pass(step, model, example_inputs, verify=verify, inplace=inplace)
    made = {key: getattr(result, key) for key in ("model", "graph", "report", "pipeline", "plan", "artifact")}
    return MergeResult(**made, originals=_replaced.pop(result.graph, originals))


def _originals(model: Any, step: MergeAdapter) -> Originals:
    """Copies of what the merge will replace in an ONNX model or a state dict, from the model as it came in."""
    from ...graph.load import load
    from .merge_graph import replaced
    from .weights_graph import WeightsGraph

    adapter = None if step.adapter is None else step._given(model)
    if adapter is None:
        return {}
    return replaced(WeightsGraph(model) if isinstance(model, Mapping) else load(model), adapter)


def unmerge_adapter(model: Any, originals: Originals | str | Path) -> Any:
    """A copy of a merged model with the stored originals put back, bit for bit (never by subtraction).

    Args:
        model: what ``merge_adapter`` gave: ``nn.Module``, ONNX, or a state dict.
        originals: ``MergeResult.originals``, or the path of a file that ``save_originals`` wrote.
    """
    from ..inplace import is_module

    stored = load_originals(originals) if isinstance(originals, (str, Path)) else originals
    if is_module(model):
        from ...graph.fx.tensors import from_numpy

        twin = copy.deepcopy(model)
        for name, data in stored.items():
            path, _, leaf = name.rpartition(".")
            _put(twin.get_submodule(path), leaf, data, from_numpy)
        return twin
    from ...graph.load import load
    from .weights_graph import WeightsGraph

    if isinstance(model, Mapping):
        model = {k: v for k, v in model.items() if stored.get(k, v) is not None}
    graph = WeightsGraph(model) if isinstance(model, Mapping) else load(model).clone()
    for name, data in stored.items():
        if data is not None:
            graph.set_weight(graph.weight(name), data)
    return graph.to_model()


def save_originals(originals: Originals, path: str | Path) -> Path:
    """Write stored originals as safetensors."""
    import json

    from safetensors.numpy import save_file

    kept = {k: np.ascontiguousarray(v) for k, v in originals.items() if v is not None}
    save_file(kept, path, metadata={"absent": json.dumps([k for k, v in originals.items() if v is None])})
    return Path(path)


def load_originals(path: str | Path) -> Originals:
    """Read what :func:`save_originals` wrote."""
    import json

    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        found: Originals = {key: file.get_tensor(key) for key in file.keys()}
        found.update(dict.fromkeys(json.loads((file.metadata() or {}).get("absent", "[]"))))
    return found
