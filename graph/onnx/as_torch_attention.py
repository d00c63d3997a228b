"""Attention and RotaryEmbedding of ONNX in torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .as_torch_data import DTYPES
from .as_torch_run import Call, torch_op


@torch_op("Attention")
def attention(c: Call) -> tuple[Tensor, ...]:
    """Attention with masks, causal frontier, key-value cache, grouped heads, soft cap; rows without keys give 0."""
    q, k, v = c.x(0), c.x(1), c.x(2)
    packed = q.dim() == 3
    if packed:
        q, k, v = _split(q, c.attr("q_num_heads")), _split(k, c.attr("kv_num_heads")), _split(v, c.attr("kv_num_heads"))
    past_key, past_value, lengths = c.maybe(4), c.maybe(5), c.maybe(6)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = k, v
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scale = math.sqrt(c.attr("scale", 1 / math.sqrt(q.shape[-1])))
    scores = (q * scale) @ (k * scale).transpose(-1, -2)
    raw = scores
    cap = c.attr("softcap", 0.0)
    if cap:
        scores = torch.tanh(scores / cap) * cap
    mode = c.attr("qk_matmul_output_mode", 0)
    bias = _bias(c, q, k, past_key, lengths)
    biased = scores + bias
    exposed = {0: raw, 1: scores if c.opset >= 24 or cap else biased, 2: biased}.get(mode, raw)
    precision = c.attr("softmax_precision")
    weights = torch.softmax(biased.to(DTYPES[precision]) if precision else biased, -1)
    dead = torch.isneginf(bias.amax(-1, keepdim=True))
    weights = torch.where(dead, torch.zeros_like(weights), weights).to(q.dtype)
    if mode == 3:
        exposed = weights
    y = weights @ v
    if packed:
        y = y.transpose(1, 2).flatten(2)
    return y, present[0], present[1], exposed


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _bias(c: Call, q: Tensor, k: Tensor, past: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Everything that is added to the scores: mask, causal frontier, sliding window, padding of the cache."""
    rows, columns = q.shape[2], k.shape[2]
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    never = torch.full((), -math.inf, dtype=q.dtype, device=q.device)
    bias = torch.zeros(rows, columns, dtype=q.dtype, device=q.device)
    mask = c.maybe(3)
    if mask is not None:
        mask = mask.to(q.device)
        short = columns - mask.shape[-1]
        if mask.dtype == torch.bool:
            mask = torch.where(mask, zero, never)
        mask = F.pad(mask, (0, short), value=-math.inf) if short > 0 else mask
        bias = bias + mask
    left, right = c.attr("left_window_size", -1), c.attr("right_window_size", -1)
    offset = torch.tensor(0 if past is None else past.shape[2], device=q.device).reshape(1, 1, 1, 1)
    if past is None and lengths is not None:
        offset = (lengths.to(q.device).reshape(-1) - rows).reshape(-1, 1, 1, 1)
    ahead = torch.arange(columns, device=q.device) - torch.arange(rows, device=q.device)[:, None] - offset
    if c.attr("is_causal", 0):
        bias = bias + torch.where(ahead <= 0, zero, never)
    if left >= 0:
        bias = bias + torch.where(-ahead <= left, zero, never)
    if right >= 0:
        bias = bias + torch.where(ahead <= right, zero, never)
    if lengths is not None:
        valid = torch.arange(columns, device=q.device) < lengths.to(q.device).reshape(-1, 1, 1, 1)
        bias = bias + torch.where(valid, zero, never)
    return bias


@torch_op("RotaryEmbedding")
def rotary(c: Call) -> Tensor:
    x, cos, sin = c.x(0), c.x(1), c.x(2)
    positions = c.maybe(3)
    heads_last = x.transpose(1, 2) if x.dim() == 4 else x.unflatten(-1, (c.attr("num_heads"), -1))
    dim = c.attr("rotary_embedding_dim", 0) or heads_last.shape[-1]
    turned, still = heads_last[..., :dim], heads_last[..., dim:]
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if c.attr("interleaved", 0):
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    if c.attr("interleaved", 0):
        turned = torch.stack([real, imaginary], -1).flatten(-2)
    else:
        turned = torch.cat([real, imaginary], -1)
    y = torch.cat([turned, still], -1)
    return y.transpose(1, 2) if x.dim() == 4 else y.flatten(2)
