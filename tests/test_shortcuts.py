"""Results of frequent calls on meta tensors: what a rule says is what torch's own shape functions say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foldline.graph.fx.shortcuts import shortcut
from hypothesis import given, settings
from hypothesis import strategies as st

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def turned(*shape: int) -> torch.Tensor:
    """Of this shape, its last two axes swapped in memory."""
    return meta(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


X, INDEX = meta(2, 5, 6), meta(2, 5, dtype=torch.int64)
QKV = [meta(2, 4, 5, 6), meta(2, 4, 7, 6), meta(2, 4, 7, 3)]
NARROW = [q.to(torch.bfloat16) for q in QKV]
ATTEND = aten.scaled_dot_product_attention.default
FITTING: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.linear.default, (X, meta(9, 6), meta(9)), {}),
    (aten.linear.default, (meta(6), meta(9, 6)), {}),
    (aten.linear.default, (meta(3, 6), turned(9, 6), meta(9)), {}),
    (aten.linear.default, (meta(2, 3, 4, 6), meta(9, 6)), {}),
    (aten.addmm.default, (meta(9), meta(5, 6), meta(6, 9)), {}),
    (aten.addmm.default, (meta(9), turned(5, 6), turned(6, 9)), {"alpha": 2}),
    (aten.mm.default, (turned(5, 6), meta(6, 9)), {}),
    (aten.bmm.default, (turned(2, 5, 6), meta(2, 6, 9)), {}),
    (aten.matmul.default, (meta(2, 4, 5, 6), turned(2, 4, 6, 7)), {}),
    (aten.matmul.default, (meta(2, 5, 4, 6).transpose(1, 2), meta(2, 4, 6, 7)), {}),
    (ATTEND, tuple(QKV), {}),
    (ATTEND, tuple(NARROW), {"is_causal": True}),
    (ATTEND, (*[meta(2, 5, 4, 6).transpose(1, 2)] * 3,), {"scale": 0.5}),
    (ATTEND, (*QKV, meta(2, 1, 5, 7, dtype=torch.bool)), {}),
    (ATTEND, tuple(QKV), {"attn_mask": meta(5, 7)}),
    (aten.embedding.default, (meta(11, 6), INDEX), {}),
    (aten.embedding.default, (meta(11, 6), INDEX, 0), {}),
    (aten.linear.default, (meta(3, 7, 6)[:, 0], meta(9, 6), meta(9)), {}),
    (aten.linear.default, (meta(3, 6, 7).transpose(1, 2), meta(9, 6), meta(9)), {}),
    (aten.linear.default, (meta(3, 7, 6)[:, 1:3], meta(9, 6)), {}),
    (aten.relu.default, (turned(3, 4),), {}),
    (aten.add.Tensor, (INDEX, 2), {}),
    (aten.sub.Tensor, (INDEX, INDEX), {}),
    (aten.mul.Tensor, (turned(3, 4), turned(3, 4)), {}),
    (aten.ne.Scalar, (INDEX, 1), {}),
    (aten.lt.Tensor, (X, X), {}),
    (aten.where.self, (meta(2, 5, 6, dtype=torch.bool), X, X), {}),
    (aten.pow.Tensor_Scalar, (X, 3.0), {}),
    (aten.cumsum.default, (INDEX, 1), {}),
    (aten.gather.default, (meta(4, 5, dtype=torch.int64), 0, INDEX), {}),
    (aten.cat.default, ([X, meta(2, 3, 6)], 1), {}),
    (aten.cat.default, ([meta(2, 3, 4, 5), meta(2, 3, 4, 5)], -1), {}),
    (aten.linalg_vector_norm.default, (meta(2, 3, 4, 5), 2, [1, 2], True), {}),
    (aten.linalg_vector_norm.default, (meta(2, 3, 4, 5).permute(0, 2, 3, 1), 2, [1, 2], True), {}),
    (aten.max_pool2d.default, (meta(2, 3, 9, 9), [3, 3], [2, 2], [1, 1]), {}),
    (aten.max_pool2d.default, (meta(2, 3, 9, 8), [2]), {}),
    (aten.cat.default, ([meta(1, 1, 6).expand(2, -1, -1), X], 1), {}),
    (aten.cat.default, ([turned(2, 5, 6), X], 1), {}),
    (aten.cumsum.default, (meta(2, 5, dtype=torch.int32), 1), {}),
    (aten.neg.default, (INDEX,), {}),
    (aten.sub.Tensor, (meta(1, 5, dtype=torch.int64), meta(4, 1, dtype=torch.int64)), {}),
    (aten.mul.Tensor, (meta(3, 1, 5, 1), meta(4, 1, 6)), {}),
    (aten.add.Tensor, (meta(1, 1, 6), X), {}),
    (aten.relu.default, (meta(3, 7, 6)[:, 1:3],), {}),
    (aten.ge.Tensor, (meta(7, 1, dtype=torch.int64), meta(1, 7, dtype=torch.int64)), {}),
    (aten.mul.Tensor, (meta(2, 5, 4, 6).transpose(1, 2), meta(1, 1, 5, 6)), {}),
    (aten.cat.default, ([meta(2, 5, 4, 3), meta(2, 5, 4, 6)[..., :3]], -1), {}),
    (aten.cat.default, ([meta(2, 5, 4, 6).transpose(1, 2), meta(2, 4, 5, 3)], -1), {}),
    (aten.full_like.default, (INDEX, 3), {"pin_memory": False}),
    (aten.zeros_like.default, (X,), {"dtype": torch.bool}),
    (aten.min.other, (INDEX, INDEX), {}),
    (aten.to.dtype, (X, torch.float16), {}),
    (aten.to.dtype, (turned(5, 6), torch.int64), {}),
    (aten.to.device, (X, torch.device("meta"), torch.bool), {}),
    (aten.where.ScalarOther, (meta(1, 5, 6, dtype=torch.bool), X, -1e30), {}),
    (aten.cumsum.default, (meta(2, 5, dtype=torch.bool), -1), {}),
    (ATTEND, (meta(2, 8, 5, 6), QKV[1], QKV[2], None, 0.0, True), {"enable_gqa": True}),
    (aten.contiguous.default, (turned(2, 5, 6),), {}),
    (aten.slice.Tensor, (X, -1, 1, 2**63 - 1), {}),
    (aten.slice.Tensor, (X, 1, 1, 5, 2), {}),
    (aten.view.default, (X, [2, -1]), {}),
    (aten.reshape.default, (turned(2, 5, 6), [10, -1]), {}),
    (aten.transpose.int, (X, 1, -1), {}),
    (aten.permute.default, (X, [2, 0, 1]), {}),
    (aten.expand.default, (meta(2, 1, 6), [3, 2, -1, -1]), {}),
    (aten.unsqueeze.default, (X, -1), {}),
    (aten.select.int, (X, 1, -1), {}),
    (aten.flatten.using_ints, (X, 1), {}),
    (aten.squeeze.dim, (meta(2, 1, 6), 1), {}),
]


@pytest.mark.parametrize("case", FITTING, ids=lambda c: str(c[0]))
def test_a_rule_says_what_torch_says(case: Any) -> None:
    func, args, kwargs = case
    found, wanted = shortcut(func, args, kwargs), func(*args, **kwargs)
    assert found is not None, "no rule took it"
    assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert found.is_meta


@pytest.mark.parametrize(
    "case",
    [
        (aten.linear.default, (X, meta(9, 5))),
        (aten.linear.default, (X, meta(9, 6), meta(8))),
        (aten.addmm.default, (meta(8), meta(5, 6), meta(6, 9))),
        (aten.mm.default, (meta(5, 6), meta(5, 9))),
        (aten.matmul.default, (meta(2, 5, 6), meta(3, 6, 9))),
        (ATTEND, (QKV[0], QKV[1], meta(2, 4, 6, 3))),
        (ATTEND, (*QKV, meta(2, 1, 4, 7, dtype=torch.bool))),
        (aten.embedding.default, (meta(11, 6), meta(2, 5))),
        (aten.add.Tensor, (meta(2, 5, dtype=torch.int64), meta(2, 4, dtype=torch.int64))),
        (aten.lt.Tensor, (X, meta(2, 5, 5))),
        (aten.cat.default, ([X, meta(2, 3, 5)], 1)),
        (aten.max_pool2d.default, (meta(2, 3, 9, 9), [3, 3], [2, 2], [2, 2])),
        (aten.gather.default, (X, 0, INDEX)),
        (aten.cumsum.default, (INDEX, 2)),
    ],
    ids=lambda c: str(c[0]),
)
def test_what_does_not_fit_is_left_to_torch(case: Any) -> None:
    func, args = case
    assert shortcut(func, args, {}) is None
    with pytest.raises((RuntimeError, IndexError)):
        func(*args)


def test_mixed_types_are_left_to_torch() -> None:
    assert shortcut(aten.linear.default, (X, meta(9, 6, dtype=torch.float64)), {}) is None
    assert shortcut(ATTEND, (*QKV, meta(5, 7, dtype=torch.float64)), {}) is None


@pytest.mark.parametrize("func", [aten.batch_norm.default, aten.dropout.default])
def test_gaps_in_memory_are_left_to_torch(func: Any) -> None:
    more = (None, None, None, None, False, 0.1, 1e-5, True) if func is aten.batch_norm.default else (0.1, True)
    assert shortcut(func, (meta(3, 7, 6)[:, 1:3], *more), {}) is None


@st.composite
def laid_out(draw: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A meta tensor that broadcasts to this shape: axes in any order in memory, some expanded, some with gaps."""
    own = [draw(st.sampled_from([n, 1])) for n in shape]
    own = own[draw(st.integers(0, len(own) - 1)) :] if draw(st.booleans()) else own
    order = draw(st.permutations(range(len(own))))
    gaps = [draw(st.sampled_from([0, 0, 2])) for _ in own]
    held = torch.empty([own[i] + gaps[i] for i in order], dtype=dtype, device="meta")
    x = held.permute([order.index(i) for i in range(len(own))])
    x = x[tuple(slice(0, n) for n in own)]
    return x.expand(shape) if draw(st.integers(0, 3)) == 0 else x


@settings(max_examples=300, deadline=None)
@given(data=st.data(), rank=st.integers(1, 4))
def test_elementwise_results_lie_where_torch_puts_them(data: Any, rank: int) -> None:
    shape = tuple(data.draw(st.sampled_from([1, 2, 3, 3])) for _ in range(rank))
    dtypes = st.sampled_from([torch.float32, torch.float32, torch.int64, torch.float16])
    x, y = (data.draw(laid_out(shape, data.draw(dtypes))) for _ in range(2))
    condition = data.draw(laid_out(shape, torch.bool))
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        *[(f.Tensor, (x, y)) for f in (aten.add, aten.mul, aten.sub, aten.div, aten.lt, aten.eq)],
        *[(f, (x, y)) for f in (aten.minimum.default, aten.min.other, aten.max.other)],
        *[(f, (x,)) for f in (aten.neg.default, aten.abs.default, aten.exp.default, aten.gelu.default)],
        (aten.where.self, (condition, x, y)),
        (aten.where.ScalarOther, (condition, x, 2.5)),
        (aten.add.Tensor, (x, 2)),
        (aten.add.Tensor, (x, 2.5)),
        (aten.to.dtype, (x, torch.float64)),
        (aten.full_like.default, (x, 7)),
    ]
    for func, args in cases:
        found = shortcut(func, args, {})
        if found is None:
            mixed = x.dtype != y.dtype or not x.is_floating_point()
            assert mixed or func in (aten.to.dtype, aten.full_like.default, aten.add.Tensor), func
            continue
        wanted = func(*args)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), func
        if steps(found) != steps(wanted):  # torch's shape function need not be what its kernel does
            assert steps(found) == steps(func(*[on_cpu(a) for a in args])), func


def on_cpu(x: Any) -> Any:
    """A tensor of zeros that lies in memory as this one."""
    if not isinstance(x, torch.Tensor):
        return x
    reach = 1 + sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True))
    return torch.zeros(reach, dtype=x.dtype).as_strided(x.shape, x.stride())


def steps(x: torch.Tensor) -> list[int]:
    """The strides that matter: of axes longer than one."""
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]
