"""Writing back: the caller's class where it can express the edits, a faithful GraphModule where it cannot."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foldline.graph.fx import FXGraph, load_torch
from foldline.graph.fx.modes import trainable_module
from foldline.graph.fx.module import write_back
from foldline.graph.ir import Node
from support.toys_base import fill
from torch import Tensor, nn


def nodes(graph: FXGraph, op: str) -> list[Node]:
    return [n for n in graph if n.op == op]


def keep(graph: FXGraph, names: str, axis: int, kept: Any) -> None:
    for name in names.split():
        graph.slice_weight(graph.weight(name), {axis: np.asarray(kept)})


def same_function(model: nn.Module, graph: FXGraph, *inputs: Tensor) -> None:
    got = model.eval()(*inputs)
    want, _ = graph.run(graph.bind(inputs))
    torch.testing.assert_close([t for t in torch.utils._pytree.tree_leaves(got)], want)


class Conv(nn.Module):
    """conv-bn-relu-drop twice, depthwise in between, a linear head; an unused parameter and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.gn = nn.GroupNorm(4, 8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)
        self.spare = nn.Parameter(torch.ones(3))
        self.register_buffer("ramp", torch.linspace(0.0, 1.0, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.deep(F.relu(self.bn1(self.conv1(x)))))
        return self.head(self.drop(x.mean((2, 3)))) + self.ramp


def prune_conv(graph: FXGraph) -> None:
    kept = [0, 1, 4, 5, 6, 7]
    keep(graph, "conv1.weight bn1.weight bn1.bias bn1.running_mean bn1.running_var deep.weight deep.bias", 0, kept)
    keep(graph, "gn.weight gn.bias", 0, kept)
    keep(graph, "head.weight", 1, kept)
    graph.set_attr(next(n for n in nodes(graph, "conv") if n.scope == "deep"), groups=6)
    graph.set_attr(nodes(graph, "group_norm")[0], groups=3)
    graph.refresh()


def test_pruned_layers_keep_class_names_and_attributes() -> None:
    model = fill(Conv()).train()
    model.gn.eval()
    model.conv1.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 3, 6, 6)
    graph = load_torch(model, x)
    prune_conv(graph)
    result = graph.to_model()
    assert type(result) is Conv and graph.notes == []
    assert list(result.state_dict()) == list(state)
    assert (result.conv1.in_channels, result.conv1.out_channels) == (3, 6)
    assert (result.deep.in_channels, result.deep.out_channels, result.deep.groups) == (6, 6, 6)
    assert (result.gn.num_groups, result.gn.num_channels) == (3, 6)
    assert result.bn1.num_features == 6 and result.head.in_features == 6
    assert result.training and not result.gn.training and result.drop.training
    assert not result.conv1.weight.requires_grad and result.head.weight.requires_grad
    same_function(result, graph, x)
    result.train()(x).sum().backward()
    with torch.no_grad():
        for p in result.parameters():
            p.add_(1.0)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items()), "the caller's model changed"
    assert all(p.grad is None for p in model.parameters())


def test_two_results_share_nothing() -> None:
    graph = load_torch(fill(Conv()), torch.randn(2, 3, 6, 6))
    prune_conv(graph)
    first, second = graph.to_model(), graph.to_model()
    pointers = {t.data_ptr() for t in first.state_dict().values()}
    assert pointers.isdisjoint(t.data_ptr() for t in second.state_dict().values())
    assert pointers.isdisjoint(t.data_ptr() for t in graph.source.module.state_dict().values())  # type: ignore[union-attr]


class Heads(nn.Module):
    """Attention whose sizes live in attributes: heads, head_dim, a tuple of split sizes."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.splits = (width, 2 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, kv = self.qkv(x).split(self.splits, -1)
        q = q.reshape(b, n, self.heads, self.head_dim).transpose(1, 2)
        k, v = kv.reshape(b, n, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(b, n, self.heads * self.head_dim))


def drop_head(graph: FXGraph, prefix: str = "") -> None:
    rows = np.arange(36).reshape(3, 3, 4)[:, [0, 2]].reshape(-1)
    keep(graph, f"{prefix}qkv.weight {prefix}qkv.bias", 0, rows)
    keep(graph, f"{prefix}proj.weight", 1, np.arange(12).reshape(3, 4)[[0, 2]].reshape(-1))
    path = prefix.rstrip(".")
    for n in graph.nodes:
        if n.scope != path:
            continue
        if n.op == "split":
            graph.set_attr(n, sizes=[8, 16])
        elif n.op == "reshape":
            old = n.attrs["shape"]
            new = [8 if s == 12 else 2 if (s == 3 and i == len(old) - 2) else s for i, s in enumerate(old)]
            graph.set_attr(n, shape=new)


def test_sizes_in_attributes_of_custom_modules_are_patched() -> None:
    model, x = fill(Heads()), torch.randn(2, 5, 12)
    graph = load_torch(model, x)
    drop_head(graph)
    graph.refresh()
    result = graph.to_model()
    assert type(result) is Heads and graph.notes == []
    assert (result.heads, result.head_dim, result.splits) == (2, 4, (8, 16))
    assert (model.heads, model.splits) == (3, (12, 24))
    same_function(result, graph, x)


def test_size_equal_by_chance_is_left_alone() -> None:
    class Chance(Heads):
        """``period`` equals the width that shrinks, and the forward needs its old value."""

        def __init__(self) -> None:
            super().__init__()
            self.period = 12

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(self.period)

    graph, x = load_torch(fill(Chance()), torch.randn(2, 5, 12)), torch.randn(4, 5, 12)
    drop_head(graph)
    graph.refresh()
    result = graph.to_model()
    assert type(result) is Chance and (result.heads, result.period) == (2, 12)
    same_function(result, graph, x)


class Literal(Heads):
    """The same attention with its sizes written as numbers: no attribute can express the edit."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, kv = self.qkv(x).split((12, 24), -1)
        q = q.reshape(b, n, 3, 4).transpose(1, 2)
        k, v = kv.reshape(b, n, 2, 3, 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 12))


def test_literal_sizes_give_a_graph_module_and_say_where() -> None:
    model, x = fill(Literal()).train(), torch.randn(2, 5, 12)
    graph = load_torch(model, x)
    drop_head(graph)
    graph.refresh()
    result = graph.to_model()
    assert isinstance(result, torch.fx.GraphModule) and result.training
    assert list(result.state_dict()) == list(model.state_dict())
    (note,) = graph.notes
    assert "Literal" in note and "[12, 24] -> [8, 16]" in note and "test_fx_module.py" in note
    same_function(result, graph, x)


def test_only_the_layer_that_must_becomes_a_graph_module() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Literal(), Literal()])
            self.norm = nn.LayerNorm(12)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(self.norm(x))
            return x

    model, x = fill(Stack()), torch.randn(2, 5, 12)
    graph = load_torch(model, x)
    drop_head(graph, "layers.0.")
    drop_head(graph, "layers.1.")
    graph.refresh()
    result = graph.to_model()
    assert type(result) is Stack and list(result.state_dict()) == list(model.state_dict())
    assert all(isinstance(layer, torch.fx.GraphModule) for layer in result.layers)
    assert "layers.0, layers.1" in graph.notes[-1]
    same_function(result, graph, torch.randn(3, 5, 12))
    result.train()(x).sum().backward()
    assert result.layers[0].qkv.weight.grad is not None


def test_zero_weights_hide_nothing() -> None:
    """With proj at zero, a wrong order of heads would change no output: the check must still see it."""

    class Swapped(Heads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(-1) if self.qkv.weight.shape[0] != 36 else super().forward(x)

    model = fill(Swapped())
    nn.init.zeros_(model.proj.weight)
    nn.init.zeros_(model.proj.bias)
    graph = load_torch(model, torch.randn(2, 5, 12))
    drop_head(graph)
    graph.refresh()
    assert isinstance(graph.to_model(), torch.fx.GraphModule)


def test_folded_batch_norm_becomes_identity_and_bias() -> None:
    class Wrapped(nn.BatchNorm2d):
        """A norm with its activation inside, as timm writes it."""

        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, bias=False), Wrapped(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    model, x = fill(Net()), torch.randn(2, 3, 8, 8)
    graph = load_torch(model, x)
    for bn in nodes(graph, "batch_norm"):
        conv = bn.inputs[0].producer  # type: ignore[union-attr]
        assert conv is not None and conv.inputs[1] is not None and conv.inputs[1].weight is not None
        scale, bias, mean, var = (v.weight.numpy() for v in bn.inputs[1:])  # type: ignore[union-attr]
        factor = scale / np.sqrt(var + bn.attrs["eps"])
        graph.set_weight(conv.inputs[1].weight, conv.inputs[1].weight.numpy() * factor[:, None, None, None])
        graph.set_input(conv, 2, graph.add_weight(f"{conv.scope}.bias", bias - mean * factor, trainable=True))
        graph.replace_uses(bn.output, conv.output)
        graph.erase(bn)
    graph.refresh()
    result = graph.to_model()
    assert type(result) is Net and type(result.bn1) is nn.Identity
    assert list(result.state_dict()) == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    torch.testing.assert_close(result.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert isinstance(result.bn2.act, nn.ReLU)
    # the same graph as a GraphModule keeps those names too
    assert set(trainable_module(graph, dict(graph.tensors), {}).state_dict()) == set(result.state_dict())


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_computed_weight_that_became_a_constant_is_a_plain_parameter(norm: Any) -> None:
    model, x = nn.Sequential(norm(nn.Linear(6, 4)), nn.ReLU()).eval(), torch.randn(3, 6)
    kind = type(model[0])
    graph = load_torch(model, x)
    (linear,) = nodes(graph, "linear")
    weight = linear.inputs[1]
    assert weight is not None and weight.producer is not None
    data = graph.run(graph.bind(x), (weight.name,))[1][weight.name].numpy()
    graph.set_input(linear, 1, graph.add_weight("dense", data, trainable=True))
    for node in reversed(list(graph.nodes)):
        if not any(v.uses or v.is_output for v in node.outputs):
            graph.erase(node)
    result = graph.to_model()
    assert type(result) is nn.Sequential and type(result[0]) is nn.Linear and graph.notes == []
    assert set(result.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(result(x), model(x))
    assert type(model[0]) is kind and "weight" not in dict(model[0].named_parameters())


def with_extra_node(model: nn.Module, x: Tensor) -> tuple[FXGraph, nn.Module]:
    graph = load_torch(model, x)
    last = graph.nodes[-1]
    made = graph.insert("mul", [last.output, graph.add_weight("gain", np.float32(1.0))], name="extra", after=last)
    graph.replace_uses(last.output, made.output)
    return graph, graph.to_model()


def test_graph_module_trains_like_the_model() -> None:
    model, x = fill(Conv()).train(), torch.randn(4, 3, 6, 6)
    graph, result = with_extra_node(model, x)
    assert isinstance(result, torch.fx.GraphModule) and "gain" in graph.notes[-1]
    assert set(result.state_dict()) == set(model.state_dict()) | {"gain"}
    assert "ramp" not in result.state_dict() and result.get_buffer("ramp") is not None
    assert result.training and result.bn1.training and result.drop.training
    for step in range(2):
        torch.manual_seed(step)
        a = model(x)
        torch.manual_seed(step)
        b = result(x)
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model.bn1.running_mean, result.get_buffer("bn1.running_mean"))
    a.sum().backward()
    b.sum().backward()
    torch.testing.assert_close(model.deep.weight.grad, result.get_parameter("deep.weight").grad)
    torch.testing.assert_close(model.eval()(x), result.eval()(x))
    result.train()
    result.get_submodule("bn1").eval()  # one frozen norm
    before = result.get_buffer("bn1.running_mean").clone()
    result(x)
    assert torch.equal(before, result.get_buffer("bn1.running_mean"))


def test_graph_module_survives_saving_and_copying() -> None:
    x = torch.randn(2, 3, 6, 6)
    _, result = with_extra_node(fill(Conv()), x)
    want = result.eval()(x)
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(result)):
        torch.testing.assert_close(other(x), want)
        assert list(other.state_dict()) == list(result.state_dict())
        torch.manual_seed(3)
        a = other.train()(x)
        torch.manual_seed(3)
        torch.testing.assert_close(a, result.train()(x))
        assert not torch.allclose(a, want)
        result.eval()


def test_control_flow_and_memory_formats_pickle() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).clone(memory_format=torch.contiguous_format)
            return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y * 2, (x,))

    x = torch.randn(2, 4)
    graph = load_torch(Choice().eval(), x)
    result = trainable_module(graph, dict(graph.tensors), {})
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), graph.run(graph.bind(x))[0][0])


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.fc(self.embed(ids)))

    ids = torch.randint(0, 11, (2, 4))
    graph = load_torch(fill(Tied()), ids)
    keep(graph, "embed.weight fc.weight", 1, [0, 2, 3])
    keep(graph, "fc.weight fc.bias", 0, [0, 2, 3])
    graph.refresh()
    result = graph.to_model()
    assert type(result) is Tied and result.head.weight is result.embed.weight
    assert result.embed.embedding_dim == result.head.in_features == 3
    same_function(result, graph, ids)
    extra = trainable_module(graph, dict(graph.tensors), {})
    assert extra.get_parameter("head.weight") is extra.get_parameter("embed.weight")


def test_recurrent_and_norm_attributes() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rnn = nn.LayerNorm(8), nn.GRU(8, 6, 2, batch_first=True)
            self.plain = nn.LayerNorm(6, elementwise_affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.rnn(self.norm(x))[0])

    x = torch.randn(3, 4, 8)
    graph = load_torch(fill(Sequence()), x)
    gates = np.arange(18).reshape(3, 6)[:, [0, 1, 3, 5]].reshape(-1)
    for layer in ("l0", "l1"):
        keep(graph, f"rnn.weight_ih_{layer} rnn.weight_hh_{layer} rnn.bias_ih_{layer} rnn.bias_hh_{layer}", 0, gates)
        keep(graph, f"rnn.weight_hh_{layer}", 1, [0, 1, 3, 5])
    keep(graph, "rnn.weight_ih_l1", 1, [0, 1, 3, 5])
    state = nodes(graph, "full")
    for n in state:
        graph.set_attr(n, shape=[4 if s == 6 else s for s in n.attrs["shape"]])
    graph.refresh()
    result = graph.to_model()
    assert type(result) is Sequence and result.rnn.hidden_size == 4 and result.plain.normalized_shape == (4,)
    same_function(result, graph, x)


def test_hooks_survive() -> None:
    model, x = fill(Conv()), torch.randn(2, 3, 6, 6)
    seen: list[int] = []
    model.head.register_forward_hook(lambda m, a, out: seen.append(out.shape[-1]))
    graph = load_torch(model, x)
    prune_conv(graph)
    result = graph.to_model()
    seen.clear()
    result(x)
    assert seen == [5] and type(result) is Conv


def test_module_that_cannot_be_copied_is_traced_in_place() -> None:
    class Stubborn(Conv):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    model, x = fill(Stubborn()).train(), torch.randn(2, 3, 6, 6)
    graph = load_torch(model, x)
    assert model.training and model.bn1.training
    prune_conv(graph)
    result = graph.to_model()
    assert isinstance(result, torch.fx.GraphModule) and "no copies" in graph.notes[-1]
    same_function(result, graph, x)


def test_exported_program_comes_back_as_a_graph_module() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = fill(Conv()).eval()
    graph = load_torch(torch.export.export(model, (x,)))
    prune_conv(graph)
    result = write_back(graph)
    assert isinstance(result, torch.fx.GraphModule)
    same_function(result, graph, x)


def test_meta_model_is_written_back_by_shape() -> None:
    with torch.device("meta"):
        model = Heads()
    graph = load_torch(model, torch.randn(2, 5, 12))
    drop_head(graph)
    graph.refresh()
    result = graph.to_model()
    assert type(result) is Heads and result.heads == 2 and result.qkv.weight.is_meta


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_export_of_the_graph_module(batch: int) -> None:
    model, x = fill(Conv()), torch.randn(batch, 3, 6, 6)
    graph = load_torch(model, x)
    prune_conv(graph)
    program = torch.onnx.export(graph.to_graph_module(), (x,), dynamo=True, verbose=False)
    assert program is not None
    names = {i.name for i in program.model.graph.initializers.values()}
    assert {"conv1.weight", "head.bias"} <= names
