"""BackendSpec: the document, its conditions, files that extend others, shipped specs, and what reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from foldline.backends import get
from foldline.backends.onnxruntime.host import cpu_target
from foldline.graph.errors import ConfigError
from foldline.graph.fx import load_torch
from foldline.passes.base import Context
from foldline.passes.quantize import BackendSpec, OpPlacement, Quantize, TensorFormat
from foldline.passes.quantize.choices import chosen, narrowed
from foldline.passes.quantize.spec.files import load_spec
from foldline.passes.quantize.spec.op_rules import FACTS
from foldline.passes.quantize.spec.validate import ATTRIBUTES
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "backends"
SHIPPED = sorted(FOLDER.glob("*/specs/*.yaml"))
SMALL = {
    "target": "toy",
    "activations": {"dtype": "int8", "symmetric": True},
    "weights": {"dtype": "int8", "symmetric": True, "granularity": "out_channel"},
    "ops": {"linear": {"role": "anchor", "weight": 1, "bias": 2}},
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_specs_are_valid_and_survive_their_plain_form(path: Path) -> None:
    spec = BackendSpec.from_yaml(path)
    assert spec.target == path.stem and spec.schema == 1 and spec.release and spec.description
    assert BackendSpec.from_dict(spec.to_dict()) == spec
    assert spec.ops["conv"] and spec.ops["linear"] and spec.channel_multiple > 1


def test_the_json_schema_names_every_field() -> None:
    schema = BackendSpec.json_schema()
    assert set(schema["properties"]) == set(BackendSpec.from_dict(SMALL).to_dict())
    assert {"target", "activations", "weights", "ops"} <= set(schema["required"])
    assert set(schema["$defs"]) >= {"TensorFormat", "OpPlacement", "ExportRules", "RoundingArithmetic"}
    assert schema["additionalProperties"] is False


def test_every_named_target_is_shipped() -> None:
    assert {p.stem for p in SHIPPED} >= {
        "onnxruntime-cpu", "onnxruntime-cpu-avx2", "onnxruntime-arm", "onnxruntime-cuda", "tensorrt", "tensorrt-fp8",
        "tensorrt-int4", "cuda", "inductor-cpu",
    }  # fmt: skip
    for name in ("onnxruntime-cpu", "onnxruntime-cpu-avx2", "onnxruntime-arm", "onnxruntime-cuda"):
        spec = get(name).spec
        assert spec is not None and spec.target == name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": 1}, "colour"),
        ({"commute": ["reshape"]}, "did you mean 'commutes'"),
        ({"schema": 2}, "another version"),
        ({"activations": {"dtype": "int7"}}, "activations.dtype"),
        ({"weights": {"dtype": "int4", "granularity": "block"}}, "block size"),
        ({"ops": {"add": {"role": "residual"}}}, "behind"),
        ({"ops": {"gather": {"role": "table"}}}, "names the weight's position"),
        ({"ops": {"conv": {"role": "anchor", "when": {"in_channels": {"least": 3}}}}}, "when.in_channels"),
        ({"forbidden": ["everything"]}, "forbidden"),
        ({"schema": "1"}, "another version"),
        ({"activations": {"dtype": "int88"}}, "did you mean 'int8'"),
        ({"weights": {"dtype": "int8", "range": [-200, 200]}}, "value: weights.range"),
        ({"activations": {"dtype": "int8", "granularity": "out_channel"}}, "activations.granularity"),
        ({"weights": {"dtype": "float4_e2m1"}}, "did you mean 'float4_e2m1fn'"),
        ({"ops": {"convolution": {"role": "anchor", "weight": 1}}}, "did you mean 'conv'"),
        ({"commutes": ["max_pool", "reshap"]}, "value: commutes.1"),
        ({"ops": {"conv": {"role": "ancor", "weight": 1}}}, "did you mean 'anchor'"),
        ({"ops": {"conv": {"role": "anchor"}}}, "value: ops.conv.0.weight"),
        ({"ops": {"linear": {"role": "anchor", "weight": 0, "data": [1]}}}, "the weight of linear is its operand 1"),
        ({"ops": {"matmul": {"role": "anchor", "data": [0, -1]}}}, "counted from 0"),
        ({"ops": {"conv": {"role": "anchor", "weight": 1, "bias": 1}}}, "different operands"),
        ({"ops": {"conv": {"role": "anchor", "weight": 1, "activations": ["relu9"]}}}, "ops.conv.0.activations.0"),
        ({"ops": {"add": {"role": "residual", "behind": ["convs"]}}}, "did you mean 'conv'"),
        ({"ops": {"conv": {"role": "anchor", "weight": 1, "when": {"in_chanels": 8}}}}, "did you mean 'in_channels'"),
        (
            {"ops": {"conv": {"role": "float", "when": {"in_channels": {"multiple_of": 0}}}}},
            "when.in_channels.multiple_of",
        ),
        ({"ops": {"conv": {"role": "float", "when": {"in_channels": {"min": "8"}}}}}, "a bound is a number"),
        ({"channel_multiple": 0}, "channel_multiple"),
        ({"export": {"opset": 99}}, "export.opset"),
        ({"target": ""}, "a target has a name"),
    ],
)
def test_a_wrong_document_says_what_is_wrong(change: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BackendSpec.from_dict({**SMALL, **change}, "toy.yaml")
    assert said in str(caught.value) and "toy.yaml" in str(caught.value)


def test_conditions_name_what_the_page_on_operators_names() -> None:
    page = (FOLDER.parent / "docs" / "ops.md").read_text()
    assert [a for a in sorted(ATTRIBUTES) if not re.search(rf"\b{a}\b", page)] == []
    about = OpPlacement.__doc__ or ""
    assert [fact for fact in sorted(FACTS) if f"``{fact}``" not in about] == []


def test_a_file_extends_another_and_a_target(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(SMALL))
    own = {"extends": "base", "target": "mine", "ops": {"linear": None, "conv": {"role": "float", "reason": "no"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    spec = BackendSpec.from_yaml(tmp_path / "mine.yaml")
    assert spec.target == "mine" and set(spec.ops) == {"conv"} and spec.weights.dtype == "int8"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"extends": "onnxruntime-cpu", "target": "other"}))
    with pytest.raises(ConfigError, match="not known"):
        BackendSpec.from_yaml(tmp_path / "other.yaml")
    found = load_spec(tmp_path / "other.yaml", lambda name: get(name).spec.to_dict())
    assert found.target == "other" and found.ops == get("onnxruntime-cpu").spec.ops
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"extends": "loop"}))
    with pytest.raises(ConfigError, match="extends itself"):
        BackendSpec.from_yaml(tmp_path / "loop.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        BackendSpec.from_yaml(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        BackendSpec.from_yaml(tmp_path / "absent.yaml")


def test_quantize_takes_a_spec_file_and_checks_it_first(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "extends": None}).replace("extends: null\n", ""))
    context = Context(calibration=[torch.randn(2, 4)], backends=get)
    graph = load_torch(nn.Linear(4, 3).eval(), torch.randn(2, 4))
    outcome = Quantize(target=str(path)).apply(graph, context)
    assert outcome.details["target"] == "toy" and outcome.details["weights"] == 1
    with pytest.raises(ConfigError, match="cannot be read"):
        Quantize(target=str(tmp_path / "none.yaml")).prepare(context)
    with pytest.raises(ConfigError, match="did you mean 'adaround'"):
        Quantize(rounding="adarond").prepare(context)


def test_conditions_on_nodes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(6, 12, 3, groups=3)
            self.b = nn.Conv2d(12, 12, 1, groups=12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    graph = load_torch(Net().eval(), torch.randn(1, 6, 5, 5))
    grouped, depthwise = (n for n in graph.nodes if n.op == "conv")

    def unmet(node, **when) -> str | None:
        return OpPlacement("anchor", weight=1, when=when).unmet(node)

    assert unmet(grouped, in_channels=6, out_channels=12, kernel=9, depthwise=False, weight_rank=4, rank=4) is None
    assert unmet(depthwise, in_channels=12, out_channels=12, kernel=1, depthwise=True) is None
    assert unmet(grouped, out_channels={"multiple_of": 4, "min": 8, "max": 12}) is None
    assert unmet(grouped, groups=[1, 3]) is None
    assert unmet(grouped, out_channels={"multiple_of": 8}) == "out_channels is 12, the target wants a multiple of 8"
    assert unmet(grouped, groups=[1, 2]) == "groups is 3, the target wants 1 or 2"
    assert unmet(grouped, in_channels={"min": 16}) == "in_channels is 6, the target wants at least 16"


def test_the_host_picks_its_instruction_set() -> None:
    assert cpu_target("x86_64", frozenset({"avx2", "avx512_vnni"})) == "onnxruntime-cpu"
    assert cpu_target("AMD64", frozenset({"avx2", "avx_vnni"})) == "onnxruntime-cpu"
    assert cpu_target("x86_64", frozenset({"avx2"})) == "onnxruntime-cpu-avx2"
    assert cpu_target("aarch64", frozenset()) == "onnxruntime-arm"
    assert get("onnxruntime-cpu-host").spec.target == cpu_target()


def test_seven_bits_do_not_saturate_pairs_of_products() -> None:
    form = get("onnxruntime-cpu-avx2").spec.weights
    assert 2 * 255 * max(abs(form.limits[0]), form.limits[1]) < 2**15
    assert 2 * 255 * 127 > 2**15


def test_bits_are_held_in_the_smallest_type_that_the_target_has() -> None:
    form = TensorFormat("int8", symmetric=True, granularity="out_channel")
    assert narrowed(form, 4).range == (-8, 7) and narrowed(form, 4).dtype == "int8"
    assert narrowed(form, 4, ("int4",)) == TensorFormat("int4", symmetric=True, granularity="out_channel")
    assert narrowed(form, 3, ("int4",)).range == (-4, 3) and narrowed(form, 3, ("int4",)).dtype == "int4"
    assert narrowed(form, 8) == form
    assert narrowed(TensorFormat("uint8"), 4).range == (0, 15)
    assert narrowed(form, 12, ("int16",)).dtype == "int16"
    # A spec that leaves -128 out, or keeps to seven bits, is not widened.
    assert narrowed(TensorFormat("int8", range=(-127, 127)), 8).range == (-127, 127)
    assert narrowed(TensorFormat("int8", range=(-64, 64)), 8).range == (-64, 64)
    with pytest.raises(ConfigError, match="2 to 8"):
        narrowed(form, 9)
    with pytest.raises(ConfigError, match="floating"):
        narrowed(TensorFormat("float8_e4m3fn"), 4)


def test_formats_that_a_user_writes() -> None:
    form = TensorFormat("int8", symmetric=True, granularity="out_channel")
    assert chosen({"dtype": "int4", "block": 32}, form, (), "k") == TensorFormat(
        "int4", symmetric=True, granularity="block", block=32
    )
    assert chosen({"bits": 4, "granularity": "tensor"}, form, (), "k").granularity == "tensor"
    assert chosen(form, TensorFormat("uint8"), (), "k") is form
    with pytest.raises(ConfigError, match=r"formats\.head\.weight\.dtype"):
        chosen({"dtype": "int9"}, form, (), "formats.head.weight")
    with pytest.raises(ConfigError, match="a number of bits or a mapping"):
        chosen("four", form, (), "k")


def test_the_pruner_rounds_to_the_targets_multiple() -> None:
    from foldline import passes as P

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 4)).eval(), torch.randn(2, 8)
    result = P.prune(model, x, ratio=0.3, round_to="onnxruntime-cpu")
    assert get("onnxruntime-cpu").spec.channel_multiple == 16
    assert result.model[0].out_features == 64
    with pytest.raises(ConfigError, match="there is no backend"):
        P.prune(model, x, ratio=0.3, round_to="onnxruntime-gpu")


def test_the_example_of_an_accelerator_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent / "examples"))
    import accelerator

    result = accelerator.main()
    said = capsys.readouterr().out
    assert "multiples of 8 output channels" in said and "wants one scale for operands and result" in said
    details = result.report.passes[-1].details
    assert details["target"] == "tile-8" and details["weights"] == 5
    bits = {d["weight"]: (d["weight_dtype"], d["weight_bits"]) for d in details["layers"].values()}
    assert bits["conv1.weight"] == ("int4", 4) and bits["stem.weight"] == ("int8", 8)
    assert details["activations"]["x"]["dtype"] == "uint8"
