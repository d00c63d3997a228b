"""Pipelines: order, validation, files, contracts checked around each pass, failure leaves everything as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import foldline as fl
import numpy as np
import onnx
import pytest
import torch
import yaml
from foldline import passes as P
from foldline.passes import registry
from foldline.passes.order import legal_order
from support.toygraph import ToyGraph, toy
from support.toypasses import ALL, Break, Fail, NeedsInt, Round, Swap, ToyCut

X = np.random.default_rng(5).standard_normal((3, 6)).astype(np.float32)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_local", {})
    for cls in ALL:
        registry.register(cls)
    yield


def run(graph: ToyGraph, x: np.ndarray) -> np.ndarray:
    return graph.run({"x": x}, [])[0][0]


# ---- running ------------------------------------------------------------------------------------------------
def test_exact_pass_is_verified_and_the_input_graph_is_untouched() -> None:
    graph = toy(6, 8, 4)
    before = {k: v.copy() for k, v in graph.data.items()}
    result = fl.Pipeline([Swap()]).run(graph, X)
    assert all(np.array_equal(before[k], graph.data[k]) for k in before)
    assert not np.array_equal(result.model["fc0.weight"], before["fc0.weight"])
    record = result.report.passes[0]
    assert record.comparison is not None and record.comparison["ok"]
    assert record.compared_on == ["example", "synthesised"]
    np.testing.assert_allclose(run(result.graph, X), run(graph, X), rtol=1e-5, atol=1e-6)


def test_a_pass_that_breaks_its_promise_is_stopped_and_named() -> None:
    with pytest.raises(fl.VerificationError) as caught:
        fl.Pipeline([ToyCut(), Swap(wrong=True)]).run(toy(6, 8, 4), X)
    assert caught.value.pass_name == "toyswap (2 of 2)"
    assert "toyswap (2 of 2)" in str(caught.value) and "fc0" in str(caught.value)
    assert caught.value.expected is not None and caught.value.found is not None


def test_without_verification_the_broken_promise_goes_unseen_and_the_report_says_so() -> None:
    result = fl.Pipeline([Swap(wrong=True)]).run(toy(6, 8, 4), X, verify=False)
    assert result.report.passes[0].verdict == "not verified"
    assert result.report.comparison is None


def test_rtol_loosens_the_bound() -> None:
    assert fl.Pipeline([Swap(wrong=True)]).run(toy(6, 8, 4), X, rtol=10.0).report.passes[0].comparison["ok"]


def test_approximate_pass_is_measured_on_the_real_inputs_alone() -> None:
    record = fl.Pipeline([ToyCut()]).run(toy(6, 8, 4), X).report.passes[0]
    assert record.compared_on == ["example"]
    measured = record.comparison["outputs"]["fc1"]
    graph = toy(6, 8, 4)
    cut = fl.Pipeline([ToyCut()]).run(graph, X, verify=False).graph
    a, b = run(graph, X).astype(float), run(cut, X).astype(float)
    assert measured["sqnr_db"] == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-4)
    assert measured["max_abs"] == pytest.approx(np.abs(a - b).max(), rel=1e-4)


def test_plans_compose_in_terms_of_the_model_that_came_in() -> None:
    graph = toy(6, 12, 4)
    result = fl.Pipeline([ToyCut(step=2), ToyCut(step=3)]).run(graph, X)
    assert result.plan.weights["fc0.weight"] == {0: [0, 6]}
    assert result.plan.shapes["fc0.weight"] == [12, 6]
    direct = np.take(graph.data["fc0.weight"], [0, 6], 0)
    assert np.array_equal(result.model["fc0.weight"], direct)


@pytest.mark.parametrize("bug", [False, True])
def test_failure_names_the_pass_and_leaves_the_model_alone(bug: bool) -> None:
    graph = toy(6, 8, 4)
    data = dict(graph.data)
    with pytest.raises(ZeroDivisionError if bug else fl.ConstraintError) as caught:
        fl.Pipeline([Swap(), Fail(bug=bug)], name="mine").run(graph, X)
    assert all(graph.data[k] is data[k] for k in data)
    if bug:
        assert any("toyfail" in note and "2 of 2" in note and "mine" in note for note in caught.value.__notes__)
    else:
        assert caught.value.pass_name == "toyfail (2 of 2)" and caught.value.node == "fc0"


def test_a_broken_graph_is_noticed() -> None:
    with pytest.raises(fl.ConstraintError, match="used before it is made") as caught:
        fl.Pipeline([Break()]).run(toy(6, 8, 4), X)
    assert caught.value.pass_name == "toybreak (1 of 1)"


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    models = [fl.Pipeline([Swap()], seed=s).run(toy(6, 8, 4), X).model["fc0.weight"].tobytes() for s in (1, 1, 2)]
    assert models[0] == models[1] != models[2]


def test_missing_calibration_is_found_before_the_model_is_loaded() -> None:
    with pytest.raises(fl.ConfigError, match="needs calibration data") as caught:
        fl.Pipeline([Swap(), Round()]).run("no_such_file.onnx")
    assert caught.value.pass_name == "toyround (2 of 2)"


def test_calibration_comes_from_the_run_or_from_the_pass_and_progress_sees_it() -> None:
    seen: list[str] = []

    def progress(items: Any, label: str) -> Any:
        seen.append(label)
        return items

    result = fl.Pipeline([Round()]).run(toy(6, 8, 4), calibration=[X, X], progress=progress)
    assert result.report.passes[0].details == {"batches": 2} and seen == ["calibrating"]
    assert result.report.passes[0].compared_on == ["calibration"]
    assert fl.Pipeline([Round(calibration=[X])]).run(toy(6, 8, 4)).report.passes[0].details == {"batches": 1}


def test_inplace_is_for_modules_only() -> None:
    with pytest.raises(fl.ConfigError, match="nn.Module"):
        fl.Pipeline([Swap()]).run(toy(6, 8, 4), inplace=True)


def test_pass_as_function() -> None:
    result = P.as_function(ToyCut)(toy(6, 8, 4), X, step=4)
    assert result.report.after.parameters < result.report.before.parameters
    assert result.plan.weights["fc0.bias"] == {0: [0, 4]}
    with pytest.raises(fl.ConfigError, match="no option 'stepp'"):
        P.as_function(ToyCut)(toy(6, 8, 4), stepp=4)


# ---- order --------------------------------------------------------------------------------------------------
def test_order_conflict_names_both_passes_and_the_legal_order() -> None:
    with pytest.raises(fl.ConstraintError) as caught:
        fl.Pipeline([Swap(), Round(), ToyCut()])
    text = str(caught.value)
    assert "'toycut'" in text and "'toyround'" in text and "'float'" in text
    assert caught.value.hint == "legal order: toyswap, toycut, toyround"


def test_a_fact_that_comes_later_or_never() -> None:
    with pytest.raises(fl.ConstraintError, match="'toyround' establishes only after") as caught:
        fl.Pipeline([NeedsInt(), Round()])
    assert "legal order: toyround, toypack" in str(caught.value)
    with pytest.raises(fl.ConstraintError, match="no pass before it establishes") as caught:
        fl.Pipeline([NeedsInt()])
    assert "toyround" in str(caught.value.hint)


def test_contradiction_without_any_legal_order() -> None:
    with pytest.raises(fl.ConstraintError, match="no order of these passes is legal"):
        fl.Pipeline([Round(), Round()])


def test_legal_order_search_finishes_on_many_passes() -> None:
    steps = [ToyCut() for _ in range(14)]
    assert legal_order([Round(), *steps], frozenset({"float"}))[-1].name == "toyround"
    assert legal_order([Round(), Round(), *steps], frozenset({"float"})) is None


def test_only_passes_and_at_least_one() -> None:
    with pytest.raises(fl.ConfigError, match="at least one"):
        fl.Pipeline([])
    with pytest.raises(fl.ConfigError, match=r"write Swap\(\)"):
        fl.Pipeline([Swap])  # type: ignore[list-item]


# ---- files --------------------------------------------------------------------------------------------------
PIPE: dict[str, Any] = {"name": "mine", "seed": 3, "passes": ["toyswap", {"toycut": {"step": 4}}]}


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".toml"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pipe{suffix}"
    if suffix == ".toml":
        path.write_text('name = "mine"\nseed = 3\npasses = ["toyswap", { toycut = { step = 4 } }]\n')
    else:
        path.write_text(json.dumps(PIPE) if suffix == ".json" else yaml.safe_dump(PIPE))
    pipe = fl.Pipeline.from_file(path)
    assert pipe.to_dict() == PIPE
    assert fl.Pipeline.from_dict(yaml.safe_load(pipe.to_yaml())).passes == (Swap(), ToyCut(step=4))


@pytest.mark.parametrize(
    ("data", "key", "words"),
    [
        ({"passses": []}, "passses", "did you mean 'passes'?"),
        ({"passes": ["toyswop"]}, "passes[0].toyswop", "did you mean 'toyswap'?"),
        ({"passes": [{"toycut": {"stap": 2}}]}, "passes[0].stap", "did you mean 'step'?"),
        ({"passes": ["toyswap", {"toycut": {"step": "two"}}]}, "passes[1].step", "valid integer"),
        ({"passes": [{"toycut": {}, "toyswap": {}}]}, "passes[0]", "one pass"),
        ({"passes": [], "name": "x"}, "passes", "at least 1"),
        ({"passes": [{"prune": {"ratio": 0.5, "target": "macs(0.5)"}}]}, "passes[0].prune", "exactly one of"),
        ({"passes": ["toyswap"], "seed": -1}, "seed", "greater than or equal to 0"),
    ],
)
def test_invalid_pipelines_name_the_key_and_the_nearest_valid_one(data: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(fl.ConfigError) as caught:
        fl.Pipeline.from_dict(data)
    assert caught.value.node == key
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.yaml", "passes: [unclosed", "cannot be parsed"),
        ("p.json", "{", "cannot be parsed"),
        ("p.toml", "= 1", "cannot be parsed"),
        ("p.yaml", "- a\n- b", "one mapping"),
        ("p.txt", "passes: [toyswap]", "unknown kind of pipeline file"),
        ("p.yaml", "passes: [toyswop]", "did you mean 'toyswap'?"),
    ],
)
def test_invalid_files_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(fl.ConfigError) as caught:
        fl.Pipeline.from_file(tmp_path / name)
    assert name in str(caught.value) and words in str(caught.value)
    with pytest.raises(fl.ConfigError, match="cannot be read"):
        fl.Pipeline.from_file(tmp_path / "absent.yaml")


def test_python_objects_have_no_text_form_but_targets_do() -> None:
    with pytest.raises(fl.ConfigError) as caught:
        fl.Pipeline([Round(calibration=iter([X]))]).to_yaml()
    assert caught.value.node == "passes[0].toyround.calibration"

    @registry.register
    class Aim(P.Pass):
        name: ClassVar[str] = "toyaim"
        target: fl.passes.targets.Target | None = None

    pipe = fl.Pipeline([Aim(target=fl.macs(0.5))])
    assert pipe.to_dict()["passes"] == [{"toyaim": {"target": "macs(0.5)"}}]
    for form in ("macs(0.5)", {"macs": 0.5}):
        again = fl.Pipeline.from_dict({"passes": [{"toyaim": {"target": form}}]})
        assert again.passes[0].target == fl.macs(0.5)
    with pytest.raises(fl.ConfigError, match="passes\\[0\\].target|is not a target"):
        fl.Pipeline.from_dict({"passes": [{"toyaim": {"target": "half"}}]})


def test_an_unregistered_pass_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_local", {})
    with pytest.raises(fl.ConfigError, match="registry does not know it"):
        fl.Pipeline([Swap()]).to_dict()


def test_schema_accepts_and_refuses_what_the_parser_does() -> None:
    schema = fl.Pipeline.json_schema()
    assert json.loads(json.dumps(schema)) == schema
    entries = schema["properties"]["passes"]["items"]["anyOf"]
    assert set(registry.names()) == set(entries[0]["enum"])
    assert set(registry.names()) == {next(iter(e["properties"])) for e in entries[1:]}
    for reference in json.dumps(schema).split('"#/$defs/')[1:]:
        assert reference.split('"')[0] in schema["$defs"]
    assert schema["$defs"]["ToyCut"]["additionalProperties"] is False
    assert schema["$defs"]["ToyCut"]["properties"]["step"]["description"] == "Keep every step-th unit."


def test_registry_refuses_a_name_that_is_taken() -> None:
    class Other(P.Pass):
        name: ClassVar[str] = "fold"

    with pytest.raises(fl.ConfigError, match="taken"):
        registry.register(Other)


def test_third_parties_add_passes_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_local", {})
    points = {
        "toycut": EntryPoint("toycut", "support.toypasses:ToyCut", registry.GROUP),
        "toyother": EntryPoint("toyother", "support.toypasses:Swap", registry.GROUP),
        "toygone": EntryPoint("toygone", "support.absent:ToyCut", registry.GROUP),
        "toyjunk": EntryPoint("toyjunk", "support.toygraph:toy", registry.GROUP),
    }
    monkeypatch.setattr(registry, "_third_party", lambda: points)
    assert registry.get("toycut") is ToyCut and P.get("toycut") is ToyCut
    assert P.toycut(toy(6, 8, 4), X, step=4).plan.weights["fc0.bias"] == {0: [0, 4]}
    assert fl.Pipeline.from_dict({"passes": [{"toycut": {"step": 4}}]}).passes == (ToyCut(step=4),)
    monkeypatch.delattr(P, "toycut")
    for name, words in (
        ("toyother", "must be its entry point's"),
        ("toygone", "cannot be loaded"),
        ("toyjunk", "no Pass"),
    ):
        with pytest.raises(fl.ConfigError, match=words):
            registry.get(name)


# ---- targets ------------------------------------------------------------------------------------------------
def test_targets() -> None:
    assert str(fl.macs(0.5)) == "macs(0.5)" and str(fl.params(3e6)) == "params(3000000)"
    assert fl.bytes(0.25).amount(100) == 25 and fl.latency(4.5).amount(100) == 4.5
    cost = fl.cost(toy(6, 8, 4))
    assert (fl.macs(0.5).of(cost), fl.params(0.5).of(cost), fl.bytes(0.5).of(cost)) == (80, 92, 368)
    for bad in (0, -1, float("nan"), float("inf"), True, "half"):
        with pytest.raises(fl.ConfigError):
            fl.macs(bad)  # type: ignore[arg-type]
    with pytest.raises(fl.ConfigError, match="measured"):
        fl.latency(0.5).of(cost)


# ---- nn.Module ----------------------------------------------------------------------------------------------
class Net(torch.nn.Module):
    """Two convolutions, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def net() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model, torch.randn(2, 3, 6, 6)


def test_module_goes_in_and_comes_out_and_the_callers_stays() -> None:
    model, x = net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    result = P.prune(model, x, criterion="l2", ratio=0.5)
    assert isinstance(result.model, Net) and result.model is not model
    assert result.model.conv.weight.shape == (4, 3, 3, 3) and result.model.head.weight.shape == (5, 4)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        expected = result.graph.run({k: torch.as_tensor(v) for k, v in result.graph.bind(x).items()}, [])[0][0]
        torch.testing.assert_close(result.model(x), torch.as_tensor(expected))


def test_plan_made_after_folding_also_fits_the_model_that_came_in() -> None:
    model, x = net()
    result = fl.Pipeline([P.Fold(), P.Prune(ratio=0.5)]).run(model, x)
    assert [r.name for r in result.report.passes if r.decisions] == ["fold", "prune"]
    kept = result.plan.weights["conv.weight"][0]
    assert len(kept) == 4 and result.plan.weights["norm.running_var"] == {0: kept}
    pruned = fl.apply_plan(model, result.plan, x)
    torch.testing.assert_close(pruned(x), result.model(x))


def test_inplace_keeps_parameter_objects_and_drops_stale_gradients() -> None:
    model, x = net()
    model(x).sum().backward()
    parameters = {name: p for name, p in model.named_parameters()}
    result = P.prune(model, x, ratio=0.5, inplace=True)
    assert result.model is model and model.conv.weight.shape == (4, 3, 3, 3)
    assert model.conv.out_channels == 4 and model.norm.num_features == 4
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert model.conv.weight.grad is None and model.head.bias.grad is not None
    reference, _ = net()
    expected = P.prune(reference, x, ratio=0.5).model
    torch.testing.assert_close(model(x), expected(x))


def test_finetune_trains_a_copy_and_takes_the_weights_back() -> None:
    model, x = net()
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def train(module: torch.nn.Module) -> None:
        module.train()
        with torch.no_grad():
            module.head.bias.add_(1.0)

    result = fl.Pipeline([P.FineTune(train)]).run(model, x)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(result.model.head.bias, state["head.bias"] + 1)
    torch.testing.assert_close(result.model(x), model(x) + 1)
    assert [d.subject for d in result.report.passes[0].decisions] == ["head.bias"]
    assert not result.model.training


def test_finetune_of_an_onnx_model_goes_through_a_module_and_back() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        small (float[n, 6] x) => (float[n, 4] y) <float[6, 4] w, float[4] b> { h = MatMul(x, w)  y = Add(h, b) }"""
    )
    rng = np.random.default_rng(0)
    del model.graph.initializer[:]
    arrays = {"w": rng.standard_normal((6, 4)).astype("f4"), "b": rng.standard_normal(4).astype("f4")}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    seen: list[torch.nn.Module] = []

    def train(module: torch.nn.Module) -> None:
        seen.append(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(torch.as_tensor(X)).square().sum().backward()
        optimizer.step()

    result = fl.Pipeline([P.FineTune(train)]).run(model, {"x": X})
    assert isinstance(result.model, onnx.ModelProto) and isinstance(seen[0], torch.nn.Module)
    y = X @ arrays["w"] + arrays["b"]
    expected = {"w": arrays["w"] - 0.2 * X.T @ y, "b": arrays["b"] - 0.2 * y.sum(0)}
    for name, array in expected.items():
        np.testing.assert_allclose(result.graph.weight(name).numpy(), array, rtol=1e-4, atol=1e-5)
        assert np.array_equal(fl.load(model).weight(name).numpy(), arrays[name])
    assert {d.subject for d in result.report.passes[0].decisions} == {"w", "b"}


def test_finetune_refuses_nan_and_unknown_functions() -> None:
    model, x = net()

    def poison(module: torch.nn.Module) -> None:
        with torch.no_grad():
            module.head.bias.fill_(float("nan"))

    with pytest.raises(fl.ConstraintError, match="NaN") as caught:
        fl.Pipeline([P.FineTune(poison)]).run(model, x)
    assert caught.value.node == "head.bias"
    for text, words in (("nope", "not a function's name"), ("json:nope", "cannot be found"), ("json:codecs", "not a")):
        with pytest.raises(fl.ConfigError, match=words):
            fl.Pipeline([P.FineTune(text)]).run("absent.onnx")
    assert fl.Pipeline([P.FineTune("json:loads")]).to_dict()["passes"] == [{"finetune": {"train": "json:loads"}}]


def test_lower_checks_the_backend_and_its_options_before_loading() -> None:
    with pytest.raises(fl.ConfigError, match="did you mean 'onnxruntime'?"):
        fl.Pipeline([P.Lower("onnxruntim")]).run("absent.onnx")
    with pytest.raises(fl.ConfigError, match="did you mean 'threads'?"):
        fl.Pipeline([P.Lower("onnxruntime", thread=1)]).run("absent.onnx")


def test_lower_measures_the_artifact_and_its_latency() -> None:
    model, x = net()
    result = fl.Pipeline([P.Fold(), P.Lower("onnxruntime", benchmark=True)]).run(model, x)
    record = result.report.passes[1]
    assert record.comparison["outputs"] and max(o["max_rel"] for o in record.comparison["outputs"].values()) < 1e-4
    assert record.details["latency"]["before_ms"] > 0 and record.details["latency"]["after_ms"] > 0
    np.testing.assert_allclose(result.artifact.run(x.numpy())[0], model(x).detach().numpy(), atol=1e-5)
