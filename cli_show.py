"""Tables and data that the command line prints: costs, axis groups, differences, passes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .graph.cost import Cost
from .graph.groups import ACTIONS, AxisGroup, AxisGroups
from .graph.ir import Graph
from .graph.verify import Comparison
from .passes.base import Pass
from .passes.report import change, count, decibel, size, worst_of

CONTRACT_STYLE = {"exact": "green", "approximate": "yellow", "fresh": "magenta"}


def _table(title: str, *headings: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return table


# ---- inspect ------------------------------------------------------------------------------------------------
def cost_table(graph: Graph, cost: Cost, top: int) -> Table:
    """The nodes that cost most (``top``; 0: all), in graph order, and the totals."""
    costly = [n for n in cost.nodes if n.parameters or n.bytes or n.macs]
    rank = sorted(costly, key=lambda n: (n.macs, n.bytes), reverse=True)
    shown = {id(n) for n in (rank if top == 0 else rank[:top])}
    title = f"{graph.name}: {len(graph.nodes)} nodes, {len(graph.weights)} weights"
    numbers = ("parameters", "bytes", "MACs", "share")
    table = _table(title, "layer", "node", "op", *numbers, right=numbers)
    for n in costly:
        if id(n) in shown:
            share = f"{n.macs / cost.macs:.1%}" if cost.macs else ""
            work = count(n.macs) if n.macs else ""
            table.add_row(escape(n.scope), escape(n.name), n.op, count(n.parameters), size(n.bytes), work, share)
    left = len(costly) - len(shown)
    if left:
        table.add_row(f"... and {left} more", "--top 0 shows all", *[""] * 5, style="dim")
    table.add_section()
    table.add_row("total", "", "", count(cost.parameters), size(cost.bytes), count(cost.macs), "", style="bold")
    if cost.unknown:
        table.caption = f"MACs unknown, shapes not known: {', '.join(cost.unknown[:5])} ({len(cost.unknown)} nodes)"
    return table


def group_table(groups: AxisGroups, everything: bool = False) -> Table:
    """Axis groups: size, what each ties together, what is frozen and why; kernel axes only with ``everything``."""
    free = sum(g.can("select") for g in groups)
    title = f"{len(groups)} axis groups, {free} can be selected"
    table = _table(title, "group", "size", "ties", "select, permute, scale", right=("size",))
    hidden = 0
    for g in groups:
        allowed = [action for action in ACTIONS if g.can(action)]
        reasons = _reasons(g, [action for action in ACTIONS if action not in allowed])
        if not everything and not allowed and reasons and reasons[0].startswith("kernel axis"):
            hidden += 1
            continue
        members = ", ".join(m.label for m in g.members[:4]) + (" ..." if len(g.members) > 4 else "")
        if not reasons:
            state = Text("free" if not g.nested else "free, inside an outer group", style="green")
        elif allowed:
            state = Text(f"{', '.join(allowed)} free; else frozen: {'; '.join(reasons)}", style="yellow")
        else:
            state = Text(f"frozen: {'; '.join(reasons)}", style="dim")
        table.add_row(escape(g.name), str(g.size), escape(members), state)
    if hidden:
        table.caption = f"and {hidden} kernel axes, which are frozen (--all shows them)"
    return table


def _reasons(group: AxisGroup, actions: Sequence[str]) -> list[str]:
    """Why the actions are forbidden, each reason once."""
    return list(dict.fromkeys(part for action in actions for part in group.why(action).split("; ") if part))


def inspect_data(graph: Graph, cost: Cost, groups: AxisGroups) -> dict[str, Any]:
    """What ``foldline inspect --json`` prints."""
    return {
        "name": graph.name,
        "kind": graph.kind,
        "inputs": [{"name": v.name, "shape": v.shape, "dtype": v.dtype} for v in graph.inputs],
        "outputs": [{"name": v.name, "shape": v.shape, "dtype": v.dtype} for v in graph.outputs],
        "cost": cost.to_dict(),
        "groups": groups.to_dict(),
        "opaque": [{"node": node, "reason": reason} for node, reason in groups.opaque],
        "notes": graph.notes,
    }


# ---- diff ---------------------------------------------------------------------------------------------------
def diff_tables(found: Comparison, before: Cost, after: Cost) -> list[RenderableType]:
    """Outputs, costs, and the verdict."""
    numbers = ("SQNR", "cosine", "max error", "relative", "top-1")
    outputs = _table("Outputs, B against A", "output", *numbers, "note", right=numbers)
    for name, item in found.to_dict()["outputs"].items():
        o = worst_of({"outputs": {name: item}})
        top1 = "" if o["top1"] is None else f"{o['top1']:.1%}"
        outputs.add_row(
            escape(name),
            decibel(o["sqnr_db"]),
            f"{o['cosine']:.6f}",
            f"{o['max_abs']:.3g}",
            f"{o['max_rel']:.2e}",
            top1,
            item["note"],
        )
    costs = _table("Cost", "", "A", "B", "change", right=("A", "B", "change"))
    for label, text, a, b in (
        ("parameters", count, before.parameters, after.parameters),
        ("stored weights", size, before.bytes, after.bytes),
        ("MACs per sample", count, before.macs, after.macs),
    ):
        costs.add_row(label, text(a), text(b), change(a, b))
    if found.ok:
        verdict = Text(f"equal within {found.rtol:g}", style="green")
    else:
        where = f"; the first value that differs: {found.first_divergence}" if found.first_divergence else ""
        verdict = Text(f"different by more than {found.rtol:g}{where}", style="red")
    return [outputs, costs, verdict]


# ---- passes -------------------------------------------------------------------------------------------------
def pass_table(classes: Sequence[type[Pass]]) -> Table:
    """One row per pass."""
    table = _table("Passes", "name", "contract", "needs", "what it does")
    for cls in classes:
        contract = Text(cls.contract.value, style=CONTRACT_STYLE[cls.contract.value])
        table.add_row(
            cls.name,
            contract,
            cls.needs.value,
            escape(re.split(r"(?<=[.:;]) ", _doc(cls).splitlines()[0])[0].rstrip(":;")),
        )
    table.caption = "foldline passes NAME shows one, with its options"
    return table


def pass_details(cls: type[Pass]) -> list[RenderableType]:
    """Documentation, contract, facts and options of one pass."""
    facts = [
        f"contract: {cls.contract.value}, needs: {cls.needs.value}",
        *(f"{label}: {', '.join(sorted(found))}" for label, found in _facts(cls).items() if found),
    ]
    table = _table("Options", "name", "type", "default", "meaning")
    for option in _options(cls):
        table.add_row(option["name"], escape(option["type"]), escape(option["default"]), escape(option["meaning"]))
    parts: list[RenderableType] = [Text(cls.name, style="bold"), Text(_doc(cls)), Text(""), Text("\n".join(facts))]
    return [*parts, table] if cls.model_fields else parts


def pass_data(cls: type[Pass]) -> dict[str, Any]:
    """What ``foldline passes --json`` prints of one pass."""
    return {
        "name": cls.name,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "contract": cls.contract.value,
        "needs": cls.needs.value,
        **{label: sorted(found) for label, found in _facts(cls).items()},
        "options": _options(cls),
        "doc": _doc(cls),
    }


def pass_markdown(classes: Sequence[type[Pass]]) -> str:
    """The page docs/passes.md."""
    lines = [
        "# Passes",
        "",
        "Generated by `foldline passes --markdown`. A pass is used in Python as `P.Name(option=...)` in a pipeline or",
        "`P.name(model, example_inputs, option=...)` alone, in a pipeline file as `- name: {option: ...}`.",
        "",
        "| pass | contract | needs | what it does |",
        "|---|---|---|---|",
    ]
    for cls in classes:
        lines.append(f"| [{cls.name}](#{cls.name}) | {cls.contract} | {cls.needs} | {_doc(cls).splitlines()[0]} |")
    for cls in classes:
        facts = [f"{label} {', '.join(sorted(found))}" for label, found in _facts(cls).items() if found]
        lines += ["", f"## {cls.name}", "", f"`{cls.__name__}`: {cls.contract}, needs {cls.needs}"]
        lines[-1] += f"; {'; '.join(facts)}." if facts else "."
        lines += ["", _doc(cls)]
        options = _options(cls)
        if options:
            lines += ["", "| option | type | default | meaning |", "|---|---|---|---|"]
            for option in options:
                kind, default = (option[k].replace("|", "\\|") for k in ("type", "default"))
                lines.append(
                    f"| {option['name']} | `{kind}` | `{default}` | {option['meaning'].replace('|', chr(92) + '|')} |"
                )
        lines += _rule_table(cls)
    return "\n".join(lines) + "\n"


def _rule_table(cls: type[Pass]) -> list[str]:
    """The rewrite rules of a pass that has some: what each does, its identity, conditions and refusals."""
    described = getattr(cls(), "described_rules", None) if hasattr(cls, "described_rules") else None
    if described is None:
        return []
    lines = ["", "| rule | what it does | identity | conditions | refuses |", "|---|---|---|---|---|"]
    for rule in described():
        parts = _parts(inspect.cleandoc(rule.__doc__ or ""))
        cells = [parts.get(k, "").replace("|", "\\|") for k in ("", "Identity", "Conditions", "Refuses")]
        lines.append(f"| `{rule.name}` | " + " | ".join(cells) + " |")
    return lines


def _parts(text: str) -> dict[str, str]:
    """A rule's docstring cut at its headings; the first line is under the empty one."""
    pieces = re.split(r"^(Identity|Conditions|Refuses|Source[^:]*): ", text, flags=re.MULTILINE)
    found = {"": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True))}
    return {name: " ".join(part.split()).replace("``", "`") for name, part in found.items()}


def _doc(cls: type[Pass]) -> str:
    """The docstring for reading: one line per paragraph, without markup."""
    paragraphs = inspect.cleandoc(cls.__doc__ or cls.name).split("\n\n")
    paragraphs = [p for p in paragraphs if not p.startswith(("Raises:", "Args:"))]
    return "\n\n".join(" ".join(p.split()) for p in paragraphs).replace("``", "")


def _facts(cls: type[Pass]) -> dict[str, frozenset[str]]:
    return {"requires": cls.requires, "establishes": cls.establishes, "invalidates": cls.invalidates}


def _options(cls: type[Pass]) -> list[dict[str, str]]:
    found = []
    for name, info in cls.model_fields.items():
        default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
        annotation = info.annotation
        kind = annotation.__name__ if isinstance(annotation, type) else re.sub(r"[\w.]+\.(?=\w)", "", str(annotation))
        found.append(
            {"name": name, "type": kind, "default": default, "meaning": (info.description or "").replace("``", "")}
        )
    return found
