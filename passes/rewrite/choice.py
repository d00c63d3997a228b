"""Choosing rules by name, as the options ``rules`` and ``disable`` of a pass do."""

from __future__ import annotations

from collections.abc import Sequence

from ...graph.errors import ConfigError
from ..base import nearest
from .rule import Rule


def chosen(rules: Sequence[Rule], only: Sequence[str] | None, without: Sequence[str], owner: str) -> list[Rule]:
    """Those of ``rules`` whose names are in ``only`` (all if None) and not in ``without``, in their order.

    Raises:
        ConfigError: a name that is no rule's; the nearest one is named.
    """
    known = {rule.name for rule in rules}
    for option, names in (("rules", only or ()), ("disable", without)):
        for name in names:
            if name not in known:
                close = nearest(name, known)
                raise ConfigError(
                    f"pass {owner!r} has no rule {name!r}",
                    node=option,
                    expected=", ".join(sorted(known)) or "no rules",
                    found=name,
                    hint=f"did you mean {close!r}?" if close else "`foldline passes NAME` describes the rules",
                )
    return [rule for rule in rules if (only is None or rule.name in only) and rule.name not in without]
