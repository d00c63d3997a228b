"""Spec files: YAML documents, of which one may extend another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....graph.errors import ConfigError
from .backend_spec import BackendSpec

Resolver = Callable[[str], dict[str, Any] | None]


def load_spec(path: Path, resolve: Resolver | None = None) -> BackendSpec:
    """The validated spec of a file. Raises ConfigError, naming the key that is wrong."""
    return BackendSpec.from_dict(read_spec(path, resolve), path.name)


def read_spec(path: Path, resolve: Resolver | None = None, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain data of a spec file, with what it extends merged in.

    ``extends: NAME`` starts from another document: the file NAME or NAME.yaml beside this one, else what ``resolve``
    knows by that name (the spec of a target). Keys of this file replace those of the other; under ``ops`` each op is
    replaced by itself, and ``op: null`` takes its rules away.

    Raises:
        ConfigError: a file cannot be read, is no mapping, or extends itself.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the backend spec cannot be read: {exc}", node=path.name) from exc
    if not isinstance(data, dict):
        raise ConfigError("a backend spec is a mapping", node=path.name, found=type(data).__name__)
    base = data.get("extends")
    if not base:
        return data
    return merged(_base(path, str(base), resolve, (*seen, path.resolve())), data)


def _base(path: Path, name: str, resolve: Resolver | None, seen: tuple[Path, ...]) -> dict[str, Any]:
    for beside in (path.parent / name, path.parent / f"{name}.yaml"):
        if beside.is_file():
            if beside.resolve() in seen:
                raise ConfigError("a backend spec extends itself", node=path.name, value=name)
            return read_spec(beside, resolve, seen)
    found = None if resolve is None else resolve(name)
    if found is None:
        raise ConfigError(
            "the spec that this one extends is not known", node=path.name, value="extends",
            expected="a file beside it, or the name of a target", found=name,
        )  # fmt: skip
    return found


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``own`` on top of ``base``, op by op."""
    ops = {**(base.get("ops") or {}), **(own.get("ops") or {})}
    return {**base, **own, "ops": {op: rules for op, rules in ops.items() if rules is not None}}
