"""Compile every kernel ahead of time for a compute capability, without a GPU: down to PTX and the cubin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ....graph.errors import BackendError
from . import binary, int4, int8, kronecker, softmax
from .common import ACTIVATIONS, INTERPRETED

CAPABILITIES = (80, 89, 90)
"""Ampere, Ada and Hopper."""


@dataclass(frozen=True)
class Variant:
    """One kernel with types for its pointers and values for its constants.

    Attributes:
        name: of the kernel, and what is special about the variant.
        kernel: the jitted function.
        pointers: argument name -> Triton type, e.g. ``"*i8"``; every other run-time argument is an int32.
        constants: compile-time arguments; block sizes come from ``config``.
        config: block sizes, warps and pipeline stages.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    config: triton.Config

    def signature(self) -> dict[str, str]:
        """Argument name -> Triton type, in order."""
        fixed = {**self.constants, **self.config.kwargs}
        return {n: "constexpr" if n in fixed else self.pointers.get(n, "i32") for n in self.kernel.arg_names}


def variants(every_config: bool = False) -> Iterator[Variant]:
    """The kernels in the types they are used in; one block size each, or all that tuning may choose."""

    def tuned(configs: list[triton.Config]) -> list[triton.Config]:
        return configs if every_config else configs[len(configs) // 2 : len(configs) // 2 + 1]

    def single(**blocks: int) -> triton.Config:
        return triton.Config(blocks, num_warps=4, num_stages=3)

    scales = {"x_scale": "*fp32", "w_scale": "*fp32", "offset": "*i32", "bias": "*fp32", "out_scale": "*fp32"}
    flags = {"X_ROWS": True, "W_CHANNELS": True, "HAS_OFFSET": True, "HAS_BIAS": True}
    for config in tuned(int8.CONFIGS):
        for out, requantize, whole, act in (("*bf16", False, True, "gelu"), ("*i8", True, False, "silu")):
            pointers = {"x": "*i8", "w": "*i8", **scales, "out": out}
            constants = {**flags, "REQUANTIZE": requantize, "ACTIVATION": ACTIVATIONS[act], "WHOLE_K": whole}
            yield Variant(f"int8_linear to {out[1:]}", int8.int8_linear_kernel, pointers, constants, config)
    for config in tuned(int4.CONFIGS):
        for kind in ("bf16", "fp16", "fp32"):
            group = 128 if kind == "bf16" else 32
            pointers = {"x": f"*{kind}", "w": "*u8", "scales": "*fp32", "zeros": "*u8", "bias": "*fp32"}
            pointers["out"] = f"*{kind}"
            constants = {
                "GROUP": group,
                "HAS_BIAS": True,
                "ACTIVATION": ACTIVATIONS["gelu_tanh"],
                "IEEE": kind == "fp32",
            }
            yield Variant(f"int4_linear {kind} group {group}", int4.int4_linear_kernel, pointers, constants, config)
    tables = {"tables": "*fp32", "codes": "*u8", "alphas": "*fp32", "bias": "*fp32"}
    pointers = {"x": "*bf16", "tables": "*fp32"}
    yield Variant("binary_tables bf16", binary.binary_tables_kernel, pointers, {}, single(BLOCK_B=binary.TABLE_BLOCK))
    for config in tuned(binary.TABLE_CONFIGS):
        constants = {"Q": 3, "GROUP_BYTES": 16, "HAS_BIAS": True}
        yield Variant("binary_lookup bf16", binary.binary_lookup_kernel, {**tables, "out": "*bf16"}, constants, config)
    for config in tuned(binary.DOT_CONFIGS):
        for group in (128, 16):
            pointers = {**tables, "x": "*bf16", "out": "*bf16"}
            constants = {"Q": 3, "GROUP": group, "HAS_BIAS": True, "IEEE": False}
            yield Variant(f"binary_dot bf16 group {group}", binary.binary_dot_kernel, pointers, constants, config)
    for kind, side in (("bf16", 64), ("fp16", 128), ("fp32", 32)):
        pointers = {"x": f"*{kind}", "left": "*fp32", "right": "*fp32", "q": "*i8", "scale": "*fp32"}
        constants = {"LOW": -128, "HIGH": 127, "FIXED": kind == "fp16", "IEEE": kind == "fp32"}
        constants |= {"BLOCK_1": side, "BLOCK_2": side}
        for config in tuned(kronecker.CONFIGS):
            name = f"kronecker_quantize {kind} {side} x {side}"
            yield Variant(name, kronecker.kronecker_quantize_kernel, pointers, constants, config)
    for kind in ("bf16", "fp32"):
        pointers = {"x": f"*{kind}", "out": f"*{kind}"}
        for config in tuned(softmax.CONFIGS):
            yield Variant(f"two_pass_softmax {kind}", softmax.two_pass_softmax_kernel, pointers, {}, config)


def compile_variant(variant: Variant, capability: int) -> Any:
    """The compiled kernel for one compute capability (``90``), with ``asm["ptx"]`` and ``asm["cubin"]``.

    Raises:
        BackendError: Triton or ptxas refuses it, or this process runs Triton's interpreter.
    """
    if INTERPRETED:
        raise BackendError("Triton's interpreter compiles nothing", node=variant.name, hint="unset TRITON_INTERPRET")
    constants = {**variant.constants, **variant.config.kwargs}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(variant.kernel.arg_names) if n in variant.pointers
    }
    source = ASTSource(variant.kernel, variant.signature(), constants, attributes)
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    try:
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as exc:  # Triton raises classes of several modules, ptxas errors among them
        raise BackendError(
            f"a kernel does not compile for sm_{capability}", node=variant.name, found=str(exc).strip()[-600:]
        ) from exc
