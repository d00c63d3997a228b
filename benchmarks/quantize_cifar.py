"""ResNet-20/56 on CIFAR-10 quantized to W8A8, W4A8 and W4A4: accuracy, output SQNR and time, beside nncf and torchao.

    python benchmarks/quantize_cifar.py --depth 20 --settings W8A8 W4A8 W4A4 --images 10000

Needs the data folder (FOLDLINE_DATA, or ../shared/data beside the checkout); starts from the networks fine-tuned on the
JPEG images. Everybody calibrates on the same training images and is judged on the same test images, in simulation
(fake quantization in torch), on the inputs and weights of convolutions and linear layers; additions stay in float
where the tool lets one choose. At 4 bits the first and the last layer stay at 8 bits, for nncf in float, since it has
one number of bits for all layers. Tools that are not importable are left out with a note (run the script with an
interpreter that has them).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foldline as fl
import numpy as np
import torch
from foldline import passes as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.data import cifar10, trained_resnet

BATCH = 100
LOT = 64
"""Images per batch of calibration."""
SETTINGS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W3A8": (3, 8), "W2A8": (2, 8)}
Model = Callable[[torch.Tensor], torch.Tensor]


def judge(model: Model, reference: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Accuracy in percent, and 10 log10(sum f^2 / sum (f - q)^2) of the outputs in decibel."""
    with torch.no_grad():
        outputs = torch.cat([model(x) for x in images.split(BATCH)]).double()
    noise = float((outputs - reference).square().sum())
    right = 100 * float((outputs.argmax(1) == labels).double().mean())
    return right, 10 * float(np.log10(float(reference.square().sum()) / max(noise, 1e-30)))


def ends(bits: tuple[int, int]) -> dict[str, Any]:
    """Formats by name that leave the first and the last layer at 8 bits."""
    if bits == (8, 8):
        return {}
    return {name: {"weight": 8, "activation": 8} for name in ("conv1", "linear")}


def our_recipes(bits: tuple[int, int], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of the recipe and the options of Quantize."""
    plain = {"weight_bits": bits[0], "activation_bits": bits[1], "formats": ends(bits)}
    yield "default: nearest, min-max (RTN)" if bits == (8, 8) else "nearest, min-max (RTN)", plain
    if bits == (8, 8):
        yield "GPTQ", {**plain, "ranges": "mse", "rounding": "gptq"}
        return
    tuned = {**plain, "ranges": "mse" if bits[1] < 8 else "minmax"}
    yield "GPTQ + descent", {**tuned, "rounding": "gptq"}
    yield "AdaRound by layer", {**tuned, "rounding": "adaround"}
    options = {"steps": args.steps}
    yield "block reconstruction", {**tuned, "rounding": "reconstruct", "rounding_options": options}


def ours(depth: int, bits: tuple[int, int], data: list[torch.Tensor], args: argparse.Namespace) -> Iterator[Any]:
    """(recipe, seconds, model) of every recipe of ours."""
    for recipe, options in our_recipes(bits, args):
        if args.recipes and not any(word in recipe for word in args.recipes):
            continue
        model = trained_resnet(depth)
        began = time.perf_counter()
        passes = [P.Fold(), P.Quantize(target=args.target, calibration=data, **options)]
        result = fl.Pipeline(passes).run(model, data[0], verify=False)
        yield recipe, time.perf_counter() - began, result.model


def nncf_models(depth: int, bits: tuple[int, int], data: list[torch.Tensor], args: argparse.Namespace) -> Iterator[Any]:
    """nncf's post-training quantization (its full bias correction does not take torch models)."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPULoader
    from nncf.torch.quantization.reference import ReferenceQuantizedFunctions

    nncf.set_log_level(40)
    if not args.nncf_native:  # nncf's own fallback in torch: the same numbers, and nothing has to be compiled
        QuantizedFunctionsCPULoader.load = classmethod(lambda cls: ReferenceQuantizedFunctions)
    narrow = bits != (8, 8)
    advanced = None
    ignored = None
    if narrow:
        advanced = AdvancedQuantizationParameters(
            weights_quantization_params=QuantizationParameters(num_bits=bits[0]),
            activations_quantization_params=QuantizationParameters(num_bits=bits[1]),
        )
        ignored = nncf.IgnoredScope(
            patterns=["^conv1/.*", "^linear/.*", ".*avg_pool2d.*"], types=["__add__", "add"], validate=False
        )
    model = trained_resnet(depth)
    began = time.perf_counter()
    found = nncf.quantize(
        model,
        nncf.Dataset(data),
        subset_size=len(data),
        ignored_scope=ignored,
        advanced_parameters=advanced,
        # the one device for which nncf allows 4 bits
        target_device=nncf.TargetDevice.NPU if narrow else nncf.TargetDevice.ANY,
    )
    yield "fast bias correction", time.perf_counter() - began, found


def torchao_models(
    depth: int, bits: tuple[int, int], data: list[torch.Tensor], args: argparse.Namespace
) -> Iterator[Any]:
    """torchao's PT2E: X86InductorQuantizer's defaults at 8 bits, the same places with narrower integers below."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model = trained_resnet(depth)
    began = time.perf_counter()
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=4096)}}
    exported = torch.export.export(model, (data[0],), dynamic_shapes=dynamic).module()
    prepared = prepare_pt2e(exported, _quantizer(bits))
    with torch.no_grad():
        for x in data:
            prepared(x)
    yield "PT2E", time.perf_counter() - began, convert_pt2e(prepared)


def _quantizer(bits: tuple[int, int]) -> Any:
    from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    if bits == (8, 8):
        return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())

    def specs(weight: int, activation: int) -> tuple[Any, Any]:
        w = QuantizationSpec(
            dtype=torch.int8, quant_min=-(2 ** (weight - 1)), quant_max=2 ** (weight - 1) - 1,
            qscheme=torch.per_channel_symmetric, ch_axis=0,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
        )  # fmt: skip
        x = QuantizationSpec(
            dtype=torch.uint8, quant_min=0, quant_max=2**activation - 1, qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=2**-12),
        )  # fmt: skip
        return x, w

    class Narrow(Quantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            wanted = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
            nodes = [n for n in model.graph.nodes if n.target in wanted]
            for node in nodes:
                x, w = specs(8, 8) if node in (nodes[0], nodes[-1]) else specs(*bits)
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={node.args[0]: x, node.args[1]: w}, _annotated=True
                )
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    return Narrow()


def mixed(depth: int, data: list[torch.Tensor], args: argparse.Namespace, score: Callable[[Any], Any]) -> None:
    """Weights of 2 to 8 bits per layer against uniform ones at the same bytes; activations of 8 bits, GPTQ for both."""
    print(
        f"\nResNet-{depth}, weights at equal bytes (A8, GPTQ, all layers)\n\n"
        "| bits | accuracy | SQNR dB |\n|---|---|---|"
    )
    for bits in args.mixed:
        choices: dict[str, dict[str, Any]] = {
            f"uniform {bits}": {"weight_bits": bits},
            f"mixed, {bits} on average": {"bits": {"budget": float(bits), "choices": (2, 3, 4, 5, 6, 8)}},
        }
        for name, options in choices.items():
            passes = [P.Fold(), P.Quantize(target=args.target, calibration=data, rounding="gptq", **options)]
            model = fl.Pipeline(passes).run(trained_resnet(depth), data[0], verify=False).model
            accuracy, sqnr = score(model)
            print(f"| {name} | {accuracy:.2f} | {sqnr:.2f} |", flush=True)


def vision_transformer(args: argparse.Namespace) -> None:
    """SQNR of W8A8 on a ViT-tiny with random weights (no trained ones are at hand), CIFAR images enlarged to 224."""
    from support.timm_models import timm

    torch.manual_seed(0)
    model = timm().create_model("vit_tiny_patch16_224", pretrained=False).eval()
    images = torch.nn.functional.interpolate(cifar10("test", 64)[0], size=(224, 224), mode="bilinear")
    data = list(images[:32].split(8))
    with torch.no_grad():
        reference = torch.cat([model(x) for x in images[32:].split(8)]).double()
    print("\nViT-tiny/16 at 224, random weights, W8A8\n\n| target | recipe | SQNR dB | seconds |\n|---|---|---|---|")
    for target in (args.target, "onnxruntime-cpu"):
        for recipe, options in (("default", {}), ("GPTQ", {"rounding": "gptq"})):
            began = time.perf_counter()
            passes = [P.Fold(), P.Quantize(target=target, calibration=data, **options)]
            quantized = fl.Pipeline(passes).run(model, data[0], verify=False).model
            seconds = time.perf_counter() - began
            with torch.no_grad():
                found = torch.cat([quantized(x) for x in images[32:].split(8)]).double()
            noise = float((found - reference).square().sum())
            sqnr = 10 * float(np.log10(float(reference.square().sum()) / max(noise, 1e-30)))
            print(f"| {target} | {recipe} | {sqnr:.2f} | {seconds:.1f} |", flush=True)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


TOOLS: dict[str, Callable[..., Iterator[Any]]] = {"foldline": ours, "nncf": nncf_models, "torchao": torchao_models}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[20], choices=(20, 56))
    parser.add_argument("--settings", nargs="+", default=["W8A8", "W4A8", "W4A4"], choices=list(SETTINGS))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--recipes", nargs="*", default=[], help="only recipes of foldline whose name contains a word")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--calibration", type=int, default=256, help="training images to calibrate on")
    parser.add_argument("--steps", type=int, default=200, help="steps of block reconstruction per block")
    parser.add_argument("--target", default="inductor-cpu", help="whose placement foldline uses")
    parser.add_argument("--mixed", type=int, nargs="*", default=[], help="average bits to compare with uniform ones")
    parser.add_argument("--vit", action="store_true", help="also a ViT-tiny with random weights")
    parser.add_argument("--nncf-native", action="store_true", help="let nncf compile its own kernels")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    images, labels = cifar10("test", args.images)
    data = list(cifar10("train", args.calibration)[0].split(LOT))
    data = [x for x in data if len(x) == LOT]  # one shape for all tools
    print(
        f"torch {torch.__version__}, nncf {version('nncf')}, torchao {version('torchao')}, {args.threads} threads; "
        f"{len(data) * LOT} training images to calibrate, {len(images)} test images; places of {args.target}; "
        "first and last layer at 8 bits (nncf below 8 bits: float)\n"
    )
    for depth in args.depth:
        with torch.no_grad():
            reference = torch.cat([trained_resnet(depth)(x) for x in images.split(BATCH)]).double()
        base = 100 * float((reference.argmax(1) == labels).double().mean())
        print(f"ResNet-{depth}, float {base:.2f} %\n")
        print("| setting | tool | recipe | accuracy | SQNR dB | seconds |\n|---|---|---|---|---|---|", flush=True)
        for setting in args.settings:
            for tool in args.tools:
                try:
                    for recipe, seconds, model in TOOLS[tool](depth, SETTINGS[setting], data, args):
                        accuracy, sqnr = judge(model, reference, images, labels)
                        print(
                            f"| {setting} | {tool} | {recipe} | {accuracy:.2f} | {sqnr:.2f} | {seconds:.1f} |",
                            flush=True,
                        )
                except ImportError as exc:
                    print(f"| {setting} | {tool} | left out: {exc} | | | |", flush=True)
        if args.mixed:
            mixed(depth, data, args, lambda model: judge(model, reference, images, labels))  # noqa: B023
        print()
    if args.vit:
        vision_transformer(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
