"""Which of the CPU specs fits the machine this runs on."""

from __future__ import annotations

import platform
from pathlib import Path

VNNI = frozenset(("avx512_vnni", "avx_vnni", "amx_int8", "avx_vnni_int8"))


def cpu_target(machine: str | None = None, flags: frozenset[str] | None = None) -> str:
    """Name of the CPU target: by the instruction set of this machine, or of the one described.

    Args:
        machine: architecture as ``platform.machine()`` names it.
        flags: instruction sets as Linux lists them; where they cannot be read, VNNI is not assumed.
    """
    machine = (platform.machine() if machine is None else machine).lower()
    if machine in ("aarch64", "arm64"):
        return "onnxruntime-arm"
    flags = _flags() if flags is None else flags
    return "onnxruntime-cpu" if flags & VNNI else "onnxruntime-cpu-avx2"


def _flags() -> frozenset[str]:
    source = Path("/proc/cpuinfo")
    if not source.exists():
        return frozenset()
    for line in source.read_text(errors="replace").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
