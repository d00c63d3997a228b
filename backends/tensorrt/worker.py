"""Parses and builds ONNX files with TensorRT in a process of its own: the parser can crash, and must not take us along.

Run as a script with two arguments: a JSON file with a list of jobs, and where to write the list of answers. It imports
nothing of foldline. Every job is built in a fork, where the system has one, so that one file's crash is that file's
answer.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from typing import Any

Job = dict[str, Any]
LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<inputs>\[.*?\]), Constants: (?P<constants>\[.*?\]), "
    r"Outputs: (?P<outputs>\[.*?\]), TacticName: (?P<tactic>.*?), StreamId: .*?Metadata:(?P<metadata>.*)$"
)
TENSOR = re.compile(r"Name: (?P<name>.*?), Dimensions: \[(?P<dims>[^\]]*)\].*?Datatype: (?P<dtype>\w+)")


def logger(trt: Any, lines: list[tuple[str, str]]) -> Any:
    """A TensorRT logger that keeps (severity, text) in ``lines``."""

    class Keep(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.append((str(severity).rsplit(".", 1)[-1], message))

    return Keep()


def layers(lines: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The engine's layers from the verbose log: name, type, tensors with types, and the ONNX nodes they come from."""
    found = []
    for _, text in lines:
        if not text.startswith("Layers:"):
            continue
        for line in text.splitlines():
            match = LINE.match(line)
            if match:
                found.append(
                    {
                        "name": match["name"],
                        "type": match["type"],
                        "inputs": _tensors(match["inputs"]),
                        "constants": _tensors(match["constants"]),
                        "outputs": _tensors(match["outputs"]),
                        "tactic": match["tactic"],
                        "nodes": re.findall(r"\[ONNX Layer: (.*?)\]", match["metadata"]),
                    }
                )
    return found


def _tensors(text: str) -> list[dict[str, str]]:
    return [{"name": m["name"], "shape": m["dims"], "dtype": m["dtype"]} for m in TENSOR.finditer(text)]


def run(job: Job) -> dict[str, Any]:
    """Parse and build one file; see engine.py for the keys of a job and of the answer."""
    trt = importlib.import_module(job["library"])
    lines: list[tuple[str, str]] = []
    log = logger(trt, lines)
    builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    answer: dict[str, Any] = {"version": trt.__version__, "parsed": False, "built": False, "layers": [], "errors": []}
    answer["parsed"] = bool(parser.parse_from_file(job["model"]))
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        answer["errors"].append({"node": error.node_name(), "op": error.node_operator(), "text": error.desc()})
    if answer["parsed"] and job.get("build", True):
        _build(trt, builder, network, job, answer, log)
    answer["layers"] = answer["layers"] or layers(lines)
    answer["warnings"] = [text for severity, text in lines if severity == "WARNING"]
    if not answer["errors"] and not answer["built"] and job.get("build", True):
        texts = [
            text for severity, text in lines if severity in ("ERROR", "INTERNAL_ERROR") and "catchCuda" not in text
        ]
        answer["errors"] = [{"node": "", "op": "", "text": text} for text in texts]
    return answer


def _build(trt: Any, builder: Any, network: Any, job: Job, answer: dict[str, Any], log: Any) -> None:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.get("capability") and hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job['capability']}"), 0)
    if job.get("workspace"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(job["workspace"]))
    _profile(builder, network, config, job.get("profiles") or {})
    cache = None
    if job.get("timing_cache"):
        stored = b""
        if os.path.exists(job["timing_cache"]):
            with open(job["timing_cache"], "rb") as file:
                stored = file.read()
        cache = config.create_timing_cache(stored)
        config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    answer["built"] = plan is not None
    answer["inputs"] = [_binding(network.get_input(i)) for i in range(network.num_inputs)]
    answer["outputs"] = [_binding(network.get_output(i)) for i in range(network.num_outputs)]
    if plan is None:
        return
    answer["bytes"] = int(plan.nbytes)
    if job.get("engine"):
        with open(job["engine"], "wb") as file:
            file.write(memoryview(plan))
    if cache is not None:
        with open(job["timing_cache"], "wb") as file:
            file.write(memoryview(cache.serialize()))
    if job.get("inspect"):
        engine = trt.Runtime(log).deserialize_cuda_engine(plan)
        if engine is not None:
            text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
            answer["inspector"] = json.loads(text)


def _binding(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).rsplit(".", 1)[-1].lower()}


def _profile(builder: Any, network: Any, config: Any, given: dict[str, Any]) -> None:
    """One optimization profile, where a size varies: what the job says, else from 1 to 64 with 8 as the optimum."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if not any(-1 in tuple(t.shape) for t in inputs):
        return
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        sizes = given.get(tensor.name) or [[bound if d == -1 else d for d in shape] for bound in (1, 8, 64)]
        profile.set_shape(tensor.name, *[tuple(size) for size in sizes])
    config.add_optimization_profile(profile)


def isolated(job: Job) -> dict[str, Any]:
    """``run`` in a fork. A process that dies answers with the signal or exit code under ``crash``."""
    if not hasattr(os, "fork"):
        return _guarded(job)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        # What the library prints by itself goes nowhere: the answer holds what matters.
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        with os.fdopen(writable, "w") as pipe:
            json.dump(_guarded(job), pipe)
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text and status == 0:
        answer: dict[str, Any] = json.loads(text)
        return answer
    return {"parsed": False, "built": False, "crash": os.waitstatus_to_exitcode(status), "errors": [], "layers": []}


def _guarded(job: Job) -> dict[str, Any]:
    try:
        return run(job)
    except Exception as exc:  # whatever the bindings raise is the answer to this job, not the end of the others
        text = f"{type(exc).__name__}: {exc}"
        return {"parsed": False, "built": False, "errors": [{"node": "", "op": "", "text": text}], "layers": []}


def main() -> None:
    source, target = sys.argv[1:3]
    with open(source) as file:
        jobs = json.load(file)
    for library in {job["library"] for job in jobs}:
        importlib.import_module(library)  # once, before the forks
    answers = [isolated(job) for job in jobs]
    with open(target, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
