"""GraphModule of an FXGraph: the model's state-dict names, train()/eval() that work, autograd and pickling."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from .functional import has_effect, packet
from .source import scope_of

if TYPE_CHECKING:
    from .view import FXView

_DROPOUT = {"aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout"}
_RECURRENT = {"aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"}
_NORM_TYPES = ("BatchNorm", "InstanceNorm")


class TracedModule(fx.GraphModule):
    """A GraphModule that pickles its graph (not its source), so that torch.save and deepcopy keep everything."""

    def __reduce__(self) -> tuple[Any, ...]:
        codegen = self.graph._codegen
        info = codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None
        call = None if info is None else (list(info.orig_args), info.in_spec, info.out_spec)
        state = {
            k: v for k, v in self.__dict__.items() if k not in ("_graph", "_code", "_lineno_map", "_prologue_start")
        }
        return _rebuild, (_encode(self.graph), call, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        rebuild, (nodes, call, state) = self.__reduce__()
        copied: fx.GraphModule = rebuild(nodes, call, {})
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(state, memo))
        return copied


class _Ref:
    """A node reference inside pickled arguments."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Constant:
    """A torch constant that does not pickle, by name."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Op:
    """A torch operator by name inside pickled calls."""

    def __init__(self, path: str) -> None:
        self.path = path

    def resolve(self) -> Any:
        item: Any = torch.ops
        for part in self.path.split("."):
            item = getattr(item, part)
        return item


def _plain(item: Any) -> Any:
    if isinstance(item, fx.Node):
        return _Ref(item.name)
    if isinstance(item, torch._ops.OpOverload):
        return _Op(str(item))
    if isinstance(item, torch.memory_format):
        return _Constant(str(item).removeprefix("torch."))
    if isinstance(item, torch._ops.HigherOrderOperator):
        return _Op(f"higher_order.{item.name()}")
    if isinstance(item, (list, tuple)):
        return type(item)(map(_plain, item)) if type(item) in (list, tuple) else [_plain(x) for x in item]
    if isinstance(item, dict):
        return {k: _plain(v) for k, v in item.items()}
    return item


def _restore(item: Any, env: dict[str, fx.Node]) -> Any:
    if isinstance(item, _Ref):
        return env[item.name]
    if isinstance(item, _Op):
        return item.resolve()
    if isinstance(item, _Constant):
        return getattr(torch, item.name)
    if isinstance(item, (list, tuple)):
        return type(item)(_restore(x, env) for x in item)
    if isinstance(item, dict):
        return {k: _restore(v, env) for k, v in item.items()}
    return item


def _encode(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(n.op, n.name, _plain(n.target), _plain(n.args), _plain(n.kwargs)) for n in graph.nodes]


def _rebuild(nodes: list[tuple[Any, ...]], call: tuple[Any, ...] | None, state: dict[str, Any]) -> Any:
    from . import custom  # noqa: F401  (registers foldline's operators before they are looked up)

    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in nodes:
        made = graph.create_node(op, _restore(target, env), _restore(args, env), _restore(kwargs, env), name=name)
        env[name] = made
    if call is not None:
        graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(*call)))
    module = TracedModule(nn.Module(), fx.Graph())
    module.__dict__.update(state)
    module.graph = graph
    return module


def picklable(module: nn.Module) -> nn.Module:
    """A control-flow body (and the bodies inside it) as modules that pickle their graphs."""
    if not isinstance(module, fx.GraphModule) or isinstance(module, TracedModule):
        return module
    made = TracedModule(module, module.graph, "Body")
    for name, child in module.named_children():
        setattr(made, name, picklable(child))
    return made


def graph_module(graph: FXView) -> fx.GraphModule:
    """The current graph as a GraphModule in eval mode that shares the graph's tensors."""
    native = _copy_graph(graph)
    for node in reversed(native.nodes):
        if has_effect(node) and node.op == "call_function":  # the tensors are shared: updates of buffers are left out
            node.replace_all_uses_with(node.all_input_nodes[-1])
            native.erase_node(node)
    native.eliminate_dead_code()
    used = {str(n.target) for n in native.nodes if n.op == "get_attr"}
    everything: dict[str, Any] = {**graph.tensors, **graph.submodules}
    module = TracedModule({name: everything[name] for name in sorted(used)}, native, _class_name(graph))
    module.eval()
    return module


def _class_name(graph: FXView) -> str:
    return graph.name if graph.name.isidentifier() else "GraphModule"


def _copy_graph(graph: FXView) -> fx.Graph:
    native = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.fx.nodes:
        env[node] = native.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    native.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or has_effect(n))
    native.set_codegen(_PyTreeCodeGen(_PyTreeInfo(graph.argument_names(), graph.in_spec, graph.out_spec)))
    return native


def trainable_module(graph: FXView, tensors: dict[str, torch.Tensor], extra: dict[str, torch.Tensor]) -> fx.GraphModule:
    """A GraphModule that stands in for the caller's model.

    Args:
        graph: the graph to run.
        tensors: canonical weight name -> tensor the module shall own.
        extra: state-dict names of tensors the graph does not use, kept so that the names stay complete.

    Batch norm, dropout and recurrent calls read the ``training`` flag of the submodule they came from.
    """
    everything: dict[str, torch.Tensor] = dict(extra)
    for name, weight in graph.weights.items():
        for alias in weight.aliases if graph.kinds[name] != "constant" else (name,):
            everything[alias] = tensors[name]
    order = {name: i for i, name in enumerate(graph.state_names())}
    module = TracedModule(nn.Module(), fx.Graph(), _class_name(graph))
    for name in sorted(everything, key=lambda n: order.get(n, len(order))):
        _assign(module, name, everything[name], graph.is_persistent(name))
    for name, body in graph.submodules.items():
        module.add_module(name, picklable(body))
    module.graph = _copy_graph(graph)
    for node in list(module.graph.nodes):
        _follow_mode(module, node)
    module.recompile()
    module.train(graph.source.training.get("", False))
    for path, flag in graph.source.training.items():
        found = _submodule(module, path)
        if found is not None:
            found.training = flag
    return module


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parents, leaf = path.split(".")
    for part in parents:
        child = module._modules.get(part)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    return module, leaf


def _assign(root: nn.Module, path: str, tensor: torch.Tensor, persistent: bool) -> None:
    owner, leaf = _owner(root, path)
    for table in (owner._parameters, owner._buffers, owner.__dict__):
        table.pop(leaf, None)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = root
    for part in path.split(".") if path else []:
        found = found._modules.get(part) if found is not None else None
    return found


def _follow_mode(module: fx.GraphModule, node: fx.Node) -> None:
    """Let a mode-dependent call read ``training`` of its scope instead of the constant seen in eval mode."""
    name = packet(node) if node.op == "call_function" else ""
    if name in _DROPOUT:
        position = 2
    elif name == "aten.batch_norm" or name == "aten.instance_norm":
        kinds = [str(e[1]) for e in (node.meta.get("nn_module_stack") or {}).values() if isinstance(e, tuple)]
        if not kinds or not any(t in kinds[-1] for t in _NORM_TYPES):
            return  # a functional call: nothing says that it follows the module's mode
        position = 5
    elif name in _RECURRENT:
        position = 6
    else:
        return
    if len(node.args) <= position or node.args[position] is not False:
        return
    path = ".".join(p for p in (scope_of(node), "training") if p)
    _owner(module, path)
    with module.graph.inserting_before(node):
        flag = module.graph.create_node("get_attr", path)
    node.update_arg(position, flag)
