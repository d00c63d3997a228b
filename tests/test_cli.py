"""The command line: every command on a small model, exit codes, one clear message on stderr, MODEL in all its forms."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from foldline import cli

MODEL = '''"""A model for the command line."""
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 8)
        self.down = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def make():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(3, 6),)


def bare():
    return make()[0]


def broken():
    raise RuntimeError("no such weights")
'''

PIPELINE = """
name: smaller
seed: 2
passes:
  - prune: {ratio: 0.5}
"""


def onnx_model(scale: float = 1.0) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        small (float[n, 6] x) => (float[n, 4] y) <float[6, 8] w, float[8, 4] v>
        { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"""
    )
    rng = np.random.default_rng(0)
    del model.graph.initializer[:]
    for name, shape in (("w", (6, 8)), ("v", (8, 4))):
        array = (rng.standard_normal(shape) * scale).astype("f4")
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module, an ONNX file, a pipeline and calibration data, as the current one."""
    (tmp_path / "clinet.py").write_text(MODEL)
    (tmp_path / "pipe.yaml").write_text(PIPELINE)
    onnx.save(onnx_model(), str(tmp_path / "m.onnx"))
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "cal.npz", x=rng.standard_normal((70, 6)).astype("f4"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "out", cli.Console(width=140))
    yield tmp_path
    sys.modules.pop("clinet", None)


def call(*arguments: str) -> int:
    """Exit code of the command in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return int(caught.value.code or 0)


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# ---- run ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["m.onnx", "clinet.py:make", "clinet:make"])
def test_run_writes_the_result_and_prints_the_report(
    here: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert call("run", "pipe.yaml", model, "-o", "out") == 0
    text = capsys.readouterr().out
    assert "smaller" in text and "prune" in text and "report.html" in text
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["seed"] == 2 and report["verify"] and report["after"]["macs"] * 2 == report["before"]["macs"]
    assert report["model"]["name"] == ("m" if model.endswith("onnx") else "Net")
    assert (here / "out" / ("model.onnx" if model.endswith("onnx") else "model.safetensors")).exists()


def test_run_takes_an_exported_program(here: Path) -> None:
    sys.path.insert(0, str(here))
    import clinet

    model, inputs = clinet.make()
    torch.export.save(torch.export.export(model, inputs), str(here / "m.pt2"))
    assert call("run", "pipe.yaml", "m.pt2", "-o", "out", "-q") == 0
    assert json.loads((here / "out" / "report.json").read_text())["after"]["parameters"] == 4 * 7 + 4 * 5


def test_run_takes_the_name_of_one_pass(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "fold", "m.onnx", "-o", "out") == 0
    assert "fold" in capsys.readouterr().out and (here / "out").is_dir()
    assert call("run", "fuld", "m.onnx", "-o", "other") == 1
    assert "did you mean 'fold'?" in capsys.readouterr().err


def test_run_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "pipe.yaml", "m.onnx", "-o", "out", "--seed", "7", "--no-verify", "-q") == 0
    assert capsys.readouterr().out == ""
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["seed"] == 7 and not report["verify"]


@pytest.mark.parametrize("source", ["cal.npz", "folder"])
def test_run_with_calibration(here: Path, source: str) -> None:
    (here / "folder").mkdir()
    for i in range(3):
        np.save(here / "folder" / f"{i}.npy", np.load(here / "cal.npz")["x"][i * 8 : i * 8 + 8])
    (here / "q.yaml").write_text("passes: [quantize]")
    assert call("run", "q.yaml", "m.onnx", "-o", "out", "--calibration", source, "--input-shape", "5x6") == 0
    record = json.loads((here / "out" / "report.json").read_text())["passes"][0]
    assert record["details"]["batches"] == 3  # 70 samples in batches of 32, or three files
    assert record["comparison"]["outputs"]["y"]["sqnr_db"] > 20


# ---- the others ---------------------------------------------------------------------------------------------
def test_inspect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", "clinet.py:make") == 0
    text = capsys.readouterr().out
    assert "axis groups" in text and "graph output" in text and "free" in text and "total" in text
    assert call("inspect", "m.onnx", "--json") == 0
    data = printed_json(capsys)
    assert data["cost"]["macs"] == 80 and data["kind"] == "onnx"
    groups = {g["name"]: g for g in data["groups"]}
    assert "select" in groups["w:1"]["actions"] and groups["v:1"]["reason"].startswith("graph output")


def test_check(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", "m.onnx", "--target", "onnxruntime-cpu", "--json") == 0
    assert isinstance(printed_json(capsys), list)
    bad = onnx_model()
    bad.graph.node[1].op_type = "Rulo"
    onnx.save(bad, str(here / "bad.onnx"))
    assert call("check", "bad.onnx", "-t", "onnxruntime-cpu") == 1
    assert "error" in capsys.readouterr().out


def test_diff_is_zero_for_equal_and_one_for_different_models(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(onnx_model(), str(here / "same.onnx"))
    onnx.save(onnx_model(1.5), str(here / "other.onnx"))
    assert call("diff", "m.onnx", "same.onnx", "--input-shape", "2x6") == 0
    assert "equal within" in capsys.readouterr().out
    assert call("diff", "m.onnx", "other.onnx") == 1
    assert "the first value that differs: h" in capsys.readouterr().out
    assert call("diff", "m.onnx", "other.onnx", "--rtol", "5") == 0
    capsys.readouterr()
    assert call("diff", "m.onnx", "other.onnx", "--json") == 1
    data = printed_json(capsys)
    assert data["comparison"]["first_divergence"] == "h" and data["before"] == data["after"]


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("passes") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("fold", "prune", "quantize", "finetune", "lower"))
    assert call("passes", "prune") == 0
    assert "round_to" in capsys.readouterr().out
    assert call("passes", "--json") == 0
    assert {p["name"]: p["contract"] for p in printed_json(capsys)}["fold"] == "exact"
    assert call("passes", "--schema") == 0
    assert printed_json(capsys) == fl.Pipeline.json_schema()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("version") == 0
    assert capsys.readouterr().out.strip() == fl.__version__


# ---- errors -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "absent.yaml", "m.onnx", "-o", "out"], "ConfigError"),
        (["run", "pipe.yaml", "absent.onnx", "-o", "out"], "ModelFileError"),
        (["run", "pipe.yaml", "m.onnx", "-o", "out", "--calibration", "pipe.yaml"], "unknown kind of calibration"),
        (["run", "pipe.yaml", "m.onnx", "-o", "out", "--input-shape", "axb"], "this is no shape"),
        (["run", "pipe.yaml", "m.onnx", "-o", "out", "--input-shape", "2x7"], "contradicts"),
        (["run", "pipe.yaml", "m.onnx", "-o", "out", "--input-shape", "xx=2x6"], "names no input"),
        (["inspect", "clinet.py:mak"], "did you mean 'make'?"),
        (["inspect", "clinet.py:broken"], "no such weights"),
        (["inspect", "nothere.py:make"], "no such Python file"),
        (["inspect", "not_a_module:make"], "cannot be imported"),
        (["check", "m.onnx", "-t", "onnxruntime-cp"], "did you mean 'onnxruntime-cpu'?"),
        (["passes", "prun"], "did you mean 'prune'?"),
    ],
)
def test_errors_are_one_message_on_stderr(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert call(*arguments) == 1
    found = capsys.readouterr()
    assert words in found.err and "Traceback" not in found.err and found.out == ""
    assert not (here / "out").exists()


def test_traceback_shows_where_from(here: Path) -> None:
    with pytest.raises(fl.ConfigError):
        cli.main(["passes", "prun", "--traceback"])


@pytest.mark.parametrize("arguments", [["run"], ["nope"], ["run", "pipe.yaml", "m.onnx"], ["passes", "--nope"]])
def test_wrong_usage_is_two(here: Path, arguments: list[str]) -> None:
    assert call(*arguments) == 2


def test_a_bare_module_takes_its_inputs_from_the_shape(here: Path) -> None:
    assert call("run", "pipe.yaml", "clinet.py:bare", "-o", "out", "--input-shape", "3x6", "-q") == 0


def test_as_a_process(here: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "foldline.cli", "version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fl.__version__
    done = subprocess.run([sys.executable, "-m", "foldline.cli", "inspect", "x.onnx"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("ModelFileError") and done.stdout == ""


def test_the_command_starts_fast_without_torch() -> None:
    """Help and lists must not wait for torch."""
    code = "import sys, foldline, foldline.cli, foldline.passes.registry as r; [r.get(n) for n in r.names()]"
    found = subprocess.run(
        [sys.executable, "-c", code + "; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


def test_a_model_that_cannot_be_traced_ends_with_one_message(tmp_path: Path) -> None:
    """In a process of its own: torch logs and prints pages while an attempt fails."""
    (tmp_path / "bad.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Bad(nn.Module):\n    def forward(self, x):\n"
        "        if x.sum() > 0:\n            return x\n        return 2 * x\n\n\n"
        "def make():\n    return Bad(), (torch.randn(2, 4),)\n\n\n"
        "def wrong():\n    return nn.Linear(4, 4), (torch.randn(2, 5),)\n"
    )
    for name, line, words in (("make", "x.sum() > 0", "cannot be traced"), ("wrong", "(2, 5)", "fails on the example")):
        done = subprocess.run(
            [sys.executable, "-m", "foldline.cli", "inspect", f"bad.py:{name}"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and line in done.stderr and words in done.stderr
        assert done.stderr.startswith("TraceError") and len(done.stderr.splitlines()) <= 6, done.stderr
