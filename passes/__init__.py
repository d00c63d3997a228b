"""What can be done to a model: passes as classes for pipelines (``P.Fold``) and as functions (``P.fold``)."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .adapters.adapter import Adapter
    from .adapters.attach import adapter_of
    from .adapters.insert import InsertAdapter, insert_adapter
    from .adapters.merge import MergeAdapter, merge_adapter, unmerge_adapter
    from .adapters.peft import load_peft
    from .base import Context, Contract, Decision, Needs, Outcome, Pass, as_function
    from .clean.clean_pass import Clean
    from .finetune import FineTune
    from .fold import Fold
    from .fold.parallel_linears import FuseParallelLinears
    from .lower import Lower
    from .pipeline import Pipeline
    from .prune import Prune
    from .prune.depth import DropBlocks
    from .prune.gate import InsertDynamicChannelGate, TopKFrequency, expected_macs
    from .prune.pat import FoldLinearOp, InsertLinearOp, SharedMask, identity_loss, mask_loss
    from .prune.regularize import Cut, absorb_removed, regularize
    from .prune.reinitialize import Reinitialize, compare_with_scratch
    from .prune.schedule import PruneIteratively
    from .prune.select_pass import Select
    from .quantize import Quantize
    from .quantize.archive import Archive, read_archive
    from .quantize.archive.compress_weights import CompressWeights
    from .quantize.archive.vq_weights import VQWeights
    from .quantize.cache import QuantizeCache
    from .quantize.correct.bias import BiasCorrection
    from .quantize.correct.bn_retune import BnRetune
    from .quantize.correct.calib_augment import CalibAugment
    from .quantize.correct.norm_tweak import NormTweak
    from .quantize.correct.pre_calibrate import PreCalibrate
    from .quantize.diagnose import Diagnose
    from .quantize.finetune_quantized import FinetuneQuantized
    from .quantize.keep_faster import KeepFaster
    from .quantize.qat.freeze_pass import FreezeQuantized
    from .quantize.qat.freezing import WeightFreezing
    from .quantize.qat.qat_pass import QuantizeAware
    from .quantize.sensitivity.sensitivity_pass import Sensitivity
    from .quantize.weight_only import WeightOnly
    from .recover import Recover
    from .recover.replace_block import ReplaceBlock
    from .registry import get, names
    from .reparam.bind import Bind
    from .reparam.insert import Reparametrize
    from .reparam.materialise import Materialise
    from .reparam.replace_norm import ReplaceNorm
    from .reparam.subspace import load_subspace, save_subspace
    from .report import Report
    from .result import Result
    from .transform.awq import AwqScale
    from .transform.collapse import perpendicular_gradients, softmax_collapse
    from .transform.equalize import Equalize
    from .transform.flat import FlatTransform
    from .transform.query_key import FuseQueryKey
    from .transform.replace_attention import ReplaceAttention
    from .transform.replace_softmax import ReplaceSoftmax
    from .transform.rotate import Rotate
    from .transform.smooth import Smooth

    bias_correction: Callable[..., Result]
    bn_retune: Callable[..., Result]
    smooth: Callable[..., Result]
    rotate: Callable[..., Result]
    fuse_query_key: Callable[..., Result]
    flat_transform: Callable[..., Result]
    equalize: Callable[..., Result]
    awq_scale: Callable[..., Result]
    clean: Callable[..., Result]
    bind: Callable[..., Result]
    cut: Callable[..., Result]
    drop_blocks: Callable[..., Result]
    finetune: Callable[..., Result]
    finetune_quantized: Callable[..., Result]
    fold: Callable[..., Result]
    fold_linear_op: Callable[..., Result]
    freeze_quantized: Callable[..., Result]
    fuse_parallel_linears: Callable[..., Result]
    insert_dynamic_channel_gate: Callable[..., Result]
    insert_linear_op: Callable[..., Result]
    lower: Callable[..., Result]
    materialise: Callable[..., Result]
    norm_tweak: Callable[..., Result]
    calib_augment: Callable[..., Result]
    sensitivity: Callable[..., Result]
    pre_calibrate: Callable[..., Result]
    diagnose: Callable[..., Result]
    prune: Callable[..., Result]
    prune_iteratively: Callable[..., Result]
    qat: Callable[..., Result]
    quantize: Callable[..., Result]
    quantize_cache: Callable[..., Result]
    recover: Callable[..., Result]
    reinitialize: Callable[..., Result]
    reparametrize: Callable[..., Result]
    replace_attention: Callable[..., Result]
    replace_block: Callable[..., Result]
    replace_norm: Callable[..., Result]
    replace_softmax: Callable[..., Result]
    select: Callable[..., Result]
    shared_mask: Callable[..., Result]
    compress_weights: Callable[..., Result]
    vq_weights: Callable[..., Result]
    weight_only: Callable[..., Result]

__all__ = [
    "Adapter",
    "Archive",
    "AwqScale",
    "BiasCorrection",
    "Bind",
    "BnRetune",
    "CalibAugment",
    "Clean",
    "CompressWeights",
    "Context",
    "Contract",
    "Cut",
    "Decision",
    "Diagnose",
    "DropBlocks",
    "Equalize",
    "FineTune",
    "FinetuneQuantized",
    "FlatTransform",
    "Fold",
    "FoldLinearOp",
    "FreezeQuantized",
    "FuseParallelLinears",
    "FuseQueryKey",
    "InsertAdapter",
    "InsertDynamicChannelGate",
    "InsertLinearOp",
    "KeepFaster",
    "Lower",
    "Materialise",
    "MergeAdapter",
    "Needs",
    "NormTweak",
    "Outcome",
    "Pass",
    "Pipeline",
    "PreCalibrate",
    "Prune",
    "PruneIteratively",
    "Quantize",
    "QuantizeAware",
    "QuantizeCache",
    "Recover",
    "Reinitialize",
    "Reparametrize",
    "ReplaceAttention",
    "ReplaceBlock",
    "ReplaceNorm",
    "ReplaceSoftmax",
    "Report",
    "Result",
    "Rotate",
    "Select",
    "Sensitivity",
    "SharedMask",
    "Smooth",
    "TopKFrequency",
    "VQWeights",
    "WeightFreezing",
    "WeightOnly",
    "absorb_removed",
    "adapter_of",
    "as_function",
    "awq_scale",
    "bias_correction",
    "bind",
    "bn_retune",
    "calib_augment",
    "clean",
    "compare_with_scratch",
    "compress_weights",
    "cut",
    "diagnose",
    "drop_blocks",
    "equalize",
    "expected_macs",
    "finetune",
    "finetune_quantized",
    "flat_transform",
    "fold",
    "fold_linear_op",
    "freeze_quantized",
    "fuse_parallel_linears",
    "fuse_query_key",
    "get",
    "identity_loss",
    "insert_adapter",
    "insert_dynamic_channel_gate",
    "insert_linear_op",
    "load_peft",
    "load_subspace",
    "lower",
    "mask_loss",
    "materialise",
    "merge_adapter",
    "names",
    "norm_tweak",
    "perpendicular_gradients",
    "pre_calibrate",
    "prune",
    "prune_iteratively",
    "qat",
    "quantize",
    "quantize_cache",
    "read_archive",
    "recover",
    "regularize",
    "reinitialize",
    "reparametrize",
    "replace_attention",
    "replace_block",
    "replace_norm",
    "replace_softmax",
    "rotate",
    "save_subspace",
    "select",
    "sensitivity",
    "shared_mask",
    "smooth",
    "softmax_collapse",
    "unmerge_adapter",
    "vq_weights",
    "weight_only",
]

_HOME = {
    **dict.fromkeys(["Context", "Contract", "Decision", "Needs", "Outcome", "Pass", "as_function"], ".base"),
    **dict.fromkeys(["get", "names"], ".registry"),
    **dict.fromkeys(["merge_adapter", "unmerge_adapter"], ".adapters.merge"),
    "Adapter": ".adapters.adapter",
    **dict.fromkeys(["perpendicular_gradients", "softmax_collapse"], ".transform.collapse"),
    "load_peft": ".adapters.peft",
    **dict.fromkeys(["load_subspace", "save_subspace"], ".reparam.subspace"),
    "Pipeline": ".pipeline",
    "adapter_of": ".adapters.attach",
    **dict.fromkeys(["absorb_removed", "regularize"], ".prune.regularize"),
    **dict.fromkeys(["TopKFrequency", "expected_macs"], ".prune.gate"),
    "compare_with_scratch": ".prune.reinitialize",
    "identity_loss": ".prune.pat",
    "mask_loss": ".prune.pat",
    "WeightFreezing": ".quantize.qat.freezing",
    "insert_adapter": ".adapters.insert",
    **dict.fromkeys(["Archive", "read_archive"], ".quantize.archive"),
    "Report": ".report",
    "Result": ".result",
}
_FUNCTIONS = frozenset({"clean", "finetune", "fold", "lower", "prune", "quantize", "recover"})


class _Passes(ModuleType):
    """The module's own type: loads passes when first asked for, and keeps ``P.fold`` the function.

    Importing the subpackage ``passes.fold`` would otherwise bind the attribute ``fold`` to the module.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _HOME:
            found = getattr(importlib.import_module(_HOME[name], __name__), name)
        else:
            found = _pass(name)
        self.__dict__[name] = found
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _FUNCTIONS:
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


def _pass(name: str) -> Any:
    """The pass class called ``name``, or the function of the pass called ``name``; third parties' included."""
    registry = importlib.import_module(".registry", __name__)  # `from . import` would ask __getattr__ again
    for key, (_, attribute) in registry.BUILTIN.items():
        if attribute == name:
            return registry.get(key)
    if name in registry.names():
        return importlib.import_module(".base", __name__).as_function(registry.get(name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; passes: {', '.join(registry.names())}")


sys.modules[__name__].__class__ = _Passes
