"""Which passes there are: foldline's own and those that third parties add through the entry point foldline.passes."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ..graph.errors import ConfigError
from .base import Pass, nearest

BUILTIN: dict[str, tuple[str, str]] = {
    "fold": (".fold", "Fold"),
    "fuse_parallel_linears": (".fold.parallel_linears", "FuseParallelLinears"),
    "clean": (".clean.clean_pass", "Clean"),
    "prune": (".prune", "Prune"),
    "drop_blocks": (".prune.depth", "DropBlocks"),
    "cut": (".prune.regularize", "Cut"),
    "select": (".prune.select_pass", "Select"),
    "insert_linear_op": (".prune.pat", "InsertLinearOp"),
    "shared_mask": (".prune.pat", "SharedMask"),
    "fold_linear_op": (".prune.pat", "FoldLinearOp"),
    "insert_dynamic_channel_gate": (".prune.gate", "InsertDynamicChannelGate"),
    "reinitialize": (".prune.reinitialize", "Reinitialize"),
    "prune_iteratively": (".prune.schedule", "PruneIteratively"),
    "quantize": (".quantize", "Quantize"),
    "keep_faster": (".quantize.keep_faster", "KeepFaster"),
    "qat": (".quantize.qat.qat_pass", "QuantizeAware"),
    "freeze_quantized": (".quantize.qat.freeze_pass", "FreezeQuantized"),
    "quantize_cache": (".quantize.cache", "QuantizeCache"),
    "weight_only": (".quantize.weight_only", "WeightOnly"),
    "finetune_quantized": (".quantize.finetune_quantized", "FinetuneQuantized"),
    "compress_weights": (".quantize.archive.compress_weights", "CompressWeights"),
    "vq_weights": (".quantize.archive.vq_weights", "VQWeights"),
    "smooth": (".transform.smooth", "Smooth"),
    "fuse_query_key": (".transform.query_key", "FuseQueryKey"),
    "flat_transform": (".transform.flat", "FlatTransform"),
    "rotate": (".transform.rotate", "Rotate"),
    "equalize": (".transform.equalize", "Equalize"),
    "awq_scale": (".transform.awq", "AwqScale"),
    "replace_attention": (".transform.replace_attention", "ReplaceAttention"),
    "replace_softmax": (".transform.replace_softmax", "ReplaceSoftmax"),
    "recover": (".recover", "Recover"),
    "replace_block": (".recover.replace_block", "ReplaceBlock"),
    "finetune": (".finetune", "FineTune"),
    "insert_adapter": (".adapters.insert", "InsertAdapter"),
    "merge_adapter": (".adapters.merge", "MergeAdapter"),
    "reparametrize": (".reparam.insert", "Reparametrize"),
    "replace_norm": (".reparam.replace_norm", "ReplaceNorm"),
    "materialise": (".reparam.materialise", "Materialise"),
    "bind": (".reparam.bind", "Bind"),
    "bias_correction": (".quantize.correct.bias", "BiasCorrection"),
    "bn_retune": (".quantize.correct.bn_retune", "BnRetune"),
    "calib_augment": (".quantize.correct.calib_augment", "CalibAugment"),
    "diagnose": (".quantize.diagnose", "Diagnose"),
    "pre_calibrate": (".quantize.correct.pre_calibrate", "PreCalibrate"),
    "sensitivity": (".quantize.sensitivity.sensitivity_pass", "Sensitivity"),
    "norm_tweak": (".quantize.correct.norm_tweak", "NormTweak"),
    "lower": (".lower", "Lower"),
}
"""Name -> (module, class). Loaded when first asked for, so that a family costs nothing until it is used."""

GROUP = "foldline.passes"

_local: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Make a pass known by its name in this process (class decorator); packages use the entry point instead.

    Raises:
        ConfigError: it has no name, or another pass has the same.
    """
    if not cls.name or (cls.name in names() and _local.get(cls.name) is not cls):
        found = f"{cls.name!r}, which is taken" if cls.name else "none"
        raise ConfigError("a pass needs a name of its own", node=cls.__name__, expected="a new name", found=found)
    _local[cls.name] = cls
    return cls


@cache
def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILTIN}


def names() -> list[str]:
    """Names of all passes, foldline's own first."""
    return [*BUILTIN, *sorted({*_third_party(), *_local})]


def get(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        ConfigError: no such pass (naming the nearest one), or the entry point gives no pass of that name.
    """
    if name in _local:
        return _local[name]
    if name in BUILTIN:
        module, attribute = BUILTIN[name]
        found = getattr(importlib.import_module(module, __package__), attribute)
    elif name in _third_party():
        point = _third_party()[name]
        try:
            found = point.load()
        except (ImportError, AttributeError) as exc:
            raise ConfigError(
                f"the pass {name!r} cannot be loaded: {exc}", node=name, value=point.value, hint="reinstall its package"
            ) from exc
    else:
        close = nearest(name, names())
        raise ConfigError(
            f"there is no pass {name!r}",
            node=name,
            expected=", ".join(names()),
            found=name,
            hint=f"did you mean {close!r}?" if close else "`foldline passes` lists them",
        )
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise ConfigError(f"the entry point {name!r} gives no Pass", node=name, expected="a Pass class", found=found)
    if found.name != name:
        raise ConfigError("a pass's name must be its entry point's", node=name, expected=name, found=found.name)
    return found
