"""Checkpoints of the peft library, read without it (json and safetensors) and made an Adapter for a base model."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...graph.errors import ConstraintError, ModelFileError
from ..base import nearest
from .adapter import Adapter, Entry
from .kinds import NotFoldable
from .peft_base import BaseModel
from .peft_kinds import METHODS, PREFIX, Method, peft_kind

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOTS = ("base_model.model.", "base_model.", "model.")
WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?|original_module)(?=\.)")

REFUSED_OPTIONS = {
    "use_qalora": "QA-LoRA pools the layer's inputs",
    "alora_invocation_tokens": "an activated LoRA is off before its invocation tokens",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA truncates the base weight",
    "use_bdlora": "block-diagonal LoRA stores shards of its factors",
    "layer_replication": "layers were replicated: the base model has others",
    "target_parameters": "LoRA on stacked experts has no single weight",
    "megatron_config": "the layers are split over devices",
}
"""LoRA options under which a checkpoint is no update of one stored weight, and why."""
INITIAL = {"pissa": "pissa", "olora": "olora"}
UNKNOWN_START = ("corda", "loftq", "lora_ga", "pissa_niter")
"""Initialisations that change the base by something that the checkpoint does not hold."""


def is_peft(path: Any) -> bool:
    """Whether a path is a directory that peft's ``save_pretrained`` wrote."""
    return isinstance(path, (str, Path)) and (Path(path) / CONFIG).is_file()


@dataclass
class Site:
    """What a checkpoint holds for one layer: its path in the base model, and tensors without prefix."""

    path: str
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class PeftCheckpoint:
    """A checkpoint as it was saved.

    Attributes:
        config: ``adapter_config.json``.
        method: the PEFT method.
        sites: by layer, in the file's order.
        shared: tensors of the model as a whole (random projections, vector banks).
        replaced: whole parameters by name (``modules_to_save``, trained biases).
    """

    config: dict[str, Any]
    method: Method
    sites: dict[str, Site]
    shared: dict[str, np.ndarray]
    replaced: dict[str, np.ndarray]

    def bind(self, model: Any) -> Adapter:
        """The checkpoint as an Adapter of a base model: names of its weights, and how each is stored.

        Args:
            model: ``nn.Module``, Graph (FX or ONNX) or state dict.

        Raises:
            NotFoldable: the method is no function of a weight (prompts, routers).
            ConstraintError: a layer is not in the model, or an option does not allow merging; named.
        """
        self.check()
        where = BaseModel(model)
        entries = [self._entry(site, where) for site in self.sites.values()]
        for path, tensors in _by_layer(self.replaced).items():
            entries += _whole(path, tensors, where)
        if not entries:
            raise ConstraintError(
                "the checkpoint holds nothing for any layer", node=self.config.get("peft_type"),
                found=f"only {', '.join(self.shared) or 'no tensors'}",
                hint="its indices were not saved (save_indices, save_projection)",
            )  # fmt: skip
        return Adapter(entries)

    def check(self) -> None:
        """Raises NotFoldable for a method, or for options, under which nothing can be merged into weights."""
        if not self.method.kind.foldable:
            raise NotFoldable(self.method.kind, next(iter(self.sites), None))
        if self.config.get("peft_type") not in ("LORA", "ADALORA"):
            return
        for option, why in REFUSED_OPTIONS.items():
            if self.config.get(option):
                raise NotFoldable(self.method.kind, option, why)
        start = str(self.config.get("init_lora_weights"))
        if start.startswith(UNKNOWN_START):
            why = f"{start} changed the base weight by what is not in the checkpoint"
            raise NotFoldable(self.method.kind, "init_lora_weights", why)

    def _entry(self, site: Site, where: BaseModel) -> Entry:
        wide = any("embedding" in name for name in site.tensors) or "token" in next(iter(site.tensors))
        target, view = where.weight_of(site.path, self._fan_in_fan_out(site), embedding=wide)
        rank = self._rank(site)
        options: dict[str, Any] = {"rank": rank, "scale": self._scale(site.path, rank)}
        if wide:
            options["embedding"] = True
        options |= self._options(site)
        needed = {n: v for n, v in self.shared.items() if self._shares(n, site)}
        tensors = {**needed, **site.tensors}
        bias = where.bias_of(target, site.path)
        if bias is None and "lora_B.bias" in tensors:
            raise ConstraintError("the adapter has a bias and the layer has none", node=target)
        kind = self.method.kind.name
        if (
            bias is not None
            and (changed := self.replaced.pop(bias, self.replaced.pop(f"{site.path}.bias", None))) is not None
        ):
            if kind == PREFIX + "lora":
                tensors["bias"] = changed
            else:
                self.replaced[bias] = changed
        moves = self.method.kind.bias is not None
        return Entry(target, kind, tensors, options, view, bias if moves else None)

    def _shares(self, name: str, site: Site) -> bool:
        return name not in site.tensors and name.split(".")[0] in self.method.shared

    # ---- the configuration ---------------------------------------------------------------------------------------
    def _rank(self, site: Site) -> int:
        for name, axis in (("lora_A.weight", 0), ("lora_embedding_A", 0), ("lora_A", 0), ("hada_w1_b", 0)):
            if name in site.tensors:
                return int(site.tensors[name].shape[axis])
        return int(_pattern(self.config.get("rank_pattern") or {}, site.path, self.config.get("r") or 0))

    def _scale(self, path: str, rank: int) -> float:
        """s of ``W + s ...``; alpha / rank, and alpha / sqrt(rank) where the configuration says so."""
        c, kind = self.config, self.config["peft_type"]
        if kind == "LORA":
            alpha = _pattern(c.get("alpha_pattern") or {}, path, c.get("lora_alpha", rank))
            return float(alpha) / (math.sqrt(rank) if c.get("use_rslora") else rank) if rank else 1.0
        if kind in ("LOHA", "LOKR"):
            r = _pattern(c.get("rank_pattern") or {}, path, c["r"])
            return float(_pattern(c.get("alpha_pattern") or {}, path, c["alpha"])) / float(r)
        if kind == "RANDLORA":
            return float(c["randlora_alpha"]) / float(c["r"])
        if kind == "GRALORA":
            return float(c["alpha"]) / float(c["r"] + c.get("hybrid_r", 0))
        if kind == "DEFT":
            return float(c["alpha"]) / float(c["r"]) if c.get("alpha") else 1.0
        if kind == "SUPERTUNING":
            return float(c["lora_alpha"]) / float(c["r"]) if c.get("r") else 1.0
        return float(c.get("scaling", 1.0) or 1.0)

    def _options(self, site: Site) -> dict[str, Any]:
        """What the formula of the method needs besides."""
        c, kind = self.config, self.config["peft_type"]
        if kind == "LORA":
            start = INITIAL.get(str(c.get("init_lora_weights")))
            return {"start": start} if start else {}
        if kind == "ADALORA":
            rows = int(site.tensors["lora_A"].shape[0])
            kept = _pattern_rows(c.get("rank_pattern") or {}, site.path)
            alpha = float(c.get("lora_alpha") or 0)
            return {"alpha": alpha if alpha > 0 else float(rows), "kept": kept}
        if kind == "IA3":
            return {"feedforward": _is_chosen(c.get("feedforward_modules") or [], site.path)}
        if kind == "VBLORA":
            return {"topk": int(c.get("topk", 2))}
        if kind in ("MISS", "BONE"):
            form = c.get("init_weights")
            block = next(iter(site.tensors.values()))
            return {"form": form if form == "mini" else "bat" if form == "bat" or block.ndim == 3 else "plain"}
        if kind == "OFT":
            return {
                "constrained": bool(c.get("coft")), "eps": float(c.get("eps", 0)),
                "series": bool(c.get("use_cayley_neumann")), "terms": int(c.get("num_cayley_neumann_terms") or 5),
            }  # fmt: skip
        if kind == "HRA":
            return {"orthogonalise": bool(c.get("apply_GS"))}
        if kind == "ROAD":
            return {"form": str(c.get("variant", "road_1")), "group": int(c.get("group_size", 64))}
        if kind == "DEFT":
            return {"form": c.get("decomposition_method", "relu"), "removal": bool(c.get("para"))}
        if kind == "PEANUT":
            return {"activation": str(c.get("act_fn", "relu"))}
        if kind in ("FOURIERFT", "WAVEFT"):
            wave = {"inverse": bool(c.get("use_idwt", True)), "family": c.get("wavelet_family", "db1")}
            return {"seed": int(c.get("random_loc_seed", 777)), **(wave if kind == "WAVEFT" else {})}
        if kind == "TRAINABLE_TOKENS":
            return {"tokens": [int(i) for i in c.get("token_indices") or []]}
        return {}

    def _fan_in_fan_out(self, site: Site) -> bool | None:
        value = self.config.get("fan_in_fan_out")
        return None if value is None else bool(value)


def load_peft(path: str | Path) -> PeftCheckpoint:
    """Read a directory that peft's ``save_pretrained`` wrote; peft itself is not needed.

    Raises:
        ModelFileError: a file is missing, damaged, or a pickle (which could run code).
        ConstraintError: a method or a tensor that is not known; names it.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as exc:
        raise ModelFileError("the adapter's configuration cannot be read", node=str(folder), found=str(exc)) from exc
    peft_kind("peft_lora")  # registers all methods
    name = str(config.get("peft_type", ""))
    if name not in METHODS:
        raise ConstraintError(
            "no such PEFT method", node="peft_type", expected=", ".join(sorted(METHODS)), found=name,
            hint=f"did you mean {close!r}?" if (close := nearest(name, METHODS)) else None,
        )  # fmt: skip
    method = METHODS[name]
    found = PeftCheckpoint(config, method, {}, {}, {})
    if not (folder / TENSORS).is_file() and not method.kind.foldable:
        return found
    tokens = config.get("trainable_token_indices")
    for key, data in _read(folder).items():
        _sort(found, key, data)
    if tokens:
        _take_tokens(found, tokens)
    return found


def _read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors as numpy (bfloat16 too)."""
    file = folder / TENSORS
    if not file.is_file():
        pickled = (folder / PICKLED).is_file()
        raise ModelFileError(
            "the adapter's tensors are missing", node=str(file), expected=TENSORS, found=PICKLED if pickled else None,
            hint="save it with safe_serialization=True" if pickled else None,
        )  # fmt: skip
    from safetensors import SafetensorError, safe_open

    from ...graph.execute import to_numpy

    try:
        with safe_open(str(file), framework="pt") as opened:  # numpy has no bfloat16 there
            return {key: to_numpy(opened.get_tensor(key)) for key in opened.keys()}
    except (OSError, SafetensorError) as exc:
        raise ModelFileError("the adapter's tensors cannot be read", node=str(file), found=str(exc)) from exc


def _sort(found: PeftCheckpoint, key: str, data: np.ndarray) -> None:
    """Put one tensor where it belongs: to a layer, to the model, or in place of a parameter."""
    method = found.method
    own = key.removeprefix("base_model.")
    if own.split(".")[0] in method.shared:
        found.shared[own] = data
        return
    name = next((key.removeprefix(root) for root in ROOTS[:2] if key.startswith(root)), key)
    parts = name.split(".")
    starts = [i for i, part in enumerate(parts) if part.startswith((*method.parameters, "token_adapter"))]
    if not starts:
        plain = WRAPPED.sub("", name)
        if plain == name or ".base_layer." in name:
            found.replaced[plain] = data
        elif ".original_module." not in name:  # a trained copy is saved under the plain name too
            found.replaced.setdefault(plain, data)
        return
    path = ".".join(parts[: starts[0]])
    site = found.sites.setdefault(path, Site(path))
    site.tensors[".".join(parts[starts[0] :])] = data


def _take_tokens(found: PeftCheckpoint, tokens: Any) -> None:
    """Turn rows trained beside another method into replaced rows of their own sites."""
    for path, site in list(found.sites.items()):
        rows = {k: v for k, v in site.tensors.items() if k.startswith(("token_adapter", "trainable_tokens"))}
        if not rows:
            continue
        listed = tokens if isinstance(tokens, list) else next((v for k, v in tokens.items() if _ends(path, k)), None)
        if listed is None:
            raise ConstraintError("no token indices for this embedding", node=path, found=str(tokens))
        for name in rows:
            del site.tensors[name]
        found.replaced[f"{path}.weight#{','.join(map(str, listed))}"] = next(iter(rows.values()))
        if not site.tensors:
            del found.sites[path]


def _by_layer(replaced: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, data in replaced.items():
        path, _, leaf = name.rpartition(".")
        layers.setdefault(path, {})[leaf] = data
    return layers


def _whole(path: str, tensors: dict[str, np.ndarray], where: BaseModel) -> Iterable[Entry]:
    """Entries that put trained parameters in place of the base's."""
    for leaf, data in tensors.items():
        name, _, rows = leaf.partition("#")
        if rows:
            target, _ = where.weight_of(path, None, embedding=True)
            listed = [int(i) for i in rows.split(",")]
            yield Entry(target, PREFIX + "trainable_tokens", {"trainable_tokens_delta": data}, {"tokens": listed})
            continue
        target, view = where.whole(path, name, data.shape)
        yield Entry(target, PREFIX + "replace", {"weight": data}, {}, view)


def _ends(path: str, key: str) -> bool:
    return path == key or path.endswith("." + key)


def _is_chosen(patterns: Any, path: str) -> bool:
    """As peft chooses: a regular expression over the whole path, or names of which one ends it."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(_ends(path, key) for key in patterns)


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that ends the path, as peft matches ranks and alphas."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _pattern_rows(patterns: Mapping[str, Any], path: str) -> list[bool] | None:
    for key, value in patterns.items():
        short = key.removeprefix("base_model.").removeprefix("model.").removesuffix(".lora_E")
        if _ends(path, short) or _ends(short, path) or fnmatch.fnmatchcase(key, f"*{path}.lora_E*"):
            return [bool(v) for v in value]
    return None
