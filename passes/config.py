"""Pipelines as data: reading YAML, JSON and TOML, validating, writing back, and the JSON schema of it all."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema

from ..graph.errors import ConfigError
from . import registry
from .base import Pass, config_error

SUFFIXES = (".yaml", ".yml", ".json", ".toml")


class PipelineFile(BaseModel):
    """A pipeline file. Each entry of ``passes`` is a pass's name, or one ``name: {option: value}``."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = "pipeline"
    """What the report calls the pipeline."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random choice: same model and seed, same bytes."""
    passes: list[str | dict[str, dict[str, Any] | None]] = Field(min_length=1)
    """The passes in order."""


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a pipeline file, by suffix (.yaml, .yml, .json, .toml).

    Raises:
        ConfigError: the file is missing, has another suffix, cannot be parsed, or holds no mapping.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError("unknown kind of pipeline file", node=str(path), expected=", ".join(SUFFIXES), found=suffix)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the pipeline file cannot be read: {exc}", node=str(path)) from exc
    try:
        if suffix == ".json":
            data = json.loads(text)
        elif suffix == ".toml":
            data = tomllib.loads(text)
        else:
            data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(f"the pipeline file cannot be parsed: {exc}", node=str(path)) from exc
    if not isinstance(data, dict):
        raise ConfigError(
            "a pipeline file holds one mapping",
            node=str(path),
            expected="keys name, seed, passes",
            found=type(data).__name__,
        )
    return data


def parse(data: Mapping[str, Any]) -> tuple[str, int, list[Pass]]:
    """Name, seed and passes of a pipeline given as data.

    Raises:
        ConfigError: an unknown key, pass or option (naming the nearest valid one), or a value of the wrong kind.
    """
    try:
        file = PipelineFile.model_validate(dict(data))
    except ValidationError as exc:
        raise config_error(exc, PipelineFile, "the pipeline") from exc
    passes = []
    for i, entry in enumerate(file.passes):
        if isinstance(entry, str):
            name, options = entry, None
        elif len(entry) == 1:
            ((name, options),) = entry.items()
        else:
            raise ConfigError(
                "each entry of passes holds one pass",
                node=f"passes[{i}]",
                expected="a name, or one `name: {option: value}`",
                found=", ".join(entry) or "an empty mapping",
                hint="start each pass with its own dash",
            )
        try:
            passes.append(registry.get(name)(**(options or {})))
        except ConfigError as exc:
            exc.node = f"passes[{i}]" + (f".{exc.node}" if exc.node else "")
            raise
    return file.name, file.seed, passes


def dump(name: str, seed: int, passes: Sequence[Pass], left_out: list[str] | None = None) -> dict[str, Any]:
    """A pipeline as plain data that :func:`parse` reads back; options at their default are left out.

    Args:
        left_out: where given, options that are Python objects are left out and named in it, instead of an error.

    Raises:
        ConfigError: an option is a Python object without a text form, or a pass is not in the registry.
    """
    entries: list[Any] = []
    for i, step in enumerate(passes):
        if step.name not in registry.names() or registry.get(step.name) is not type(step):
            raise ConfigError(
                "this pass cannot be written to a file: the registry does not know it",
                node=f"passes[{i}]",
                value=type(step).__name__,
                hint=f"add it as an entry point {registry.GROUP}",
            )
        options = {}
        for key, value in chosen(step).items():
            where = f"passes[{i}].{step.name}.{key}"
            try:
                options[key] = plain(value, where)
            except ConfigError:
                if left_out is None:
                    raise
                left_out.append(where)
        entries.append({step.name: options} if options else step.name)
    return {"name": name, "seed": seed, "passes": entries}


_PLAIN_FACTORIES = (dict, list, set, tuple)


def chosen(step: Pass) -> dict[str, Any]:
    """The options of a pass that differ from their defaults, as Python objects."""
    found = {}
    for key, info in type(step).model_fields.items():
        value = getattr(step, key)
        default: Any
        if info.default_factory in _PLAIN_FACTORIES:  # pydantic would inspect their signatures each time
            default = info.default_factory()  # type: ignore[call-arg, misc]
        else:
            default = info.get_default(call_default_factory=True) if not info.is_required() else ...
        if value is default or (type(value) is type(default) and _equal(value, default)):
            continue
        found[key] = value
    return found


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (ValueError, TypeError, RuntimeError):  # arrays and tensors have no single truth value
        return False


def plain(value: Any, where: str) -> Any:
    """An option as data for YAML and JSON.

    Raises:
        ConfigError: it is a Python object without a text form (a calibration iterable, a callable, an array).
    """
    if value is None or isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum):
        return value
    if isinstance(value, Enum):
        return plain(value.value, where)
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="python"), where)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [plain(item, where) for item in sorted(value, key=str)]
    raise ConfigError(
        f"option {where} is a Python object, which a pipeline file cannot hold",
        node=where,
        value=type(value).__name__,
        expected="numbers, texts, lists, mappings, targets such as macs(0.5)",
        hint="leave it out of the file and give it when the pipeline runs",
    )


class _Schema(GenerateJsonSchema):
    """Options that only Python can hold appear in the schema as such, instead of failing it."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {"description": "a Python object: given when the pipeline runs, not in a file"}


def json_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of pipeline files, over all registered passes, third parties' included."""
    classes: list[type[Pass]] = [registry.get(name) for name in registry.names()]
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(cls, "validation") for cls in classes]
    references, definitions = models_json_schema(
        wanted, by_alias=True, ref_template="#/$defs/{model}", schema_generator=_Schema
    )
    named = {cls.name: references[(cls, "validation")] for cls in classes}
    entries: list[dict[str, Any]] = [{"enum": list(named)}]
    for name, reference in named.items():
        entries.append(
            {
                "type": "object",
                "properties": {name: {"anyOf": [reference, {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    top = PipelineFile.model_json_schema()
    top["properties"]["passes"] = {**top["properties"]["passes"], "items": {"anyOf": entries}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **top,
        "title": "foldline pipeline",
        "$defs": definitions.get("$defs", {}),
    }
