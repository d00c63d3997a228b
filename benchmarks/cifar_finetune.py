"""ResNet-56 on CIFAR-10 pruned to 2.1x and 2.55x fewer MACs and fine-tuned: foldline and torch-pruning, same budget.

    python benchmarks/cifar_finetune.py prune --out .bench/r56 --settings foldline:l2/uniform peer:l2/local/inner
    python benchmarks/cifar_finetune.py train .bench/r56 --device cuda --epochs 60 --out $OUT
    python benchmarks/cifar_finetune.py table $OUT

Where there is no GPU, bfloat16 and channels-last halve a step (AVX-512 BF16), and each side gets the peak rate that a
short training finds for it on held-out training images:

    python benchmarks/cifar_finetune.py search .bench/r56 --half --nhwc --distil 0.5 --only A B --out OUT
    python benchmarks/cifar_finetune.py train .bench/r56 --half --nhwc --distil 0.5 --rates OUT/rates.json --out OUT

``base`` first fine-tunes the common base further, once for both sides; ``prune --base`` then starts from its file.
``prune`` needs foldline and torch-pruning 1.6.1; the other commands torch, numpy and pillow only, so that they run on
any machine with a GPU. The data folder (FOLDLINE_DATA or --data) holds cifar10-jpeg.tar.xz and resnet56-jpeg.pt; the
images are JPEG copies, which cost accuracy: compare with the row "base", not with figures of the original images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # streams that may run at once; read when CUDA starts
sys.path.insert(0, str(Path(__file__).resolve().parent))
from cifar_finetune_model import cost, rebuild, shortcuts_of
from cifar_finetune_train import ARCHIVE, Budget, Trainee, fastest, images, normalized, train
from support.resnet_cifar import ResNetCifar, resnet56

SETTINGS = [
    "foldline:l2/uniform",
    "foldline:l2/uniform/inner",
    "foldline:l2/uniform/recover",
    "foldline:l2/uniform/inner/recover",
    "foldline:l2/layerwise/inner/recover",
    "foldline:fisher/global/inner/recover",
    "foldline:random/uniform",
    "foldline:l2/uniform/scratch",
    "peer:l2/local",
    "peer:l2/local/inner",
    "peer:group/global/inner",
    "peer:l2/local/rewritten",
    "peer:group/global/rewritten",
]


def data_folder(given: Path | None) -> Path:
    root = Path(__file__).resolve().parents[1]
    tried = [given, os.environ.get("FOLDLINE_DATA"), root / ".bench", root.parent / "shared" / "data"]
    for place in tried:
        if place and (Path(place) / ARCHIVE).is_file():
            return Path(place)
    raise SystemExit(f"{ARCHIVE} not found: give its folder by --data or FOLDLINE_DATA")


def load_base(args: argparse.Namespace) -> ResNetCifar:
    path = args.base or data_folder(args.data) / "resnet56-jpeg.pt"
    model = resnet56()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def prune(args: argparse.Namespace) -> None:
    from cifar_finetune_prune import prune_all

    base = load_base(args)
    pixels, labels = images(data_folder(args.data) / ARCHIVE, "train", args.samples // 10, args.cache)
    x = normalized(pixels).contiguous()
    pairs = list(zip(x.split(128), labels.split(128), strict=True))
    torch.manual_seed(args.seed)
    test = None
    if args.evaluate:
        pixels, labels = images(data_folder(args.data) / ARCHIVE, "test", args.evaluate // 10, args.cache)
        test = (normalized(pixels).contiguous(), labels)
    prune_all(base, args.settings, args.speedups, pairs, args.out, args.seed, test)


def trainees_of(entries: list[dict[str, Any]], folder: Path, budget: Budget, args: argparse.Namespace) -> list[Trainee]:
    made = []
    for e in entries:
        state = torch.load(folder / f"{e['name']}.pt", map_location="cpu", weights_only=True)
        model, peak = rebuild(state, e["shortcuts"]), (args.peaks or {}).get(e["setting"])
        made.append(Trainee(e["name"], model, budget, args.device, args.half, args.nhwc, peak))
    return made


def teacher_of(args: argparse.Namespace, budget: Budget) -> Trainee | None:
    """The unpruned base, where its answers are wanted."""
    if not args.distil:
        return None
    return Trainee("base", load_base(args), budget, args.device, args.half, args.nhwc)


def budget_of(args: argparse.Namespace) -> Budget:
    """What the command line gives to every network."""
    shared = {"decay": args.decay, "smoothing": args.smoothing, "distil": args.distil}
    return Budget(args.epochs, args.batch, args.rate, **shared)


def run_training(entries: list[dict[str, Any]], folder: Path, args: argparse.Namespace, say: Any) -> None:
    """Train the entries' networks in lockstep and write ``results.seedN[.part].json``."""
    started = time.monotonic()
    torch.backends.cudnn.benchmark = True
    archive = data_folder(args.data) / ARCHIVE
    data = {}
    for split, count in (("train", args.train_images), ("test", args.test_images)):
        pixels, labels = images(archive, split, count // 10, args.cache)
        data[split] = (pixels.to(args.device), labels.to(args.device))
    say(f"images on {args.device} after {time.monotonic() - started:.0f} s")
    budget = budget_of(args)
    if args.auto and args.device == "cuda":

        def build(half: bool, nhwc: bool) -> list[Trainee]:
            torch.backends.cudnn.allow_tf32 = not half
            return trainees_of(
                entries[-4:], folder, budget, argparse.Namespace(**vars(args) | {"half": half, "nhwc": nhwc})
            )

        args.half, args.nhwc = fastest(build, say)
    torch.backends.cudnn.allow_tf32 = not args.half
    trainees = trainees_of(entries, folder, budget, args)
    before = {} if args.no_before else {t.name: t.accuracy(*data["test"]) for t in trainees}
    for name, share in before.items():
        say(f"{name}: {100 * share:.2f} % before fine-tuning")
    minutes = args.minutes - (time.monotonic() - started) / 60
    agree = (lambda n: _agree(n, args)) if args.part else (lambda n: n)
    teacher = teacher_of(args, budget)
    epochs, curves = train(trainees, data, budget, args.seed, minutes, say, agree, teacher)
    rows = [
        {**e, "before": before.get(e["name"]), "after": curves[e["name"]][-1], "curve": curves[e["name"]]}
        for e in entries
    ]
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.processor()}"
    facts = {"torch": torch.__version__, "device": gpu, "epochs": epochs, "asked": args.epochs, "seed": args.seed}
    facts |= {"batch": args.batch, "rate": args.rate, "decay": args.decay, "smoothing": args.smoothing}
    facts |= {"rates": {t.name: t.peak for t in trainees}, "distil": args.distil}
    facts |= {"bf16": args.half, "seconds": round(time.monotonic() - started), "train images": args.train_images}
    facts |= {"test images": args.test_images}
    args.out.mkdir(parents=True, exist_ok=True)
    suffix = f".seed{args.seed}" + (f".{args.part}" if args.part else "")
    if args.save:
        weights = {t.name: {k: v.contiguous().cpu() for k, v in t.model.state_dict().items()} for t in trainees}
        torch.save(weights, args.out / f"trained{suffix}.pt")
    (args.out / f"results{suffix}.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1))


def _agree(epochs: int, args: argparse.Namespace) -> int:
    """The smallest number of epochs that any of the processes can afford (each leaves a file, all wait for all)."""
    (args.out / f"epochs.{args.part}.tmp").write_text(str(epochs))
    (args.out / f"epochs.{args.part}.tmp").replace(args.out / f"epochs.{args.part}")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = [args.out / f"epochs.{i}" for i in range(1, args.jobs + 1)]
        if all(f.is_file() for f in found):
            return min(int(f.read_text()) for f in found)
        time.sleep(0.2)
    raise SystemExit("another process of this run did not start")


RATES = (0.003, 0.01, 0.03)
HELD_OUT = 1000
CLOSE = 0.01
"""A standard error of an accuracy on HELD_OUT images: of rates this close to the best one the largest is taken, since
the training proper is longer than the search, and longer trainings bear larger rates."""


def search(args: argparse.Namespace) -> None:
    """The peak rate of each setting: every one of RATES for a few steps, judged on held-out training images.

    Writes ``rates.json`` ({setting: rate}), which ``train --rates`` takes, and prints all that was seen. The same
    batches and number of steps for all; the last HELD_OUT training images are not trained on here (the base itself,
    common to all, was).
    """
    entries = json.loads((args.folder / "index.json").read_text())
    entries = [e for e in entries if "failed" not in e and e["name"] in args.only]
    pixels, labels = (t.to(args.device) for t in images(data_folder(args.data) / ARCHIVE, "train", None, args.cache))
    data = {"train": (pixels[:-HELD_OUT], labels[:-HELD_OUT]), "test": (pixels[-HELD_OUT:], labels[-HELD_OUT:])}
    args.epochs = args.steps * args.batch / len(data["train"][0])
    budget = budget_of(args)
    trainees = []
    for rate in RATES:
        args.peaks = {e["setting"]: rate for e in entries}
        for t in trainees_of(entries, args.folder, budget, args):
            t.name = f"{t.name} {rate:g}"
            trainees.append(t)
    say = lambda text: print(text, flush=True)  # noqa: E731
    _, curves = train(trainees, data, budget, args.seed, float("inf"), say, teacher=teacher_of(args, budget))
    found: dict[str, float] = {}
    for e in entries:
        scores = {rate: curves[f"{e['name']} {rate:g}"][-1] for rate in RATES}
        found[e["setting"]] = max(rate for rate, score in scores.items() if score >= max(scores.values()) - CLOSE)
        shown = ", ".join(f"{rate:g}: {100 * score:.2f} %" for rate, score in scores.items())
        say(f"{e['name']}: {shown}; taken: {found[e['setting']]:g}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rates.json").write_text(json.dumps(found, indent=1))


def train_command(args: argparse.Namespace) -> None:
    args.peaks = json.loads(args.rates.read_text()) if args.rates else {}
    entries = json.loads((args.folder / "index.json").read_text())
    runnable = [e for e in entries if "failed" not in e and (not args.only or e["name"] in args.only)]
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.part:
        failed = [e for e in entries if "failed" in e]
        (args.out / "failed.json").write_text(json.dumps(failed, indent=1))
    if args.jobs > 1 and args.auto:
        raise SystemExit("--auto lets every process choose for itself: with --jobs give --half and --nhwc instead")
    if args.jobs > 1 and not args.part:
        for old in args.out.glob("epochs.*"):
            old.unlink()
        images(data_folder(args.data) / ARCHIVE, "train", args.train_images // 10, args.cache)  # decoded once for all
        images(data_folder(args.data) / ARCHIVE, "test", args.test_images // 10, args.cache)
        running = [subprocess.Popen([sys.executable, *sys.argv, "--part", str(i + 1)]) for i in range(args.jobs)]
        raise SystemExit(max(p.wait() for p in running))
    mine = runnable[args.part - 1 :: args.jobs] if args.part else runnable
    prefix = f"[{args.part}] " if args.part else ""
    run_training(mine, args.folder, args, lambda text: print(prefix + text, flush=True))


def base_command(args: argparse.Namespace) -> None:
    """Fine-tune the common base further; ``base.pt`` in --out is what ``prune --base`` takes."""
    args.part, args.jobs, args.save, args.peaks, args.distil = 0, 1, True, {}, 0.0
    folder = args.out / "start"
    folder.mkdir(parents=True, exist_ok=True)
    model = load_base(args)
    torch.save(model.state_dict(), folder / "base.pt")
    macs, parameters = cost(model)
    entry = {"name": "base", "setting": "base", "asked": 1.0, "macs": macs, "speedup": 1.0, "parameters": parameters}
    run_training([{**entry, "shortcuts": shortcuts_of(model)}], folder, args, lambda text: print(text, flush=True))
    trained = torch.load(args.out / f"trained.seed{args.seed}.pt", weights_only=True)["base"]
    torch.save(trained, args.out / "base.pt")


def table(args: argparse.Namespace) -> None:
    found = [json.loads(p.read_text()) for p in sorted(args.folder.glob("results*.json"))]
    if not found:
        raise SystemExit(f"no results in {args.folder}")
    print("; ".join(f"{k} {v}" for k, v in found[0]["facts"].items()))
    for other in found[1:]:
        if other["facts"]["epochs"] != found[0]["facts"]["epochs"]:
            print(f"NOT the same budget: {other['facts']['epochs']} epochs for {[r['name'] for r in other['rows']]}")
    print("\n| setting | asked | MACs | parameters | right after | fine-tuned |\n|---|---|---|---|---|---|")
    runs: dict[str, list[dict[str, Any]]] = {}
    for f in found:
        for r in f["rows"]:
            runs.setdefault(r["name"], []).append(r)
    for same in sorted(runs.values(), key=lambda rs: (rs[0]["asked"], -statistics.mean(r["after"] for r in rs))):
        r, after = same[0], [100 * r["after"] for r in same]
        spread = f" ({min(after):.2f} to {max(after):.2f}, {len(after)} seeds)" if len(after) > 1 else ""
        before = "not measured" if r["before"] is None else f"{100 * r['before']:.2f} %"
        print(
            f"| {r['setting']} | {r['asked']:g}x | {r['macs'] / 1e6:.1f} M ({r['speedup']:.2f}x) | {r['parameters']:,} "
            f"| {before} | {statistics.mean(after):.2f} %{spread} |"
        )
    failed = args.folder / "failed.json"
    for r in json.loads(failed.read_text()) if failed.is_file() else []:
        print(f"| {r['setting']} | {r['asked']:g}x | failed: {r['failed']} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", type=Path, help="folder of the images and the base (default: FOLDLINE_DATA)")
    shared.add_argument("--cache", type=Path, help="folder for the decoded images")
    shared.add_argument("--base", type=Path, help="state dict of the base (default: resnet56-jpeg.pt)")
    shared.add_argument("--seed", type=int, default=0)
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    training.add_argument("--epochs", type=float, default=40, help="below 1: that share of one epoch's steps")
    training.add_argument("--minutes", type=float, default=60, help="fewer epochs are planned where these would not do")
    training.add_argument("--batch", type=int, default=128)
    training.add_argument("--rate", type=float, default=0.05)
    training.add_argument("--decay", type=float, default=5e-4)
    training.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    training.add_argument("--distil", type=float, default=0.0, help="weight of the base's soft answers in the loss")
    training.add_argument("--half", action="store_true", help="bfloat16 autocast")
    training.add_argument("--nhwc", action="store_true", help="channels-last memory layout")
    training.add_argument("--auto", action="store_true", help="time layouts and precisions first, take the fastest")
    training.add_argument(
        "--no-before", action="store_true", help="no accuracies right after the cut: minutes on a CPU"
    )
    training.add_argument("--save", action="store_true", help="write the trained weights as well")
    training.add_argument("--train-images", type=int, default=50000)
    training.add_argument("--test-images", type=int, default=10000)
    commands.add_parser("base", parents=[shared, training]).set_defaults(run=base_command)
    p = commands.add_parser("prune", parents=[shared])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--settings", nargs="+", default=SETTINGS)
    p.add_argument("--speedups", nargs="+", type=float, default=[2.1, 2.55])
    p.add_argument("--samples", type=int, default=640, help="training images for criteria that look at data")
    p.add_argument("--evaluate", type=int, default=0, help="test images on which each is judged right after the cut")
    p.set_defaults(run=prune)
    p = commands.add_parser("train", parents=[shared, training])
    p.add_argument("folder", type=Path, help="what prune wrote")
    p.add_argument("--only", nargs="+", help="names of models (default: all)")
    p.add_argument("--jobs", type=int, default=1, help="processes that share the models (1: all in lockstep)")
    p.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    p.add_argument("--rates", type=Path, help="peak rates by setting, as search writes them (default: --rate for all)")
    p.set_defaults(run=train_command)
    p = commands.add_parser("search", parents=[shared, training])
    p.add_argument("folder", type=Path, help="what prune wrote")
    p.add_argument("--only", nargs="+", required=True, help="names of models: one of every setting")
    p.add_argument("--steps", type=int, default=60, help="batches that each rate is tried for")
    p.set_defaults(run=search)
    p = commands.add_parser("table")
    p.add_argument("folder", type=Path)
    p.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
