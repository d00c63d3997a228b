"""Random networks from a list of steps: a step that does not fit the sizes it meets is skipped."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Step = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


class RandomNet(nn.Module):
    """Feature maps (B, C, 4, 6) flow through the steps; a pool keeps earlier ones for adds and concats."""

    def __init__(self, kinds: list[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.kinds: list[tuple[str, dict[str, int]]] = []
        self.layers = nn.ModuleDict()
        c, pool = 8, [8]
        self._conv("stem", 3, 8, 3, 1)
        for i, kind in enumerate(kinds):
            c = self._plan(kind, f"s{i}", c, pool)
            pool.append(c)
        self.head = nn.Linear(c, 5)

    def _conv(self, key: str, cin: int, cout: int, k: int, groups: int) -> None:
        self.layers[key] = nn.Sequential(nn.Conv2d(cin, cout, k, padding=k // 2, groups=groups), nn.BatchNorm2d(cout))
        bn = self.layers[key][1]  # type: ignore[index]
        for p in (bn.weight, bn.bias, bn.running_mean):
            nn.init.normal_(p.data if isinstance(p, nn.Parameter) else p)
        nn.init.uniform_(bn.running_var, 0.5, 2)

    def _plan(self, kind: str, key: str, c: int, pool: list[int]) -> int:
        """Decide sizes and make layers; returns the channels after the step."""
        rng, a = self.rng, {"c": c}
        divisors = [d for d in range(2, c + 1) if c % d == 0]
        if kind in ("conv", "grouped"):
            g = rng.choice(divisors) if kind == "grouped" and divisors else 1
            cout = g * rng.randint(1, 4) if g > 1 else rng.randint(2, 12)
            self._conv(key, c, cout, rng.choice((1, 3)), g)
            c = cout
        elif kind == "add":
            same = [i for i, n in enumerate(pool) if n == c]
            a["other"] = rng.choice(same)
        elif kind == "concat":
            a["other"] = rng.randrange(len(pool))
            c += pool[a["other"]]
            if c > 40:
                return self._plan("conv", key, a["c"], pool)
        elif kind in ("shuffle", "group_norm", "gated"):
            if not divisors:
                return self._plan("act", key, c, pool)
            a["g"] = rng.choice(divisors)
            if kind == "gated":
                if c % 2:
                    return self._plan("act", key, c, pool)
                c //= 2
            if kind == "group_norm":
                self.layers[key] = nn.GroupNorm(a["g"], c)
        elif kind in ("slice", "split_cat", "roll"):
            if c < 3:
                return self._plan("act", key, c, pool)
            a["at"] = rng.randint(1, c - 1)
            c = a["at"] if kind == "slice" else c
        elif kind == "pad":
            a["lo"], a["hi"] = rng.randint(0, 3), rng.randint(1, 3)
            c += a["lo"] + a["hi"]
        elif kind == "se":
            self.layers[key] = nn.Sequential(nn.Linear(c, 3), nn.ReLU(), nn.Linear(3, c), nn.Sigmoid())
        elif kind == "attention":
            a["h"] = rng.choice(divisors) if divisors else 1
            self.layers[key] = nn.ModuleList([nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)])
        elif kind == "act":
            a["f"] = rng.randrange(4)
        else:
            c = self._plan_more(kind, key, c, a)
        self.kinds.append((kind + ":" + key, a))
        return c

    def _plan_more(self, kind: str, key: str, c: int, a: dict[str, int]) -> int:
        rng = self.rng
        if kind == "depthwise":
            m = rng.choice((1, 2)) if c < 16 else 1
            self._conv(key, c, c * m, 3, c)
            return c * m
        if kind == "transposed":
            g = rng.choice([d for d in (1, 2, 3) if c % d == 0])
            cout = g * rng.randint(1, 4)
            self.layers[key] = nn.ConvTranspose2d(c, cout, 3, padding=1, groups=g)
            return cout
        if kind == "pixel":
            a["go"] = int(c % 4 == 0)
            self.layers[key] = nn.Conv2d(c, c, 1)
        elif kind == "mlp":
            self.layers[key] = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))
        elif kind == "index":
            order = list(range(c))
            rng.shuffle(order)
            self.layers[key] = nn.Identity()
            self.register_buffer(f"order_{key}", torch.tensor(order[: rng.randint(1, c)]))
            return len(self.get_buffer(f"order_{key}"))
        elif kind == "interleave":
            a["r"] = 2 if c <= 16 else 1
            return c * a["r"]
        elif kind == "tile":
            a["r"] = 2 if c <= 16 else 1
            return c * a["r"]
        elif kind == "einsum":
            cout = rng.randint(2, 9)
            self.register_parameter(f"w_{key}", nn.Parameter(torch.randn(cout, c)))
            return cout
        elif kind == "prelu":
            self.layers[key] = nn.PReLU(c)
            nn.init.uniform_(self.layers[key].weight)  # type: ignore[arg-type]
        elif kind == "scale":
            self.register_parameter(f"w_{key}", nn.Parameter(torch.randn(c, 1, 1)))
        elif kind == "unbind":
            a["g"] = rng.choice([d for d in (1, 2, 3) if c % d == 0])
        return c

    def _more(self, kind: str, key: str, a: dict[str, int], x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        if kind in ("depthwise", "transposed", "prelu"):
            return torch.as_tensor(self.layers[key](x))
        if kind == "pixel":
            y = self.layers[key](x)
            if not a["go"]:
                return F.max_pool2d(y, 3, 1, 1)
            return F.pixel_unshuffle(torch.relu(F.pixel_shuffle(y, 2)), 2)
        if kind == "mlp":
            t = x.permute(0, 2, 3, 1)
            return (t + self.layers[key](t)).permute(0, 3, 1, 2)
        if kind == "index":
            return x.index_select(1, self.get_buffer(f"order_{key}"))
        if kind == "interleave":
            return x.repeat_interleave(a["r"], 1)
        if kind == "tile":
            return x.repeat(1, a["r"], 1, 1)
        if kind == "einsum":
            return torch.einsum("oc,bchw->bohw", self.get_parameter(f"w_{key}"), x)
        if kind == "scale":
            return x * self.get_parameter(f"w_{key}")
        if kind == "cbam":
            stats = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
            return x * torch.sigmoid(stats.sum(1, keepdim=True))
        if kind == "center":
            return x - x.mean(1, keepdim=True)
        if kind == "normalize":
            return F.normalize(x, dim=1)
        parts = x.reshape(b, a["g"], c // a["g"], h, w).unbind(1)
        return torch.cat([torch.tanh(p) if i else p for i, p in enumerate(reversed(parts))], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers["stem"](x)
        pool = [x]
        for name, a in self.kinds:
            kind, key = name.split(":")
            x = self._step(kind, key, a, x, pool)
            pool.append(x)
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out

    def _step(self, kind: str, key: str, a: dict[str, int], x: torch.Tensor, pool: list[torch.Tensor]) -> torch.Tensor:
        b, c, h, w = x.shape
        if kind in ("conv", "grouped", "group_norm"):
            return torch.as_tensor(self.layers[key](x))
        if kind == "add":
            return pool[a["other"]] + x
        if kind == "concat":
            return torch.cat([pool[a["other"]], x], 1)
        if kind == "shuffle":
            return x.reshape(b, a["g"], c // a["g"], h, w).transpose(1, 2).reshape(b, c, h, w)
        if kind == "gated":
            left, right = x.chunk(2, 1)
            return left * torch.sigmoid(right)
        if kind == "slice":
            return x[:, : a["at"]]
        if kind == "split_cat":
            left, right = x.split([a["at"], c - a["at"]], 1)
            return torch.cat([torch.relu(right), left], 1)
        if kind == "roll":
            return torch.roll(x, a["at"], 1)
        if kind == "flip":
            return x.flip(1)
        if kind == "pad":
            return F.pad(x, (0, 0, 0, 0, a["lo"], a["hi"]))
        if kind == "se":
            return x * torch.as_tensor(self.layers[key](x.mean((2, 3))))[:, :, None, None]
        if kind == "attention":
            return self._attention(key, a["h"], x)
        if kind != "act":
            return self._more(kind, key, a, x)
        return torch.as_tensor([torch.relu, F.gelu, F.silu, torch.abs][a["f"]](x))

    def _attention(self, key: str, heads: int, x: torch.Tensor) -> torch.Tensor:
        norm, qkv, proj = self.layers[key]  # type: ignore[misc]
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q, k, v = qkv(norm(t)).reshape(b, h * w, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return (t + torch.as_tensor(proj(y))).transpose(1, 2).reshape(b, c, h, w)


KINDS = (
    *("conv", "grouped", "add", "concat", "shuffle", "group_norm", "gated", "slice", "split_cat", "roll"),
    *("flip", "pad", "se", "attention", "act", "depthwise", "transposed", "pixel", "mlp", "index", "interleave"),
    *("tile", "einsum", "prelu", "scale", "cbam", "center", "normalize", "unbind"),
)


def random_net(kinds: list[str], seed: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network (eval mode) and example inputs."""
    net = RandomNet(kinds, seed).eval()
    return net, (torch.randn(2, 3, 4, 6),)
