"""The operator table: every canonical op of docs/ops.md has a rule, and every name a front end emits is documented."""

from __future__ import annotations

import re
from pathlib import Path

import foldline.graph.ops
from foldline.graph.ops import known_ops

ROOT = Path(__file__).resolve().parent.parent


def documented() -> set[str]:
    names: set[str] = set()
    for line in (ROOT / "docs" / "ops.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| op "):
            cell = re.sub(r"\([^)]*\)", "", line.split("|")[1])
            cell = cell.split(":")[-1]
            names |= {n for n in re.findall(r"[a-z][a-z0-9_]*", cell) if n not in {"ary", "n", "is"}}
    return names - {"hardtanh"}  # "hardtanh is clip"


def test_every_documented_op_has_a_rule() -> None:
    assert foldline.graph.ops is not None
    assert documented() - set(known_ops()) == set()


def test_every_rule_is_documented() -> None:
    assert set(known_ops()) - documented() == set()
