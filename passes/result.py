"""What a run returns: the model, the graph, what was selected, what a backend made, the report; and saving them."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..graph.errors import ConfigError
from ..graph.ir import Graph
from ..graph.load import is_torch_model
from ..graph.save import replacing, save
from . import config
from .report import Report

if TYPE_CHECKING:
    from ..graph.actions import Plan
    from .pipeline import Pipeline


@dataclass
class Result:
    """What a pipeline made.

    Attributes:
        model: same kind as came in: ``nn.Module`` (the same class where possible) or ONNX.
        graph: the graph of that model.
        plan: what was selected, ``plan.weights = {weight: {axis: kept indices}}`` in terms of the model that came
            in (``fl.apply_plan`` applies it to other checkpoints); None where nothing was selected.
        artifact: what a backend made (``.run(inputs)``, ``.path``, ``.benchmark()``); None without P.Lower.
        report: per pass: contract, error measured, cost, time, memory, decisions with reasons.
        pipeline: the pipeline that ran.
    """

    model: Any
    graph: Graph
    report: Report
    pipeline: Pipeline
    plan: Plan | None = None
    artifact: Any | None = None

    def save(self, folder: str | Path) -> Path:
        """Write everything into ``folder`` and return it.

        Files: the model (torch: ``model.pt``, pickled, ``model.safetensors``, its weights, and ``structure.json``,
        its sizes, from which ``fl.load_pruned`` makes it again without unpickling; ONNX: ``model.onnx``),
        ``plan.json`` (if anything was selected), ``report.json``, ``report.html``,
        ``pipeline.yaml`` (options that are Python objects are left out and named in it), ``artifact*`` (what a
        backend made). Everything is
        written into a scratch folder first and renamed at the end: an earlier result there is replaced as a whole,
        and a failure leaves it as it was.

        Raises:
            ConfigError: ``folder`` is a file, or holds something that is not an earlier result.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ConfigError("the result goes into a folder, and this is a file", node=str(folder))
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "report.json").exists():
            raise ConfigError(
                "this folder holds something that is not an earlier result",
                node=str(folder),
                expected="a new, empty, or earlier result folder",
                found=", ".join(sorted(p.name for p in folder.iterdir())[:5]),
            )
        with replacing(folder) as scratch:
            scratch.mkdir()
            left_out = self._save_model(scratch)
            if self.plan is not None:
                _write(scratch / "plan.json", self.plan.to_json() + "\n")
            _write(scratch / "pipeline.yaml", self._pipeline_text())
            self._save_artifact(scratch)
            self.report.notes += [note for note in left_out if note not in self.report.notes]
            _write(scratch / "report.json", self.report.to_json())
            _write(scratch / "report.html", self.report.html())
        for note in left_out:
            warnings.warn(note, stacklevel=2)
        return folder

    def _pipeline_text(self) -> str:
        pipe = self.pipeline
        left_out: list[str] = []
        try:
            text = yaml.safe_dump(
                config.dump(pipe.name, pipe.seed, pipe.passes, left_out), sort_keys=False, allow_unicode=True
            )
        except ConfigError as exc:
            return f"# This pipeline has no text form: {exc.message} ({exc.value})\n"
        return "".join(f"# Left out, a Python object: {where}\n" for where in left_out) + text

    def _save_model(self, folder: Path) -> list[str]:
        """Write the model; return what could not be written, as notes."""
        if not is_torch_model(self.model):
            save(self.model, folder / "model.onnx")
            return []
        self._save_weights(folder)
        try:
            save(self.model, folder / "model.pt")
        except ConfigError as exc:
            return [f"model.pt was not written ({exc.message}); the weights are in model.safetensors"]
        return []

    def _save_weights(self, folder: Path) -> None:
        import json

        from ..graph.fx.pruned import STRUCTURE, structure

        save(self.model, folder / "model.safetensors")
        _write(folder / STRUCTURE, json.dumps(structure(self.model), separators=(",", ":")) + "\n")

    def _save_artifact(self, folder: Path) -> None:
        path = getattr(self.artifact, "path", None)
        if path is None:
            held = getattr(self.artifact, "model", None)
            if held is not None:
                save(held, folder / "artifact.onnx")
            return
        source = Path(path)
        if source.is_dir():
            shutil.copytree(source, folder / "artifact")
            return
        shutil.copy2(source, folder / f"artifact{source.suffix}")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
