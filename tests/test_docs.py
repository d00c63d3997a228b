"""The worked examples in docs/architecture.md are what the code prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_architecture_page_matches_the_code() -> None:
    spec = importlib.util.spec_from_file_location("axis_groups_example", ROOT / "examples" / "axis_groups.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert module.embed(text, module.sections()) == text, "run `python examples/axis_groups.py --write`"
