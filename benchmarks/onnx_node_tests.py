"""onnx's own node tests through graph optimizers: how many models come out wrong, invalid, or not at all.

    OMP_NUM_THREADS=1 python benchmarks/onnx_node_tests.py --results FILE [--tools foldline,onnxslim] [--shard 0/8]
                                                           [--only SUBSTRING] [--timeout 60]
    python benchmarks/onnx_node_tests.py --results FILE --table

Cases: ``onnx.backend.test.case.node.collect_testcases`` as they are, with every input but the first baked as an
initializer, and with all inputs baked (each only where it differs from the one before). Judge: the suite's expected
outputs at the suite's tolerance, run by ONNX Runtime without its own graph rewrites, or by onnx's reference evaluator
where ONNX Runtime cannot run the original; a case counts only where the unoptimised model passes (for ONNX Runtime's
own offline levels: where it can run the original). ``wrong``: the
optimised model gives other numbers, types or shapes. ``invalid``: the judge cannot run it, or its inputs or outputs
have other names. ``crash``: the optimizer raised an exception or took its process down. ``timeout``: it took longer
than that many seconds. Results are appended to FILE (JSON lines) as they come; what is in it is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import foldline
import numpy as np
import onnx

VARIANTS = ("as is", "first input", "all baked")
VERDICTS = ("wrong", "invalid", "crash", "timeout")
LATEST_IR = 13
"""ONNX Runtime refuses newer files; the suite's models carry the version of the installed onnx."""


# ---- the cases ---------------------------------------------------------------------------------------------
def collect() -> list[tuple[str, bytes, list[Any], list[Any], float, float]]:
    """(name, model, inputs, expected outputs, rtol, atol) of every node test; cached, for collecting takes a while."""
    cache = Path(tempfile.gettempdir()) / f"onnx-node-tests-{onnx.__version__}.pickle"
    if cache.exists():
        found: list[Any] = pickle.loads(cache.read_bytes())
        return found
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    found = []
    for case in cases:
        if case.model is not None and case.data_sets:
            inputs, outputs = case.data_sets[0]
            found.append((case.name, case.model.SerializeToString(), inputs, outputs, case.rtol, case.atol))
    part = cache.with_suffix(f".{multiprocessing.current_process().pid}")
    part.write_bytes(pickle.dumps(found))
    part.replace(cache)
    return found


def variants(model: onnx.ModelProto, inputs: list[Any]) -> dict[str, tuple[onnx.ModelProto, dict[str, Any]]]:
    """The model as it is and with inputs baked, each with the inputs that are left."""
    model.ir_version = min(model.ir_version, LATEST_IR)
    names = [v.name for v in model.graph.input]
    feeds = dict(zip(names, inputs, strict=False))
    found = {"as is": (model, feeds)}
    stored = {t.name for t in model.graph.initializer}
    declared = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}  # 0: no tensor
    for variant, kept in (("first input", 1), ("all baked", 0)):
        plain = [n for n in names[kept:] if isinstance(feeds.get(n), np.ndarray | np.generic) and declared[n]]
        bake = [n for n in plain if n not in stored]
        if not bake or any(set(bake) == set(feeds) - set(rest) for _, rest in found.values()):
            continue
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        copy.ir_version = max(copy.ir_version, 4)  # before that every initializer had to be an input
        for name in bake:
            copy.graph.initializer.append(tensor(name, np.asarray(feeds[name]), declared[name]))
        rest = [v for v in copy.graph.input if v.name not in bake]
        del copy.graph.input[:]
        copy.graph.input.extend(rest)
        found[variant] = copy, {n: x for n, x in feeds.items() if n not in bake}
    return found


def tensor(name: str, data: np.ndarray, kind: int) -> onnx.TensorProto:
    if kind == onnx.TensorProto.STRING:
        texts = [x if isinstance(x, bytes) else str(x).encode() for x in data.ravel().tolist()]
        return onnx.helper.make_tensor(name, kind, data.shape, texts)
    wanted = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return onnx.numpy_helper.from_array(np.ascontiguousarray(data.astype(wanted)).reshape(data.shape), name)


# ---- the tools ---------------------------------------------------------------------------------------------
def with_foldline(name: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
        from foldline import passes as P

        made: onnx.ModelProto = getattr(P, name)(model, verify=False).model  # the judge verifies
        return made

    return optimize


def with_onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    return onnxslim.slim(model)


def with_onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim

    return onnxsim.simplify(model)[0]


def with_onnxoptimizer(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxoptimizer

    return onnxoptimizer.optimize(model, onnxoptimizer.get_fuse_and_elimination_passes(), fixed_point=True)


def with_onnxscript(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxscript import optimizer

    return optimizer.optimize(model)


def with_runtime(level: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
        import onnxruntime as ort

        with tempfile.TemporaryDirectory() as folder:
            options = ort.SessionOptions()
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
            options.optimized_model_filepath = f"{folder}/model.onnx"
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return onnx.load(f"{folder}/model.onnx")

    return optimize


TOOLS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "foldline": with_foldline("fold"),
    "foldline-clean": with_foldline("clean"),
    "onnxslim": with_onnxslim,
    "onnxsim": with_onnxsim,
    "onnxoptimizer": with_onnxoptimizer,
    "onnxscript": with_onnxscript,
    "onnxruntime-basic": with_runtime("BASIC"),
    "onnxruntime-extended": with_runtime("EXTENDED"),
    "onnxruntime-all": with_runtime("ALL"),
}
PACKAGES = {"foldline-clean": "foldline"} | {t: "onnxruntime" for t in TOOLS if t.startswith("onnxruntime")}


# ---- the judge ---------------------------------------------------------------------------------------------
def by_runtime(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {v.name: feeds[v.name] for v in session.get_inputs()})


def by_reference(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, feeds)


JUDGES = {"onnxruntime": by_runtime, "reference": by_reference}


def agree(got: Any, want: Any, rtol: float, atol: float) -> bool:
    """The suite's own comparison: type and shape equal, numbers within its tolerance."""
    if want is None or got is None:
        return got is None and want is None
    if isinstance(want, list | tuple):
        return (
            isinstance(got, list | tuple)
            and len(got) == len(want)
            and all(agree(g, w, rtol, atol) for g, w in zip(got, want, strict=True))
        )
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return False
    if want.dtype.kind in "OUS":
        return bool(np.array_equal(got.astype(object), want.astype(object)))
    if got.dtype != want.dtype:
        return False
    if got.dtype.kind == "V" or got.dtype.isbuiltin != 1:
        got, want = got.astype(np.float32), want.astype(np.float32)
    return bool(np.allclose(got, want, rtol=rtol, atol=atol, equal_nan=True))


def passes(judge: str, model: onnx.ModelProto, feeds: dict[str, Any], case: Any) -> str:
    """Why the model does not give what the suite expects ("" if it does)."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            got = JUDGES[judge](model, feeds)
    except Exception as error:  # whatever the runtime raises is a verdict on the model
        return f"invalid: {type(error).__name__}: {str(error).strip()[:300]}"
    if len(got) != len(case[3]):
        return "wrong: another number of outputs"
    for i, (g, w) in enumerate(zip(got, case[3], strict=True)):
        if not agree(g, w, case[4], case[5]):
            return f"wrong: output {i}"
    return ""


def judge_of(model: onnx.ModelProto, feeds: dict[str, Any], case: Any) -> str | None:
    """The judge that finds the unoptimised model right, None where neither does."""
    return next((j for j in JUDGES if not passes(j, model, feeds, case)), None)


# ---- workers -----------------------------------------------------------------------------------------------
def work(pipe: Any) -> None:
    """Answer requests until the pipe closes: a stage is announced before it starts, a crash is then its stage's."""
    cases = collect()
    while (request := pipe.recv()) is not None:
        index, variant, tool, judge = request
        case = cases[index]
        found = variants(onnx.load_from_string(case[1]), case[2]).get(variant)
        if found is None:
            pipe.send(("done", None))
            continue
        model, feeds = found
        if tool is None:
            pipe.send(("done", judge_of(model, feeds, case)))
            continue
        pipe.send(("stage", "crash"))
        try:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            made = TOOLS[tool](copy)
        except Exception as error:  # counted as the tool's crash, with what it says
            pipe.send(("done", f"crash: {type(error).__name__}: {str(error).strip()[:300]}"))
            continue
        pipe.send(("stage", "invalid"))
        pipe.send(("done", verdict(model, made, feeds, case, judge)))


def verdict(model: onnx.ModelProto, made: onnx.ModelProto, feeds: dict[str, Any], case: Any, judge: str) -> str:
    for what in ("input", "output"):
        before, after = ([v.name for v in getattr(m.graph, what)] for m in (model, made))
        if before != after:
            return f"invalid: {what}s {before} became {after}"
    return passes(judge, made, feeds, case)


class Worker:
    """One process that is started again when it dies or hangs."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.context = multiprocessing.get_context("spawn")
        self.start()

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def ask(self, *request: Any) -> Any:
        stage = "crash"
        self.pipe.send(request)
        while True:
            if not self.pipe.poll(self.timeout):
                self.stop()
                self.start()
                return f"timeout: {self.timeout:.0f} s"
            try:
                kind, answer = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                code = self.process.exitcode
                self.stop()
                self.start()
                return f"{stage}: the process died ({code})"
            if kind == "done":
                return answer
            stage = answer


# ---- results -----------------------------------------------------------------------------------------------
def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Counts per tool, over all cases and over those alone that ONNX Runtime can run."""
    lines = [f"onnx {onnx.__version__}"]
    for title, judges in (("All cases", tuple(JUDGES)), ("Cases that ONNX Runtime runs", ("onnxruntime",))):
        lines += ["", title, "", "| tool | cases | " + " | ".join(VERDICTS) + " |", "|---" * 6 + "|"]
        for tool in TOOLS:
            found = [r["verdict"] for r in rows if r["tool"] == tool and r["judge"] in judges]
            if found:
                counts = Counter(v.partition(":")[0] for v in found)
                package = PACKAGES.get(tool, tool)
                name = f"{tool} {foldline.__version__ if package == 'foldline' else version(package)}"
                lines.append(f"| {name} | {len(found)} | " + " | ".join(str(counts[v]) for v in VERDICTS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case, from the i-th on")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--table", action="store_true", help="print the table of what FILE holds, run nothing")
    args = parser.parse_args()
    if not args.table:
        run(args)
    rows = read(args.results)
    print(table(rows))
    for row in rows:
        if row["verdict"] and row["tool"].startswith("foldline"):
            print(f"{row['tool']}: {row['case']} ({row['variant']}): {row['verdict']}")


def run(args: argparse.Namespace) -> None:
    known = read(args.results)
    judges = {(r["case"], r["variant"]): r["judge"] for r in known}
    done = {(r["case"], r["variant"], r["tool"]) for r in known}
    shard, of = map(int, args.shard.split("/"))
    worker = Worker(args.timeout)
    with args.results.open("a") as out:

        def put(case: str, variant: str, tool: str, judge: str | None, verdict: str) -> None:
            row = {"case": case, "variant": variant, "tool": tool, "judge": judge, "verdict": verdict}
            print(json.dumps(row), file=out, flush=True)

        for index, case in enumerate(collect()):
            if index % of != shard or args.only not in case[0]:
                continue
            for variant in VARIANTS:
                key = case[0], variant
                if key not in judges:
                    answer = worker.ask(index, variant, None, None)
                    judges[key] = answer if answer in JUDGES else None
                    put(*key, "original", judges[key], "" if judges[key] else str(answer))
                for tool in args.tools.split(","):
                    able = judges[key] == "onnxruntime" or not tool.startswith("onnxruntime")
                    if judges[key] is not None and able and (*key, tool) not in done:
                        put(*key, tool, judges[key], worker.ask(index, variant, tool, judges[key]))
    worker.stop()


if __name__ == "__main__":
    main()
