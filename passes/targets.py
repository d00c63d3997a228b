"""Targets: how much of the model's MACs, parameters, bytes or latency is to remain."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from ..graph.errors import ConfigError

Metric = Literal["macs", "params", "bytes", "latency"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_TEXT = re.compile(r"\s*(\w+)\s*\(\s*([-+0-9.eE_]+)\s*\)\s*")


class Target(BaseModel):
    """What is to remain of one quantity: a fraction of the original up to 1, an absolute number above 1.

    Absolute numbers are multiply-accumulates of one call (macs), elements (params), bytes of stored weights (bytes)
    and milliseconds of one call (latency). The text form, used in pipeline files, is ``macs(0.5)``; ``{macs: 0.5}``
    is read too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    value: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if isinstance(data, str):
            match = _TEXT.fullmatch(data)
            if match is None:
                raise ValueError(f"{data!r} is not a target: expected e.g. macs(0.5) or {{macs: 0.5}}")
            return {"metric": match[1], "value": match[2]}
        if isinstance(data, dict) and len(data) == 1:
            ((metric, value),) = data.items()
            return {"metric": metric, "value": value}
        return data

    @field_validator("value", mode="before")
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected a number, found a truth value")
        return value

    @model_serializer
    def _to_text(self) -> str:
        return str(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """In files a target is a text or a mapping of one metric."""
        numbers = {metric: {"type": "number", "exclusiveMinimum": 0} for metric in METRICS}
        mapping = {"type": "object", "properties": numbers, "minProperties": 1, "maxProperties": 1}
        text = {"type": "string", "pattern": rf"^({'|'.join(METRICS)})\\([0-9.eE+-]+\\)$"}
        return {"description": "what is to remain", "anyOf": [text, {**mapping, "additionalProperties": False}]}

    def __str__(self) -> str:
        number = int(self.value) if self.value == int(self.value) else self.value
        return f"{self.metric}({number})"

    @property
    def is_fraction(self) -> bool:
        return self.value <= 1

    def amount(self, original: float) -> float:
        """The absolute quantity that is to remain of ``original``."""
        return self.value * original if self.is_fraction else self.value

    def of(self, cost: Any) -> float:
        """This target's quantity of a cost (``graph.cost.Cost``): macs, parameters or bytes.

        Raises:
            ConfigError: for latency, which must be measured, not counted.
        """
        if self.metric == "latency":
            raise ConfigError("latency is measured, not counted", value=str(self), hint="time the model on its backend")
        return float(getattr(cost, {"params": "parameters"}.get(self.metric, self.metric)))


def _target(metric: Metric, value: float) -> Target:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(
            f"a target needs a positive number: {metric}({value!r})",
            value=value,
            expected="a fraction in (0, 1] of the original that is to remain, or an absolute number above 1",
            found=value,
        )
    return Target(metric=metric, value=float(value))


def macs(value: float) -> Target:
    """Multiply-accumulates that are to remain: a fraction up to 1, a number above 1."""
    return _target("macs", value)


def params(value: float) -> Target:
    """Parameters (elements) that are to remain: a fraction up to 1, a number above 1."""
    return _target("params", value)


def bytes(value: float) -> Target:
    """Bytes of stored weights that are to remain: a fraction up to 1, a number above 1."""
    return _target("bytes", value)


def latency(value: float) -> Target:
    """Latency of one call that is to remain: a fraction up to 1, milliseconds above 1."""
    return _target("latency", value)
