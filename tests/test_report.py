"""Reports: data, determinism, explanations, the HTML page, and saving a result without half-written output."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
from foldline import passes as P
from foldline.passes.report import change, count, jsonable, size
from support.toygraph import toy
from support.toypasses import Round, Swap, ToyCut

X = np.random.default_rng(5).standard_normal((3, 6)).astype(np.float32)


def made(**options: Any) -> P.Result:
    steps = [Swap(), ToyCut(step=2), Round(calibration=[X])]
    return fl.Pipeline(steps, name="compress", **options).run(toy(6, 8, 4), X)


def test_to_dict_is_strict_json_and_deterministic_but_for_times() -> None:
    one, two = made().report, made().report
    assert one.to_json(times=False) == two.to_json(times=False)
    data = json.loads(one.to_json(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert data == one.to_dict()
    assert [p["name"] for p in data["passes"]] == ["toyswap", "toycut", "toyround"]
    assert {"seconds", "peak_bytes", "check_seconds"} <= set(data["passes"][0])
    assert "seconds" not in one.to_dict(times=False)["passes"][0]
    assert data["passes"][1]["options"] == {} and data["passes"][1]["decisions"][0]["action"] == "cut"
    assert data["before"] == {"parameters": 92, "bytes": 368, "macs": 80}
    assert data["after"] == {"parameters": 48, "bytes": 192, "macs": 40}
    assert data["passes"][0]["seconds"] >= 0 and data["passes"][0]["peak_bytes"] > 1 << 20


def test_explain_says_what_happened_and_why() -> None:
    report = made().report
    text = report.explain("fc0")
    assert "toyswap (exact)" in text and "permuted, because the order of hidden units is free" in text
    assert "every 2. unit stays" in text and "fc0.weight: axis 0 keeps 4 of 8" in text
    assert "fc1.weight: axis 1 keeps 4 of 8" in report.explain("fc1.weight")
    assert "every 2. unit stays" in report.explain("fc0.bias")  # mentioned in the decision's data
    assert "nothing happened to it" in report.explain("relu0")
    with pytest.raises(fl.ConstraintError, match="did you mean 'fc0'"):
        report.explain("fc00")


def test_explain_does_not_confuse_names_that_share_a_beginning() -> None:
    graph = toy(6, 8, 4)
    report = fl.Pipeline([Swap()]).run(graph, X).report
    report.passes[0].decisions = [P.Decision("layer1.conv", "cut", "because")]
    report.names = frozenset({"layer1.conv", "layer10.conv"})
    assert "cut" in report.explain("layer1")
    assert "nothing happened" in report.explain("layer10")


def test_text_has_every_pass_and_the_totals() -> None:
    text = str(made().report)
    for words in ("compress on toy", "toyswap", "exact", "verified", "approximate", "-47.8%", "every 2. unit stays"):
        assert words in text, words
    import io

    from rich.console import Console

    for width in (60, 80, 200):
        stream = io.StringIO()
        Console(file=stream, width=width).print(made().report)
        assert max(map(len, stream.getvalue().splitlines())) <= width


def test_errors_per_layer_are_measured_and_explained() -> None:
    graph = toy(6, 8, 8, 4)
    report = fl.Pipeline([Round(calibration=[X], bits=5)]).run(graph, X).report
    layers = {item["layer"]: item["sqnr_db"] for item in report.passes[0].layers}
    assert list(layers) == ["fc0", "fc1", "fc2"]
    after = fl.Pipeline([Round(calibration=[X], bits=5)]).run(graph, X).graph
    a, b = graph.run({"x": X}, ["fc1"])[1]["fc1"], after.run({"x": X}, ["fc1"])[1]["fc1"]
    assert layers["fc1"] == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-4)
    assert f"fc1: output at {layers['fc1']:.1f} dB" in report.explain("fc1")
    assert "error per layer" in report.html()


class Page(HTMLParser):
    """Checks nesting and collects tags, links and text."""

    VOID = frozenset({"meta", "input", "rect", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_is_well_formed_self_contained_and_complete() -> None:
    report = made().report
    report.passes[2].details["latency"] = {"before_ms": 4.0, "after_ms": 1.0}
    html = report.html()
    page = Page(html)
    assert not re.search(r"https?:|//|url\(|@import|<link|<img", html.split("</style>")[0] + html.split("</style>")[1])
    for tag, key, value in page.attributes:
        assert key not in ("src", "srcset", "data") and (key != "href" or str(value).startswith("#")), (tag, key, value)
    anchors = {v for _, k, v in page.attributes if k == "id"}
    assert {str(v)[1:] for t, k, v in page.attributes if t == "a" and k == "href"} <= anchors
    text = " ".join(page.texts)
    for words in ("toyswap", "toycut", "toyround", "every 2. unit stays", "4 of 8", "graph output <fc1>", "Latency"):
        assert words in text, words
    assert "prefers-color-scheme: dark" in html and "<svg" in html


def test_html_bars_have_lengths_in_proportion() -> None:
    html = made().report.html()
    bars = re.findall(r'<rect class="(before|after)"[^>]* width="([\d.]+)"', html)
    assert bars[0] == ("before", "430.0") and float(bars[1][1]) == pytest.approx(430 * 48 / 92, abs=0.1)


def test_html_escapes_what_models_call_themselves() -> None:
    graph = toy(6, 8, 4)
    graph.name = "<script>alert(1)</script>"
    html = fl.Pipeline([ToyCut()], name="a<b>").run(graph, X).report.html()
    assert "<script>alert" not in html and "<b>" not in html.split("Pipeline")[1].split("model")[0].replace("<b>a", "")
    Page(html)


def test_numbers_as_text() -> None:
    assert [count(x) for x in (0, 999, 1500, 11_689_512, 4.1e9)] == ["0", "999", "1.5 k", "11.69 M", "4.1 G"]
    assert [size(x) for x in (10, 2048, 44.6 * 2**20)] == ["10 B", "2 KiB", "44.6 MiB"]
    assert [change(*x) for x in ((2, 1), (2, 2), (2, 3), (0, 3))] == ["-50.0%", "=", "+50.0%", "new"]
    odd = {
        "a": np.float32(1.5),
        "b": np.arange(2),
        "c": {3, 1},
        "d": float("nan"),
        4: P.Contract.EXACT,
        "e": fl.macs(0.5),
    }
    assert jsonable(odd) == {"a": 1.5, "b": [0, 1], "c": [1, 3], "d": None, "4": "exact", "e": "macs(0.5)"}


# ---- saving -------------------------------------------------------------------------------------------------
def small_onnx() -> onnx.ModelProto:
    text = """<ir_version: 8, opset_import: ["": 17]>
    small (float[n, 6] x) => (float[n, 4] y) <float[6, 8] w, float[8, 4] v>
    { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    del model.graph.initializer[:]
    for name, shape in (("w", (6, 8)), ("v", (8, 4))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name))
    return model


def test_save_onnx_result(tmp_path: Path) -> None:
    model = small_onnx()
    before = model.SerializeToString()
    result = fl.Pipeline([P.Prune(ratio=0.5), P.Lower("onnxruntime")]).run(model, {"x": X})
    assert model.SerializeToString() == before
    assert isinstance(result.model, onnx.ModelProto)
    folder = result.save(tmp_path / "out")
    assert {p.name for p in folder.iterdir()} == {
        "model.onnx", "artifact.onnx", "plan.json", "report.json", "report.html", "pipeline.yaml",
    }  # fmt: skip
    again = fl.load(folder / "model.onnx")
    assert again.weight("w").shape == (6, 4)
    assert fl.Pipeline.from_file(folder / "pipeline.yaml").to_dict() == result.pipeline.to_dict()
    assert json.loads((folder / "report.json").read_text())["passes"][0]["name"] == "prune"
    replay = fl.apply_plan(small_onnx(), folder / "plan.json")
    assert fl.load(replay).weight("w").shape == (6, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_saved_pipeline_names_the_python_objects_it_leaves_out(tmp_path: Path) -> None:
    steps = [P.Prune(ratio=0.5), P.Quantize(calibration=[X])]
    folder = fl.Pipeline(steps).run(small_onnx(), {"x": X}).save(tmp_path / "out")
    text = (folder / "pipeline.yaml").read_text()
    assert text.startswith("# Left out, a Python object: passes[1].quantize.calibration\n")
    assert fl.Pipeline.from_file(folder / "pipeline.yaml").to_dict()["passes"] == [
        {"prune": {"ratio": 0.5}},
        "quantize",
    ]


def test_save_replaces_an_earlier_result_as_a_whole_and_nothing_else(tmp_path: Path) -> None:
    result = fl.Pipeline([P.Prune(ratio=0.5)]).run(small_onnx(), {"x": X})
    folder = result.save(tmp_path / "out")
    (folder / "stale.txt").write_text("from the earlier run")
    result.save(folder)
    assert not (folder / "stale.txt").exists() and (folder / "model.onnx").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("ten years")
    with pytest.raises(fl.ConfigError, match="not an earlier result"):
        result.save(precious)
    assert (precious / "thesis.tex").read_text() == "ten years"
    with pytest.raises(fl.ConfigError, match="this is a file"):
        result.save(precious / "thesis.tex")


def test_a_failure_while_saving_leaves_the_earlier_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = fl.Pipeline([P.Prune(ratio=0.5)]).run(small_onnx(), {"x": X})
    folder = result.save(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(type(result.report), "html", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        result.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_same_input_and_seed_give_the_same_files(tmp_path: Path) -> None:
    folders = [
        fl.Pipeline([P.Prune(ratio=0.5)], seed=1).run(small_onnx(), {"x": X}).save(tmp_path / name) for name in "ab"
    ]
    for name in ("model.onnx", "plan.json", "pipeline.yaml"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_save_module_result_and_say_what_cannot_be_pickled(tmp_path: Path) -> None:
    class Local(torch.nn.Sequential):
        """A class that pickle cannot find."""

    torch.manual_seed(0)
    x = torch.randn(3, 6)
    layers = [torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)]
    result = P.prune(torch.nn.Sequential(*layers).eval(), x, ratio=0.5)
    folder = result.save(tmp_path / "plain")
    loaded = torch.load(folder / "model.pt", weights_only=False)
    assert torch.equal(loaded(x), result.model(x))
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    assert state["0.weight"].shape == (4, 6) and set(state) == set(result.model.state_dict())
    with pytest.warns(UserWarning, match=r"model\.pt was not written"):
        local = P.prune(Local(*layers).eval(), x, ratio=0.5)
        folder = local.save(tmp_path / "local")
    assert not (folder / "model.pt").exists() and (folder / "model.safetensors").exists()
    assert "model.pt was not written" in (folder / "report.json").read_text()


# ---- fl.save and fl.load ------------------------------------------------------------------------------------
def test_save_and_load_by_suffix(tmp_path: Path) -> None:
    fl.save(small_onnx(), tmp_path / "a.onnx")
    graph = fl.load(tmp_path / "a.onnx")
    fl.save(graph, tmp_path / "b.onnx")
    assert fl.compare(graph, fl.load(str(tmp_path / "b.onnx")), [{"x": X}]).ok
    fl.verify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    with pytest.raises(fl.ConfigError, match="cannot be saved under this suffix"):
        fl.save(small_onnx(), tmp_path / "a.pt")
    with pytest.raises(fl.ConfigError, match="no model"):
        fl.save({"a": 1}, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.onnx", "no such model file"),
        (".", "folder"),
        ("x.pth", "build the module in Python"),
        ("x.xyz", "kind"),
    ],
)
def test_load_refuses_with_the_way_out(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "x.pth").write_bytes(b"")
    (tmp_path / "x.xyz").write_bytes(b"")
    with pytest.raises(fl.ModelFileError, match=words):
        fl.load(tmp_path / name)


def test_load_refuses_other_objects_and_broken_programs(tmp_path: Path) -> None:
    with pytest.raises(fl.ConfigError, match="cannot load|can load"):
        fl.load({"weights": 3})
    (tmp_path / "broken.pt2").write_bytes(b"not a zip")
    with pytest.raises(fl.ModelFileError, match="cannot read"):
        fl.load(tmp_path / "broken.pt2")


def test_verify_names_the_first_value_that_differs(tmp_path: Path) -> None:
    other = small_onnx()
    changed = onnx.numpy_helper.to_array(other.graph.initializer[0]) * 1.01
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(changed, "w"))
    with pytest.raises(fl.VerificationError) as caught:
        fl.verify(small_onnx(), other)
    assert str(caught.value.value).startswith("h ")
    assert fl.verify(small_onnx(), other, rtol=0.1).ok
