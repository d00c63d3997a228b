"""Two small networks, and the PEFT methods with the options under which they are tried on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.ln, self.head, self.e = nn.LayerNorm(16), nn.Linear(16, 4), nn.Embedding(10, 16)
        self.config = {"model_type": "custom"}

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.ln(self.b(torch.relu(self.a(self.e(i))))))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 1)
        self.config = {"model_type": "custom"}

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


BOTH: dict[str, Any] = {"target_modules": ["a", "b"]}
WORDS: dict[str, Any] = {"target_modules": ["e"]}
CASES: dict[str, tuple[type[nn.Module], str, dict[str, Any]]] = {
    "lora": (Net, "LORA", {**BOTH, "r": 4, "lora_alpha": 7}),
    "lora, patterns": (
        Net,
        "LORA",
        {**BOTH, "r": 4, "use_rslora": True, "rank_pattern": {"b": 3}, "alpha_pattern": {"a": 5}},
    ),
    "lora, bias and head": (Net, "LORA", {**BOTH, "r": 4, "bias": "all", "modules_to_save": ["head"]}),
    "lora, its biases": (Net, "LORA", {**BOTH, "r": 4, "bias": "lora_only"}),
    "lora with bias": (Net, "LORA", {**BOTH, "r": 4, "lora_bias": True}),
    "lora, tokens": (Net, "LORA", {"target_modules": ["a"], "r": 4, "trainable_token_indices": {"e": [1, 3]}}),
    "lora, embedding": (Net, "LORA", {**WORDS, "r": 4}),
    "lora, convolution": (Pixels, "LORA", {**BOTH, "r": 2}),
    "pissa": (Net, "LORA", {**BOTH, "r": 4, "init_lora_weights": "pissa"}),
    "olora": (Net, "LORA", {**BOTH, "r": 4, "init_lora_weights": "olora"}),
    "dora": (Net, "LORA", {**BOTH, "r": 4, "use_dora": True}),
    "dora, embedding": (Net, "LORA", {**WORDS, "r": 4, "use_dora": True}),
    "dora, convolution": (Pixels, "LORA", {**BOTH, "r": 2, "use_dora": True}),
    "adalora": (Net, "ADALORA", {**BOTH, "total_step": 10}),
    "ia3": (Net, "IA3", {**BOTH, "feedforward_modules": ["b"]}),
    "ia3, convolution": (Pixels, "IA3", {**BOTH, "feedforward_modules": ["b"]}),
    "bone (bat)": (Net, "MISS", {**BOTH, "r": 8, "init_weights": "bat"}),
    "miss": (Net, "MISS", {**BOTH, "r": 8}),
    "miss, mini": (Net, "MISS", {**BOTH, "r": 8, "init_weights": "mini", "mini_r": 4}),
    "miss, odd rank": (Net, "MISS", {**BOTH, "r": 5}),
    "oft": (Net, "OFT", {**BOTH, "oft_block_size": 4}),
    "oft, cayley, shared": (
        Net,
        "OFT",
        {**BOTH, "oft_block_size": 4, "use_cayley_neumann": False, "block_share": True},
    ),
    "oft, constrained": (
        Net,
        "OFT",
        {**BOTH, "oft_block_size": 4, "coft": True, "eps": 0.5, "use_cayley_neumann": False},
    ),
    "oft, embedding": (Net, "OFT", {**WORDS, "oft_block_size": 4}),
    "oft, convolution": (Pixels, "OFT", {**BOTH, "oft_block_size": 4}),
    "boft": (Net, "BOFT", {**BOTH, "boft_block_size": 4}),
    "boft, convolution": (Pixels, "BOFT", {**BOTH, "boft_block_size": 4}),
    "loha": (Net, "LOHA", BOTH),
    "loha, convolution": (Pixels, "LOHA", {**BOTH, "use_effective_conv2d": True}),
    "lokr": (Net, "LOKR", BOTH),
    "lokr, factors": (Net, "LOKR", {**BOTH, "r": 2, "decompose_both": True}),
    "lokr, convolution": (Pixels, "LOKR", {**BOTH, "r": 1, "use_effective_conv2d": True}),
    "vera": (Net, "VERA", BOTH),
    "pvera": (Net, "PVERA", BOTH),
    "fourierft": (Net, "FOURIERFT", {**BOTH, "n_frequency": 50}),
    "waveft": (Net, "WAVEFT", {**BOTH, "n_frequency": 50}),
    "waveft, plain": (Net, "WAVEFT", {**BOTH, "n_frequency": 50, "use_idwt": False}),
    "hra": (Net, "HRA", {**BOTH, "r": 4}),
    "hra, orthogonal": (Net, "HRA", {**BOTH, "r": 4, "apply_GS": True}),
    "hra, convolution": (Pixels, "HRA", {**BOTH, "r": 4}),
    "vblora": (Net, "VBLORA", {**BOTH, "vector_length": 8, "num_vectors": 20, "r": 4}),
    "vblora, top k": (
        Net,
        "VBLORA",
        {**BOTH, "vector_length": 8, "num_vectors": 20, "r": 4, "save_only_topk_weights": True},
    ),
    "unilora": (Net, "UNILORA", {**BOTH, "save_indices": True}),
    "randlora": (Net, "RANDLORA", {**BOTH, "r": 6}),
    "road 1": (Net, "ROAD", {**BOTH, "group_size": 8}),
    "road 2": (Net, "ROAD", {**BOTH, "group_size": 8, "variant": "road_2"}),
    "road 4": (Net, "ROAD", {**BOTH, "group_size": 8, "variant": "road_4"}),
    "hira": (Net, "HIRA", {**BOTH, "r": 4}),
    "shira": (Net, "SHIRA", {**BOTH, "r": 2}),
    "c3a": (Net, "C3A", {**BOTH, "block_size": 8}),
    "osf": (Net, "OSF", BOTH),
    "delora": (Net, "DELORA", BOTH),
    "gralora": (Net, "GRALORA", {**BOTH, "r": 8, "hybrid_r": 4, "gralora_k": 4}),
    "glora": (Net, "GLORA", BOTH),
    "glora, vectors": (Net, "GLORA", {**BOTH, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "tinylora": (Net, "TINYLORA", {**BOTH, "weight_tying": 1.0}),
    "peanut": (Net, "PEANUT", {**BOTH, "r": 4, "depth": 2}),
    "supertuning": (Net, "SUPERTUNING", {**BOTH, "sparsity": 0.8, "r": 4, "lora_alpha": 8}),
    "deft": (Net, "DEFT", {**BOTH, "r": 4}),
    "deft, qr": (Net, "DEFT", {**BOTH, "r": 4, "decomposition_method": "qr"}),
    "deft, removal": (Net, "DEFT", {**BOTH, "r": 4, "para": True}),
    "beft": (Net, "BEFT", BOTH),
    "layer norms": (Net, "LN_TUNING", {"target_modules": ["ln"]}),
    "tokens": (Net, "TRAINABLE_TOKENS", {**WORDS, "token_indices": [2, 5]}),
}
SINGLE = {
    "fourierft",
    "deft",
    "deft, qr",
    "deft, removal",
    "pissa",
    "olora",
    "osf",
    "oft, constrained",
    "c3a",
    "vblora, top k",
}
"""What peft computes in float32 whatever the weights' dtype: its own result is no float64 reference."""
