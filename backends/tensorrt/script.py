"""How to build the engine elsewhere: the trtexec command line, and a script that lies beside the ONNX file."""

from __future__ import annotations

import shlex
from pathlib import Path

from .engine import EngineOptions


def trtexec(path: Path, options: EngineOptions, folder: bool = False) -> str:
    """The command line. With ``folder`` names are relative to the file's own folder."""
    name = path.name if folder else str(path)
    parts = ["trtexec", f"--onnx={name}", "--stronglyTyped", f"--saveEngine={Path(name).with_suffix('.engine')}"]
    for flag, position in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2)):
        shapes = ",".join(f"{k}:{'x'.join(map(str, v[position]))}" for k, v in options.profiles.items())
        if shapes:
            parts.append(f"--{flag}={shapes}")
    if options.workspace is not None:
        parts.append(f"--memPoolSize=workspace:{options.workspace // 2**20}M")
    if options.timing_cache is not None:
        parts.append(f"--timingCacheFile={Path(options.timing_cache).name if folder else options.timing_cache}")
    return shlex.join([*parts, "--profilingVerbosity=detailed", "--exportLayerInfo=layers.json"])


def write_script(path: Path, options: EngineOptions) -> Path:
    """Write ``<name>.build.sh`` beside the file and return its path."""
    target = path.with_suffix(".build.sh")
    target.write_text(
        "#!/bin/sh\n"
        f"# Builds the TensorRT engine of {path.name} and times it, on the machine with the GPU.\n"
        'set -e\ncd "$(dirname "$0")"\n'
        f"{trtexec(path, options, folder=True)}\n"
    )
    target.chmod(0o755)
    return target
