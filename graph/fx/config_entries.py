"""Configurations that models are built from, as data: their integer entries, and those with one item per layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from .walk import modules_of

Entries: TypeAlias = dict[str, int | None]
_MAX_ITEMS = 16


def is_config(item: Any) -> bool:
    """Whether an object is a configuration: it tells its entries as data and can be written for ``from_pretrained``."""
    return callable(getattr(item, "to_dict", None)) and callable(getattr(item, "save_pretrained", None))


def configs(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path of the outermost module that holds it, configuration), each configuration once."""
    seen: set[int] = set()
    for path, m in modules_of(module):
        config = vars(m).get("config")
        if config is not None and id(config) not in seen and is_config(config):
            seen.add(id(config))
            yield path, config


def integer_entries(config: Any) -> Entries:
    """Entries of a configuration that hold an integer or nothing yet.

    Those of inner configurations are dotted, items of lists (a width per stage) are numbered: ``hidden_sizes[0]``.
    """
    found: Entries = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int or value is None:
            found[name] = value
        elif type(value) in (list, tuple):
            if 0 < len(value) <= _MAX_ITEMS and all([type(v) is int for v in value]):
                found |= {f"{name}[{i}]": v for i, v in enumerate(value)}
        elif is_config(value):
            found |= {f"{name}.{k}": v for k, v in integer_entries(value).items()}
    return found


def place_of(config: Any, name: str) -> tuple[Any, str, int | None]:
    """(configuration that holds an entry, its attribute, position in it if that is a list)."""
    *path, leaf = name.split(".")
    for part in path:
        config = getattr(config, part)
    attribute, _, item = leaf.partition("[")
    return config, attribute, int(item[:-1]) if item else None


def set_entry(config: Any, name: str, value: int | None) -> None:
    """Change one entry of :func:`integer_entries`; a list is replaced by another one."""
    owner, attribute, i = place_of(config, name)
    if i is None:
        setattr(owner, attribute, value)
    else:
        items = list(held := getattr(owner, attribute))
        items[i] = value
        setattr(owner, attribute, type(held)(items))


def attribute_of(name: str) -> str:
    """The attribute that holds an entry, without where it is."""
    return name.rpartition(".")[2].partition("[")[0]


def sizes_of(m: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of one module that hold an integer or a short list of them."""
    for name, value in vars(m).items():
        if name.startswith("_") or name == "training":
            continue
        if type(value) is int or (
            type(value) in (list, tuple, torch.Size) and len(value) <= 16 and all(type(v) is int for v in value)
        ):
            yield name, value


def shorter_lists(config: Any, dropped: Iterable[tuple[int, list[int]]]) -> dict[str, list[Any]]:
    """Entries of a configuration with one item per layer (``layer_types``), without those of the dropped layers."""
    return {
        name: [value[i] for i in left]
        for count, left in dropped
        for name, value in vars(config).items()
        if "layer" in name and not name.startswith("_") and isinstance(value, (list, tuple)) and len(value) == count
    }
