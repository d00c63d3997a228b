"""The rewrite family's ground: rules as objects, typed refusals, and the engine that runs them to a fixed point."""

from __future__ import annotations

from .engine import Log, rewrite
from .rule import ANY, Env, Refusal, Rewrite, Rule, Why

__all__ = ["ANY", "Env", "Log", "Refusal", "Rewrite", "Rule", "Why", "rewrite"]
