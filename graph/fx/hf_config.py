"""Configurations that models are built from (as transformers' are): found by what they offer, read and changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def is_config(item: Any) -> bool:
    """Whether an object is a configuration: it tells its entries as data and can be written for ``from_pretrained``."""
    return callable(getattr(item, "to_dict", None)) and callable(getattr(item, "save_pretrained", None))


def configs(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path of the outermost module that holds it, configuration), each configuration once."""
    seen: set[int] = set()
    for path, m in module.named_modules():
        config = vars(m).get("config")
        if config is not None and id(config) not in seen and is_config(config):
            seen.add(id(config))
            yield path, config


def integer_entries(config: Any) -> dict[str, int | None]:
    """Entries of a configuration that hold an integer or nothing yet; those of inner configurations dotted."""
    found: dict[str, int | None] = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int or value is None:
            found[name] = value
        elif is_config(value):
            found |= {f"{name}.{k}": v for k, v in integer_entries(value).items()}
    return found


def set_entry(config: Any, name: str, value: int | None) -> None:
    """Change one entry of :func:`integer_entries`."""
    *path, leaf = name.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, leaf, value)
