"""Every architecture from its ONNX file alone: exported once, then folded and pruned, both judged in ONNX Runtime.

    OMP_NUM_THREADS=1 python benchmarks/onnx_models.py --json FILE [--timm] [--minutes 60] [--retry] [MODEL ...]
    python benchmarks/onnx_models.py --json FILE --table

Models: ``architectures.py``, with ``--timm`` every architecture of timm (of the variants that one module of timm
defines, those with the fewest parameters first, up to ``--parameters``). Batch-norm statistics, gains and layer scales
are random, so that no branch is the identity or hidden behind a zero. Batch 2; 128 x 128 pixels where the model takes
them, else its own size. Each step of a model runs in a process of its own, 10 GiB of address space:

- export: ``torch.onnx.export(dynamo=True, optimize=False)``, and the same program after the exporter's own optimizer;
  or torch's older exporter without any folding (``--exporter torchscript``, several times faster). Where the one asked
  for fails the other is taken; the table tells which.
- fold: ``P.fold`` on the file as exported, both run with ONNX Runtime's graph optimizations off. "error" is relative to
  the largest number of the output; wrong is above 1e-4 (unless the exported file is about as far from the module in
  float64: rounding that the network amplifies), another shape, or NaN where there was none.
- prune: ``P.prune(file, ratio=0.5, verify=True)`` on the exporter's optimized file, nothing else said. Good is: fewer
  parameters, runs in ONNX Runtime as users run it, outputs of the same shapes and finite. "error" is the sliced model
  against the masked original, over the groups whose cut axis carries no statistic, relative to the largest output.

FILE holds one line of JSON per model; models that it names are not run again (``--retry``: those that failed are).
``--table`` prints it as markdown. Exports are deleted after use. Needs the extras timm, transformers, bench.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import architectures
import numpy as np
from coverage import isolated
from fold_models import PIXELS, WRONG, names, randomize, worst


def build(name: str, pixels: int | None) -> tuple[Any, Any]:
    """(module in eval mode with random statistics and gains, its example inputs)."""
    model, inputs = architectures.build(name, pixels=pixels)
    return randomize(model), inputs


def export(name: str, folder: str, limit: float, exporter: str = "dynamo") -> dict[str, Any]:
    """Write raw.onnx, plain.onnx and inputs.npz; raises what the last exporter raises at the model's own size."""
    own = [(exporter, None), *((other, None) for other in EXPORTERS if other != exporter)]
    for by, pixels in own if name.startswith("hf:") else [(exporter, PIXELS), *own]:
        try:
            model, inputs = build(name, pixels)
            if (size := architectures.parameters_of(model)) > limit:
                return {"skipped": f"{size / 1e6:.0f} M parameters"}
            architectures.output_of(model, inputs)
            raw, plain = EXPORTERS[by](model, inputs)
        except Exception:  # many take no other size than their own, and some one exporter only
            if (by, pixels) == own[-1]:
                raise
            continue
        break
    _write(Path(folder) / "raw.onnx", raw)
    _write(Path(folder) / "plain.onnx", plain)
    given = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    feeds = {v.name: x.numpy() for v, x in zip(raw.graph.input, given, strict=True)}
    np.savez(Path(folder) / "inputs.npz", **feeds)
    nodes = [len(raw.graph.node), len(plain.graph.node)]
    return {"nodes": nodes, "parameters": size, "pixels": pixels, "exporter": by}


def by_dynamo(model: Any, inputs: Any) -> tuple[Any, Any]:
    """(the file as exported, the same after the exporter's own optimizer)."""
    import torch

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), None)
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    raw = program.model_proto
    program.optimize()
    return raw, program.model_proto


def by_torchscript(model: Any, inputs: Any) -> tuple[Any, Any]:
    """The older exporter's file, twice: batch norms not folded, shape arithmetic left in."""
    import onnx
    import torch

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), None)
    buffer, keep = io.BytesIO(), torch.onnx.TrainingMode.PRESERVE
    options = dict(opset_version=17, training=keep, do_constant_folding=False, input_names=list(kwargs or ()) or None)
    torch.onnx.export(model, args, buffer, kwargs=kwargs, dynamo=False, verbose=False, **options)
    raw = onnx.load_from_string(buffer.getvalue())
    return raw, raw


EXPORTERS = {"dynamo": by_dynamo, "torchscript": by_torchscript}


def fold(folder: str) -> dict[str, Any]:
    import onnx
    from foldline import passes as P

    proto, feeds = onnx.load(Path(folder) / "raw.onnx"), dict(np.load(Path(folder) / "inputs.npz"))
    start = time.process_time()
    folded = P.fold(proto, verify=False).model
    seconds = time.process_time() - start
    onnx.checker.check_model(folded)
    error = worst(run(proto, feeds, optimized=False), run(folded, feeds, optimized=False))
    return {"nodes": [len(proto.graph.node), len(folded.graph.node)], "error": error, "seconds": seconds}


def against_double(name: str, folder: str, pixels: int | None) -> dict[str, Any]:
    """How far both files are from the module in float64: a network that amplifies rounding errors tells them apart."""
    import onnx
    import torch
    from foldline import passes as P
    from torch.utils import _pytree as pytree

    proto, feeds = onnx.load(Path(folder) / "raw.onnx"), dict(np.load(Path(folder) / "inputs.npz"))
    model, inputs = build(name, pixels)
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    truth = [architectures.output_of(model.double(), inputs).numpy()]
    exported, folded = (run(m, feeds, optimized=False) for m in (proto, P.fold(proto, verify=False).model))
    return {"from_double": [worst(truth, [m[0].astype(np.float64)]) for m in (exported, folded)]}


def prune(folder: str) -> dict[str, Any]:
    import onnx
    from foldline import passes as P

    proto, feeds = onnx.load(Path(folder) / "plain.onnx"), dict(np.load(Path(folder) / "inputs.npz"))
    start = time.process_time()
    result = P.prune(proto, ratio=0.5, verify=True)
    seconds = time.process_time() - start
    onnx.checker.check_model(result.model)
    before, after = (run(m, feeds, optimized=True) for m in (proto, result.model))
    if [x.shape for x in before] != [x.shape for x in after]:
        raise AssertionError(f"outputs of {[x.shape for x in before]} became {[x.shape for x in after]}")
    if any(np.isfinite(x).all() and not np.isfinite(y).all() for x, y in zip(before, after, strict=True)):
        raise AssertionError("the pruned model gives NaN or infinity")
    left = result.report.after.parameters / result.report.before.parameters
    if not left < 1:
        raise AssertionError(f"not smaller: {left:.3f} of the parameters are left")
    identity = result.report.passes[0].details["identity"]
    return {"share": left, "error": identity.get("relative_error"), "seconds": seconds}


def run(proto: Any, feeds: dict[str, np.ndarray], *, optimized: bool) -> list[np.ndarray]:
    """The outputs of a model in ONNX Runtime, its graph optimizations as they are by default, or off."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = {v.name for v in session.get_inputs()}
    found: list[np.ndarray] = session.run(None, {k: v for k, v in feeds.items() if k in taken})
    return found


def _write(path: Path, proto: Any) -> None:
    path.write_bytes(proto.SerializeToString())


def measure(name: str, exporter: str, limit: float, timeout: float, keep: Path | None) -> dict[str, Any]:
    """One line of the results; where a step fails and ``keep`` is given, the exported files are left there."""
    with tempfile.TemporaryDirectory(prefix="onnx-models-") as folder:
        found: dict[str, Any] = {
            "model": name,
            "export": isolated(export, name, folder, limit, exporter, limit=timeout),
        }
        if "failed" not in found["export"] and "skipped" not in found["export"]:
            found["fold"] = isolated(fold, folder, limit=timeout)
            if found["fold"].get("error", 0) > WRONG:
                found["fold"] |= isolated(against_double, name, folder, found["export"]["pixels"], limit=timeout)
            found["prune"] = isolated(prune, folder, limit=timeout)
        if keep is not None and failed(found) and "failed" not in found["export"]:
            at = keep / name.replace(":", "_")
            at.mkdir(parents=True, exist_ok=True)
            for file in Path(folder).iterdir():
                (at / file.name).write_bytes(file.read_bytes())
    return found


def failed(found: dict[str, Any]) -> bool:
    """Whether any step failed or went wrong."""
    return any("failed" in found.get(step, {}) for step in ("export", "fold", "prune")) or wrong(found)


def wrong(found: dict[str, Any]) -> bool:
    """Whether the folded model computes something else: not the exported one, and further from float64 than it."""
    fold = found.get("fold", {})
    if "error" not in fold or fold["error"] <= WRONG:
        return False
    before, after = fold.get("from_double", (0.0, math.inf))
    return not after <= 2 * before


def results(path: Path | None) -> dict[str, dict[str, Any]]:
    """The last line of each model, in order."""
    if path is None or not path.exists():
        return {}
    return {(line := json.loads(text))["model"]: line for text in path.read_text().splitlines()}


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    made = found["export"]
    if "failed" in made or "skipped" in made:
        why = f"not exported: {made['failed']}" if "failed" in made else f"left out: {made['skipped']}"
        return f"| {found['model']} | {why} | | | |"
    folded, pruned = found["fold"], found["prune"]
    nodes = "-" if "failed" in folded else f"{folded['nodes'][1]}"
    error = folded["failed"] if "failed" in folded else ("WRONG " if wrong(found) else "") + f"{folded['error']:.1e}"
    if "from_double" in folded:
        error += " (from float64: {:.1e} exported, {:.1e} folded)".format(*folded["from_double"])
    if "failed" in pruned:
        left = pruned["failed"]
    else:
        left = f"{pruned['share']:.2f}, " + ("statistics only" if pruned["error"] is None else f"{pruned['error']:.0e}")
    mark = " (torchscript)" if made.get("exporter") == "torchscript" else ""
    return f"| {found['model']}{mark} | {made['nodes'][0]} | {nodes} | {error} | {left} |"


def totals(lines: list[dict[str, Any]]) -> str:
    exported = [x for x in lines if "nodes" in x["export"]]
    folded = [x for x in exported if "failed" not in x["fold"]]
    pruned = [x["prune"] for x in exported if "failed" not in x["prune"]]
    good = [x["fold"] for x in folded if not wrong(x)]
    errors = [x["error"] for x in pruned if x["error"] is not None]
    before, after = (sum(x["nodes"][i] for x in good) for i in (0, 1))
    return (
        f"{len(lines)} models: {sum('skipped' in x['export'] for x in lines)} too large, "
        f"{sum('failed' in x['export'] for x in lines)} not exported by torch. Of {len(exported)} files folded "
        f"{len(good)}, wrong {len(folded) - len(good)}, failed {len(exported) - len(folded)}; {before:,} nodes became "
        f"{after:,}, largest error {max((x['error'] for x in good), default=0):.1e}. Pruned {len(pruned)}, failed "
        f"{len(exported) - len(pruned)}; largest identity error {max(errors, default=0):.1e}, nothing to compare in "
        f"{len(pruned) - len(errors)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="append one line of JSON per model; those it names are done")
    parser.add_argument("--retry", action="store_true", help="run models again whose line tells of a failure")
    parser.add_argument("--table", action="store_true", help="print --json as markdown and run nothing")
    parser.add_argument("--timm", action="store_true", help="timm's whole list")
    parser.add_argument("--exporter", choices=list(EXPORTERS), default="dynamo")
    parser.add_argument("--parameters", type=float, default=60e6, help="limit of --timm")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each step of a model")
    parser.add_argument("--keep", type=Path, help="leave the exported files of models that fail in this folder")
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()
    known = results(args.json)
    if args.table:
        print("| model | nodes exported | folded | fold: error | prune: left, error |\n|---|---|---|---|---|")
        print("\n".join(row(x) for x in known.values()) + "\n\n" + totals(list(known.values())))
        return
    import torch
    from support import timm_models

    timm_models.timm(), timm_models.transformers()  # imported before the forks
    torch.set_num_threads(1)
    torch.onnx.export(torch.nn.ReLU(), (torch.ones(1),), dynamo=True, verbose=False)  # the exporter's tables too
    start = time.monotonic()
    chosen = args.models or (names(args.parameters) if args.timm else architectures.MODELS)
    done = {n for n, x in known.items() if not (args.retry and failed(x))}
    ran = []
    for name in (n for n in chosen if n not in done):
        if time.monotonic() - start > 60 * args.minutes:
            break
        found = measure(name, args.exporter, args.parameters if args.timm else math.inf, args.timeout, args.keep)
        ran.append(found)
        print(row(found), flush=True)
        if args.json:
            with args.json.open("a") as out:
                out.write(json.dumps(found) + "\n")
    print("\n" + totals(ran))


if __name__ == "__main__":
    main()
