"""FX front end: capture leaves the model alone, the view mirrors the calls, edits keep view and graph equal."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline.graph.errors import ConstraintError, TraceError
from foldline.graph.fx import FXGraph, load_torch
from foldline.graph.fx.custom import dequantize_linear, quantize_linear
from foldline.graph.ir import Node
from support.timm_models import timm, transformers
from torch import Tensor, nn


class Net(nn.Module):
    """In-place activation, chunk and concat, a tied pair, a plain tensor attribute, a Python-number operand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.fc, self.twin = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.twin.weight = self.fc.weight
        self.shift = torch.linspace(0, 1, 8)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.act(self.bn(self.conv(x)))
        a, b = y.chunk(2, 1)
        y = torch.cat([b, a], 1).flatten(2).mean(-1)
        y = self.twin(self.fc(y)) + self.shift
        return {"logits": self.drop(y) * 2.0, "pair": (a, y)}


def nodes(graph: FXGraph, op: str) -> list[Node]:
    return [n for n in graph if n.op == op]


def execute(graph: FXGraph, batch: Any) -> list[Tensor]:
    return graph.run(graph.bind(batch))[0]


def consistent(graph: FXGraph) -> None:
    """The invariants of ir.Graph, and that a freshly built view of the same fx graph says the same."""
    names = [n.name for n in graph.nodes]
    assert len(set(names)) == len(names)
    seen = set(graph.inputs) | {w.value for w in graph.weights.values()}
    for node in graph.nodes:
        for i, v in enumerate(node.inputs):
            if v is not None:
                assert list(v.uses).count((node, i)) == 1
                assert v in seen or v.literal is not None, f"{node.name} reads {v.name} before it is made"
        seen |= set(node.outputs)
        for v in node.outputs:
            assert graph.values[v.name] is v and v.producer is node
    for v in graph.values.values():
        for node, i in v.uses:
            assert node.inputs[i] is v
    other = graph.clone()
    for a, b in zip(graph.nodes, other.nodes, strict=True):
        assert (a.name, a.op, a.attrs) == (b.name, b.op, b.attrs)
        assert [v and v.name for v in a.inputs] == [v and v.name for v in b.inputs]
        assert [v.shape for v in a.outputs] == [v.shape for v in b.outputs]


def test_loading_leaves_the_model_alone_and_remembers_it() -> None:
    model = Net().train()
    model.bn.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    graph = load_torch(model, torch.randn(1, 3, 6, 6))
    assert model.training and not model.bn.training and model.drop.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert graph.tensors["conv.weight"].data_ptr() == model.conv.weight.data_ptr()


def test_view_of_a_small_net() -> None:
    graph = load_torch(Net(), torch.randn(1, 3, 6, 6))
    consistent(graph)
    assert not nodes(graph, "opaque")
    conv, bn = nodes(graph, "conv")[0], nodes(graph, "batch_norm")[0]
    assert conv.scope == "conv" and conv.origin == "aten.conv2d.default" and "test_fx.py" in conv.location
    assert conv.attrs["padding"] == [(1, 1), (1, 1)] and conv.attrs["groups"] == 1 and not conv.attrs["transposed"]
    assert [v.name for v in bn.inputs[1:] if v] == ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    assert nodes(graph, "relu")[0].origin == "aten.relu.default"
    split = nodes(graph, "split")[0]
    assert split.attrs == {"axis": 1, "sizes": [4, 4]} and len(split.outputs) == 2
    mul = nodes(graph, "mul")[0]
    assert mul.inputs[1] is not None and float(mul.inputs[1].literal) == 2.0  # type: ignore[arg-type]
    assert isinstance(conv.output.shape[0], str) and conv.output.hint == (1, 8, 6, 6)  # type: ignore[index]
    weight = graph.weight("twin.weight")
    assert weight is graph.weight("fc.weight") and set(weight.aliases) == {"fc.weight", "twin.weight"}
    assert {w.name: w.kind for w in graph.weights.values()}["shift"] == "constant"
    assert weight.trainable and not graph.weight("bn.running_mean").trainable
    assert [v.name for v in graph.outputs] == [graph.outputs[0].name, split.outputs[0].name, graph.outputs[2].name]


def test_run_equals_the_model_at_another_batch_size() -> None:
    model = Net().eval()
    graph = load_torch(model, torch.randn(1, 3, 6, 6))
    x = torch.randn(5, 3, 6, 6)
    expected = model(x)
    for got in (execute(graph, x), execute(graph, {"x": x}), execute(graph, (x,))):
        torch.testing.assert_close(got, [expected["logits"], expected["pair"][0], expected["pair"][1]])
    module = graph.to_graph_module()
    assert set(module(x)) == {"logits", "pair"}
    torch.testing.assert_close(module(x)["logits"], expected["logits"])


def test_taps_and_gradients() -> None:
    model = Net().eval()
    graph = load_torch(model, torch.randn(2, 3, 6, 6))
    x = torch.randn(2, 3, 6, 6)
    conv = nodes(graph, "conv")[0]
    _, taps = graph.run(graph.bind(x), (conv.output.name, "conv.weight"))
    torch.testing.assert_close(taps[conv.output.name], model.conv(x))
    assert not taps[conv.output.name].requires_grad
    outputs, _ = graph.run(graph.bind(x), grad=True)
    (gradient,) = torch.autograd.grad(outputs[0].square().sum(), [graph.tensors["conv.weight"]])
    model(x)["logits"].square().sum().backward()
    torch.testing.assert_close(gradient, model.conv.weight.grad)
    with pytest.raises(ConstraintError, match="tap"):
        graph.run(graph.bind(x), ("nowhere",))


def test_inputs_of_every_form() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, items: list[Tensor], *, scale: Tensor, flag: bool = False) -> tuple[Tensor, ...]:
            return a + items[0] * scale, items[1] - a

    a, b, c, s = (torch.randn(3, 4) for _ in range(4))
    graph = load_torch(Two(), ((a, [b, c]), {"scale": s}))
    torch.testing.assert_close(execute(graph, ((a, [b, c]), {"scale": s})), [a + b * s, c - a])
    torch.testing.assert_close(execute(graph, {"a": a, "items": [b, c], "scale": s}), [a + b * s, c - a])
    assert len(graph.inputs) == 4 and all(v.shape is not None for v in graph.inputs)
    with pytest.raises(ConstraintError, match="scale"):
        graph.bind((a, [b, c]))
    with pytest.raises(ConstraintError, match="nested"):
        graph.bind(((a, (b, c)), {"scale": s}))


def test_a_batch_that_the_model_fixes_is_noted() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(12) if x.shape[0] == 1 else x.reshape(2, 6)

    graph = load_torch(Fixed(), torch.randn(1, 12))
    assert graph.inputs[0].shape == (1, 12) and any("batch" in n for n in graph.notes)
    assert tuple(execute(graph, torch.randn(1, 12))[0].shape) == (12,)


def test_inputs_that_do_not_fit_say_what_does() -> None:
    class Keywords(nn.Module):
        """A wrapper that passes everything on: torch.export leaves no batch open here."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 6)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            x = kwargs["x"]
            return self.inner(x).reshape(x.shape[0], 2, 3)

    graph = load_torch(Keywords(), {"x": torch.randn(2, 4)})
    with pytest.raises(ConstraintError, match="cannot run") as caught:
        execute(graph, {"x": torch.randn(4, 4)})
    assert "as large as the example inputs (batch size is fixed" in str(caught.value.hint)
    graph = load_torch(nn.Linear(4, 6), torch.randn(2, 4))
    with pytest.raises(ConstraintError, match="cannot run") as caught:
        execute(graph, torch.randn(2, 5))
    assert caught.value.hint == "give inputs like the example inputs"


def test_untraceable_model_names_the_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x  # data-dependent

    with pytest.raises(TraceError, match=r"test_fx\.py:\d+ in forward: return x if float"):
        load_torch(Branch(), torch.randn(2, 3))


def test_in_place_operations_become_functional() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = y + 1
            y.add_(z)  # result unused: later reads of y must see it
            y.relu_()
            return y - z

    class OnView(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x) * 2
            y[:, 1:3].add_(1.0)
            return y + x

    for model in (InPlace().eval(), OnView().eval()):
        x = torch.randn(4, 6)
        graph = load_torch(model, x)
        assert all(not str(n.native.target._schema.name).endswith("_") for n in graph)
        torch.testing.assert_close(execute(graph, x), [model(x)])
    assert any("views" in n for n in graph.notes)


def test_no_grad_and_autocast_regions_open_up() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                frozen = self.fc(x)
            with torch.autocast("cpu", enabled=False):
                y = self.fc(x) * 3
            return y + frozen

    model, x = Regions(), torch.randn(2, 4)
    graph = load_torch(model, x)
    assert not nodes(graph, "opaque") and len(nodes(graph, "linear")) == 2
    torch.testing.assert_close(execute(graph, x), [model(x)])
    outputs, _ = graph.run(graph.bind(x), grad=True)
    (got,) = torch.autograd.grad(outputs[0].sum(), [graph.tensors["fc.bias"]])
    assert torch.equal(got, torch.full((4,), 6.0))  # three per item; the frozen branch adds nothing


def test_running_never_writes_the_callers_buffers() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1.0)
            return x * self.seen

    model, x = Counter(), torch.randn(2, 3)
    graph = load_torch(model, x)
    for _ in range(2):
        torch.testing.assert_close(execute(graph, x), [x])
    torch.testing.assert_close(graph.to_graph_module()(x), x)
    result = graph.to_model()
    assert torch.equal(model.seen, torch.zeros(3)) and type(result) is Counter
    result(x)
    torch.testing.assert_close(result(x), 2 * x)
    with pytest.raises(ValueError, match="read-only"):
        graph.weight("seen").numpy()[0] = 1.0


def test_control_flow_is_opaque_but_runs() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.a(y), lambda y: self.b(y) * 2, (x,))

    model, x = Choice(), torch.rand(2, 4)
    graph = load_torch(model, x)
    assert [n.origin for n in nodes(graph, "opaque")] == ["higher_order.cond"]
    for batch in (x, -x):
        torch.testing.assert_close(execute(graph.clone(), batch), [model(batch)])


def test_compiled_module_is_unwrapped() -> None:
    model = nn.Linear(4, 4)
    graph = load_torch(torch.compile(model), torch.randn(2, 4))
    assert set(graph.weights) == {"weight", "bias"} and "unwrapped" in graph.notes[0]


def test_meta_models_load_without_data() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(50_000, 4096), nn.Linear(4096, 4096))
    graph = load_torch(model, torch.zeros(1, 3, dtype=torch.int64))
    weight = graph.weight("1.weight")
    graph.slice_weight(weight, {0: np.arange(100)})
    graph.slice_weight(graph.weight("1.bias"), {0: np.arange(100)})
    graph.refresh()
    assert graph.outputs[0].shape is not None and graph.outputs[0].shape[-1] == 100
    with pytest.raises(ConstraintError, match="meta"):
        weight.numpy()


def test_slicing_changes_only_this_graph() -> None:
    model = Net().eval()
    graph, x = load_torch(model, torch.randn(2, 3, 6, 6)), torch.randn(3, 3, 6, 6)
    before, other = copy.deepcopy(model.state_dict()), graph.clone()
    kept = np.array([6, 1, 3])
    for name in ("fc.weight", "fc.bias"):
        graph.slice_weight(graph.weight(name), {0: kept, **({1: kept} if name == "fc.weight" else {})})
    graph.slice_weight(graph.weight("shift"), {0: kept})
    graph.slice_weight(graph.weight("conv.weight"), {0: np.array([0, 1, 2, 4, 5, 6])})
    for name in ("conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        graph.slice_weight(graph.weight(name), {0: np.array([0, 1, 2, 4, 5, 6])})
    graph.set_attr(nodes(graph, "split")[0], sizes=[3, 3])
    graph.slice_weight(graph.weight("fc.weight"), {1: np.array([0, 1, 2])})
    with pytest.raises(ConstraintError, match="shapes do not fit"):
        graph.refresh()  # the concat still has six channels: fc reads three
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(execute(other, x)[0], model(x)["logits"])
    assert isinstance(graph.tensors["fc.weight"], nn.Parameter) and graph.tensors["fc.weight"].requires_grad
    with pytest.raises(ConstraintError, match="out of range"):
        graph.slice_weight(graph.weight("fc.bias"), {0: np.array([3])})


class Baked(nn.Module):
    """Sizes baked into calls: heads in a reshape, split sizes, expand, pad, group norm, layer norm, full."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.gn = nn.Linear(12, 24), nn.LayerNorm(24), nn.GroupNorm(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.qkv(x))
        y = self.gn(y.transpose(1, 2)).transpose(1, 2)
        b, n, _ = y.shape
        heads = y.view(b, n, 4, 6).transpose(1, 2).reshape(b * 4, n, 6)
        low, high = heads.reshape(b, 4, n, 6).split([2, 4], -1)
        low = F.pad(low, (0, 2)) + torch.full((4, 1, 4), 0.5)
        return (low + high)[:, :, :, 1:4].mean((2, 3)) + high[:, :, 0, 3].expand(-1, 4)


def test_baked_sizes_are_rewritten() -> None:
    model = Baked().eval()
    x = torch.randn(3, 5, 12)
    graph = load_torch(model, x)
    assert [n.attrs["shape"] for n in nodes(graph, "reshape")][:2] == [[None, 5, 4, 6], [None, 5, 6]]
    rows = np.arange(24).reshape(4, 6)[[0, 2, 3]].reshape(-1)
    for name in ("qkv.weight", "qkv.bias", "norm.weight", "norm.bias", "gn.weight", "gn.bias"):
        graph.slice_weight(graph.weight(name), {0: rows})
    assert nodes(graph, "layer_norm")[0].attrs["normalized_shape"] == [18]
    graph.set_attr(nodes(graph, "group_norm")[0], groups=3)
    for node in nodes(graph, "reshape"):
        graph.set_attr(node, shape=[3 if s == 4 else s for s in node.attrs["shape"]])
    graph.set_attr(nodes(graph, "full")[0], shape=[3, 1, 4])
    graph.refresh()
    consistent(graph)

    class Smaller(Baked):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm, self.gn = nn.Linear(12, 18), nn.LayerNorm(18), nn.GroupNorm(3, 18)

        def forward(self, x: Tensor) -> Tensor:
            y = self.gn(self.norm(self.qkv(x)).transpose(1, 2)).transpose(1, 2)
            low, high = y.view(*y.shape[:2], 3, 6).transpose(1, 2).split([2, 4], -1)
            low = F.pad(low, (0, 2)) + 0.5
            return (low + high)[:, :, :, 1:4].mean((2, 3)) + high[:, :, 0, 3]

    smaller = Smaller().eval()
    state = {k: v[rows] for k, v in model.state_dict().items()}
    smaller.load_state_dict(state)
    torch.testing.assert_close(execute(graph, x), [smaller(x)])


@pytest.mark.parametrize(
    ("build", "change", "want"),
    [
        (lambda x: torch.cat(x.chunk(2, 1), 1), {"split": {"sizes": [1, 5]}}, lambda x: x),
        (lambda x: x.repeat(1, 2), {"tile": {"repeats": [1, 3]}}, lambda x: x.repeat(1, 3)),
        (lambda x: x.roll(2, 1), {"roll": {"shifts": [1]}}, lambda x: x.roll(1, 1)),
        (lambda x: x[:, 1:4], {"slice": {"starts": [2], "ends": [None]}}, lambda x: x[:, 2:]),
        (lambda x: x.narrow(1, 0, 2), {"slice": {"ends": [5]}}, lambda x: x[:, :5]),
        (lambda x: x.select(1, 0), {"select": {"index": 4}}, lambda x: x[:, 4]),
        (lambda x: F.pad(x, (1, 0)), {"pad": {"pads": [(0, 0), (2, 3)]}}, lambda x: F.pad(x, (2, 3))),
        (lambda x: x.unflatten(1, (2, 3)), {"reshape": {"shape": [None, 3, 2]}}, lambda x: x.view(-1, 3, 2)),
        (
            lambda x: x.repeat_interleave(2, 1),
            {"repeat_interleave": {"repeats": 3}},
            lambda x: x.repeat_interleave(3, 1),
        ),
        (lambda x: x[:, :1].expand(-1, 4), {"expand": {"shape": [None, 5]}}, lambda x: x[:, :1].expand(-1, 5)),
        (lambda x: x + torch.arange(6), {"arange": {"start": 1, "end": 7}}, lambda x: x + torch.arange(1, 7)),
        (
            lambda x: torch.movedim(x[None], 0, 1),
            {"transpose": {"perm": [2, 1, 0]}},
            lambda x: x[None].permute(2, 1, 0),
        ),
        (lambda x: F.leaky_relu(x, 0.1), {"leaky_relu": {"slope": 0.5}}, lambda x: F.leaky_relu(x, 0.5)),
        (
            lambda x: F.pixel_shuffle(x.view(-1, 1, 6, 1).expand(-1, 4, -1, -1), 2),
            {"expand": {"shape": [None, 9, None, None]}, "pixel_shuffle": {"factor": 3}},
            lambda x: F.pixel_shuffle(x.view(-1, 1, 6, 1).expand(-1, 9, -1, -1), 3),
        ),
    ],
)
def test_set_attr_changes_the_native_call(build: Any, change: dict[str, dict[str, Any]], want: Any) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return build(x)

    x = torch.randn(3, 6)
    graph = load_torch(Wrapped(), x)
    torch.testing.assert_close(execute(graph, x), [build(x)])
    for op, attrs in change.items():
        graph.set_attr(nodes(graph, op)[0], **attrs)
    graph.refresh()
    torch.testing.assert_close(execute(graph, x), [want(x)])
    assert graph.outputs[0].hint == tuple(want(x).shape)
    consistent(graph)


def test_unchangeable_attribute_says_so() -> None:
    graph = load_torch(Net(), torch.randn(2, 3, 6, 6))
    with pytest.raises(ConstraintError, match="cannot be changed"):
        graph.set_attr(nodes(graph, "linear")[0], transposed_weight=True)


INSERTS: list[tuple[str, int, dict[str, Any], Any]] = [
    *[(op, 1, {}, getattr(torch, op)) for op in ("relu", "tanh", "exp", "neg", "abs", "sigmoid", "square", "floor")],
    *[(op, 2, {}, getattr(torch, op)) for op in ("add", "sub", "mul", "div", "maximum", "minimum", "eq", "lt", "fmod")],
    ("identity", 1, {}, lambda x: x),
    ("gelu", 1, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ("reshape", 1, {"shape": [None, 2, 3]}, lambda x: x.reshape(-1, 2, 3)),
    ("transpose", 1, {"perm": [1, 0]}, lambda x: x.T),
    ("concat", 2, {"axis": 1}, lambda x, y: torch.cat([x, y], 1)),
    ("slice", 1, {"axes": [1], "starts": [1], "ends": [None], "steps": [2]}, lambda x: x[:, 1::2]),
    ("pad", 1, {"pads": [(0, 0), (1, 2)], "mode": "constant", "value": 3.0}, lambda x: F.pad(x, (1, 2), value=3.0)),
    ("cast", 1, {"dtype": "float64"}, lambda x: x.double()),
    ("clip", 1, {"min": -0.5, "max": None}, lambda x: x.clamp(min=-0.5)),
    ("softmax", 1, {"axis": 1}, lambda x: x.softmax(1)),
    ("mean", 1, {"axes": [1], "keepdims": True}, lambda x: x.mean(1, keepdim=True)),
]


@pytest.mark.parametrize(("op", "count", "attrs", "want"), INSERTS, ids=[i[0] for i in INSERTS])
def test_insert(op: str, count: int, attrs: dict[str, Any], want: Any) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x) + 0.0 * y

    x, y = torch.randn(4, 6), torch.randn(4, 6)
    graph = load_torch(Plain(), (x, y))
    node = graph.insert(op, graph.inputs[:count], attrs, name="made", after=graph.nodes[-1], scope="here")
    assert node.op == op and node.scope == "here" and all(node.attrs[k] == v for k, v in attrs.items())
    graph.replace_uses(graph.outputs[0], node.output)
    consistent(graph)
    assert graph.outputs == [node.output] and node.output.is_output
    torch.testing.assert_close(execute(graph, (x, y)), [want(*(x, y)[:count])])


def test_insert_weighted_layers_and_fills() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    x, w, b = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3), torch.randn(3)
    graph = load_torch(Plain(), x)
    weights = [graph.add_weight("extra", w.numpy(), trainable=True), graph.add_weight("extra", b.numpy())]
    assert [v.weight.name for v in weights if v.weight] == ["extra", "extra_2"]
    relu = graph.nodes[-1]
    attrs = {"stride": [2, 2], "padding": [(1, 1), (1, 1)], "dilation": [1, 1], "groups": 1, "transposed": False}
    conv = graph.insert("conv", [relu.output, *weights], attrs, name="down", after=relu)
    full = graph.insert("full", [], {"shape": [3, 1, 1], "value": 2.0}, name="two")
    add = graph.insert("add", [conv.output, full.output], name="plus", after=conv)
    gather = graph.insert(
        "gather",
        [add.output, graph.add_weight("order", np.array([2, 0])).weight.value],
        {"axis": 1},
        name="pick",
        after=add,  # type: ignore[union-attr]
    )
    graph.replace_uses(relu.output, gather.output, except_nodes=[conv])
    graph.refresh()
    consistent(graph)
    want = (F.conv2d(x.relu(), w, b, stride=2, padding=1) + 2.0)[:, [2, 0]]
    torch.testing.assert_close(execute(graph, x), [want])
    with pytest.raises(ConstraintError, match="made after"):
        graph.insert("add", [add.output, relu.output], name="early", after=relu)
    with pytest.raises(ConstraintError, match="cannot be inserted"):
        graph.insert("lstm", [relu.output], name="no", after=relu)


def test_quantize_dequantize_are_onnx_semantics() -> None:
    x = torch.tensor([[0.05, 0.15, -0.25, 90.0], [1.0, -1.0, 0.349, 0.351]])
    scale, zero = torch.tensor([0.1, 0.2]), torch.tensor([3, 0], dtype=torch.int8)
    q = quantize_linear(x, scale, zero, 0, "int8", 0)
    want = np.clip(np.rint(x.numpy() / scale.numpy()[:, None]) + zero.numpy()[:, None], -128, 127)
    assert q.dtype == torch.int8 and np.array_equal(q.numpy(), want.astype(np.int8))
    back = dequantize_linear(q, scale, zero, 0, "int8", 0)
    assert torch.equal(back, (q.float() - zero.float()[:, None]) * scale[:, None])
    blocks = torch.tensor([[0.1, 0.5], [0.2, 1.0]])
    assert torch.equal(
        quantize_linear(x, blocks, None, 1, "uint4", 2),
        (x / blocks.repeat_interleave(2, 1)).round().clamp(0, 15).to(torch.uint8),
    )
    graph = load_torch(nn.ReLU(), x)
    s = graph.add_weight("s", np.float32(0.1))
    q_node = graph.insert("quantize", [graph.inputs[0], s], {"dtype": "uint8"}, name="q")
    dq = graph.insert("dequantize", [q_node.output, s], {"dtype": "uint8"}, name="dq", after=q_node)
    graph.replace_uses(graph.inputs[0], dq.output, except_nodes=[q_node])
    consistent(graph)
    assert q_node.output.dtype == "uint8" and q_node.attrs == {"axis": None, "dtype": "uint8", "block": 0}
    torch.testing.assert_close(execute(graph, x)[0], (x / 0.1).round().clamp(0, 255) * 0.1)


def test_rewiring_and_erasing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.ReLU(), nn.Linear(4, 4, bias=False)).eval()
    x = torch.randn(3, 4)
    graph = load_torch(model, x)
    relu, last = nodes(graph, "relu")[0], nodes(graph, "linear")[1]
    with pytest.raises(ConstraintError, match="are used"):
        graph.erase(relu)
    name = graph.outputs[0].name
    graph.set_input(last, 2, graph.add_weight("3.bias", np.ones(4, np.float32)))
    graph.set_input(last, 0, relu.inputs[0])
    graph.erase(relu)
    graph.refresh()
    consistent(graph)
    torch.testing.assert_close(execute(graph, x), [F.linear(model[0](x), model[3].weight, torch.ones(4))])
    graph.set_input(last, 2, None)
    assert "3.bias" not in graph.weights and last.inputs[2] is None
    graph.replace_uses(last.output, graph.inputs[0])
    assert graph.outputs[0].name == name and graph.inputs[0].name != name
    graph.erase(last)
    assert "3.weight" not in graph.weights
    torch.testing.assert_close(execute(graph, x), [x])
    consistent(graph)


def test_scalar_operand_becomes_a_tensor_operand() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() ** 2.0 > 0.5

    x = torch.randn(3, 4)
    graph = load_torch(Power(), x)
    power, greater = nodes(graph, "pow")[0], nodes(graph, "gt")[0]
    graph.set_input(power, 1, graph.add_weight("p", np.float32(3.0)))
    graph.set_input(greater, 1, graph.add_weight("t", np.full((4,), 0.1, np.float32)))
    assert torch.equal(execute(graph, x)[0], x.abs() ** 3.0 > 0.1)
    consistent(graph)


def test_batch_symbols_are_consistent() -> None:
    graph = load_torch(Baked(), torch.randn(7, 5, 12))
    (symbol,) = {s for v in graph.inputs for s in v.shape or () if isinstance(s, str)}
    merged = next(v for v in graph.values.values() if v.shape is not None and v.shape[:1] == (f"4*{symbol}",))
    assert merged.hint is not None and merged.hint[0] == 28
    graph.set_hints(**{symbol: 3})
    assert merged.hint is not None and merged.hint[0] == 12 and graph.inputs[0].hint == (3, 5, 12)


def test_bfloat16_weights_keep_their_bits() -> None:
    model = nn.Linear(4, 4).bfloat16()
    graph = load_torch(model, torch.randn(2, 4, dtype=torch.bfloat16))
    weight = graph.weight("weight")
    data = weight.numpy()
    assert data.dtype.name == "bfloat16" == weight.dtype
    graph.set_weight(weight, data * 2)
    assert torch.equal(graph.tensors["weight"], model.weight * 2)


def test_recurrent_layers() -> None:
    for layer, gates in ((nn.LSTM(5, 6, 2, bidirectional=True), 4), (nn.GRU(5, 6, bias=False, batch_first=True), 3)):
        x = torch.randn(4, 3, 5)
        graph = load_torch(layer, x)
        node = next(n for n in graph if n.op in ("lstm", "gru"))
        assert node.attrs["gates"] == gates and node.attrs["hidden"] == 6
        per = 4 if node.attrs["has_biases"] else 2
        directions = 2 if node.attrs["bidirectional"] else 1
        assert len(node.inputs) == 3 + per * node.attrs["layers"] * directions
        torch.testing.assert_close(execute(graph, x)[0], layer(x)[0])
        consistent(graph)


def _tiny_transformers() -> dict[str, tuple[Any, dict[str, Tensor]]]:
    hf = transformers()
    ids = torch.randint(0, 90, (2, 7))
    common = dict(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        bos_token_id=1,
        eos_token_id=2,
    )
    causal = {"input_ids": ids, "use_cache": False}
    return {
        "bert": (hf.BertModel(hf.BertConfig(**common)), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
        "gpt2": (
            hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    vocab_size=99, n_embd=16, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
                )
            ),
            causal,
        ),
        "llama": (hf.LlamaForCausalLM(hf.LlamaConfig(**common, num_key_value_heads=2)), causal),
        "t5": (
            hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
            ),
            {**causal, "decoder_input_ids": ids[:, :5]},
        ),
    }


def _covered(model: nn.Module, batch: Any) -> None:
    model.eval()
    graph = load_torch(model, batch)
    assert sorted({n.origin for n in graph if n.op == "opaque"}) == []
    with torch.no_grad():
        want = model(**batch) if isinstance(batch, dict) else model(batch)
    want = [t for t in torch.utils._pytree.tree_leaves(want) if isinstance(t, Tensor)]
    torch.testing.assert_close(execute(graph, batch), want)
    consistent(graph)


@pytest.mark.model
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_transformers_leave_nothing_opaque(name: str) -> None:
    _covered(*_tiny_transformers()[name])


SMALL = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "regnetx_002": {},
}
LARGE = {
    "resnet50": {}, "mobilenetv3_large_100": {}, "efficientnet_b0": {}, "convnext_tiny": {}, "densenet121": {},
    "regnety_004": {}, "vit_small_patch16_224": {"img_size": 64}, "mixer_s16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4},
}  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize("name", SMALL)
def test_vision_models_leave_nothing_opaque(name: str) -> None:
    _covered(timm().create_model(name, **SMALL[name]), torch.randn(1, 3, 32, 32))


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_vision_models_leave_nothing_opaque(name: str) -> None:
    _covered(timm().create_model(name, **LARGE[name]), torch.randn(2, 3, 64, 64))


def test_torch_layers_leave_nothing_opaque() -> None:
    _covered(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), torch.randn(2, 5, 16))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attn(x, x, x)

    _covered(Attention(), torch.randn(2, 5, 16))

    class Composites(nn.Module):
        """Composite calls that have no canonical form of their own are opened up."""

        def forward(self, x: Tensor) -> Tensor:
            y = F.channel_shuffle(x[:, :, None, None], 2).flatten(1)
            y = torch.lerp(y, x, 0.3) + torch.addcmul(x, y, y, value=0.5)
            mean = torch.var_mean(y, 1)[1]
            return torch.diff(y) + torch.outer(mean, mean)[0].sum()

    _covered(Composites(), torch.randn(3, 6))
