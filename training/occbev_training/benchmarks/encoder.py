"""Image encoders in every runtime: six images through `occbev-tiny`'s encoder and through ResNet-50.

With a GPU, torch and ONNX Runtime (if it is its GPU build) run there, OpenVINO stays on the CPU. int8 graphs are quantised from random images: their speed is meant here, not their accuracy.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from occbev.benchmarks import Options, Report, run_interleaved
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.onnx_backend import PROVIDERS
from occbev.inference.openvino_backend import shared_core
from occbev_training.benchmarks.measure import bench_device, speedup, waiting
from occbev_training.models.encoders.image_encoder import ImageEncoder, fold_block
from occbev_training.models.encoders.image_necks import PyramidNeck, ResNetImageEncoder
from occbev_training.models.encoders.resnet import ResNet

CAMERA_COUNT = 6
CALIBRATION_SETS = 2

Method = Callable[[], object]


def encoders() -> dict[str, tuple[nn.Module, tuple[int, int]]]:
    """Return each encoder with random weights and the (height, width) of its images."""
    backbone = ResNet(50, (3, 4))
    resnet = ResNetImageEncoder(backbone, PyramidNeck(backbone.widths, 256))
    tiny = LiftSplatModel()
    return {
        "occbev-tiny": (ImageEncoder(tiny.encoder).eval(), (tiny.image.height, tiny.image.width)),
        "resnet50": (resnet.eval(), (256, 704)),
    }


def methods_of(
    encoder: nn.Module,
    images: Tensor,
    folder: Path,
    threads: int,
    compiled: bool = True,
    device: str = "cpu",
) -> tuple[dict[str, Method], dict[str, float], str]:
    """Return every runtime's call on the same images, its mean difference from eager, relative to the
    mean value, and the provider that ONNX Runtime took.

    folder: where graphs are written. compiled: torch.compile too, which takes minutes to get ready.
    device: where torch runs.
    """
    floats, integers = write_graphs(encoder, images, folder)
    encoder, pictures = encoder.to(device), images.to(device)
    folded = fold_norms(encoder).to(memory_format=torch.channels_last)
    last = pictures.contiguous(memory_format=torch.channels_last)
    methods: dict[str, Method] = {
        "eager": lambda: encoder(pictures),
        "folded_channels_last": lambda: folded(last),
    }
    if compiled:
        graph = torch.compile(folded)
        methods["torch_compile"] = lambda: graph(last)
    methods = waiting(methods, device)
    array = images.numpy()
    sessions = {n: _session(p, threads) for n, p in (("f32", floats), ("int8", integers))}
    methods["onnxruntime_f32"] = lambda: sessions["f32"].run(None, {"images": array})[0]
    methods["openvino_f32"] = _openvino(floats, array, threads)
    methods["onnxruntime_int8"] = lambda: sessions["int8"].run(None, {"images": array})[0]
    methods["openvino_int8"] = _openvino(integers, array, threads)
    return methods, _differences(methods), sessions["f32"].get_providers()[0]


def fold_norms(encoder: nn.Module) -> nn.Module:
    """Return a copy whose batch norms are part of the convolutions before them."""
    folded = copy.deepcopy(encoder)
    for module in list(folded.modules()):
        fold_block(module)
    return folded


def write_graphs(encoder: nn.Module, images: Tensor, folder: Path) -> tuple[Path, Path]:
    """Write an encoder as ONNX in fp32 and in int8 with quantise-dequantise pairs."""
    floats, prepared, integers = (folder / f"{n}.onnx" for n in ("floats", "prepared", "integers"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            (images,),
            str(floats),
            input_names=["images"],
            opset_version=18,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    quant_pre_process(str(floats), str(prepared))
    quantize_static(
        str(prepared),
        str(integers),
        _RandomImages(tuple(images.shape)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return floats, integers


class _RandomImages(CalibrationDataReader):
    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(1)
        self._sets: Iterator[NDArray[np.float32]] = iter(
            [rng.standard_normal(shape).astype(np.float32) for _ in range(CALIBRATION_SETS)]
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        images = next(self._sets, None)
        return None if images is None else {"images": images}


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    wanted = (PROVIDERS["cuda"], PROVIDERS["cpu"])
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    return onnxruntime.InferenceSession(str(path), options, providers=providers)


def _openvino(path: Path, images: NDArray[np.float32], threads: int) -> Method:
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = shared_core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer([images])[compiled.output(0)]


def _differences(methods: dict[str, Method]) -> dict[str, float]:
    with torch.no_grad():
        results = {name: _as_array(method()) for name, method in methods.items()}
    want = results.pop("eager")
    return {name: float(np.abs(got - want).mean() / np.abs(want).mean()) for name, got in results.items()}


def _as_array(result: Any) -> NDArray[np.float32]:
    return np.asarray(result.cpu() if isinstance(result, Tensor) else result)


def run(options: Options) -> Report:
    """Measure every encoder in every runtime; torch.compile takes minutes to get ready."""
    threads = options.threads or 1
    torch.set_num_threads(threads)
    device = bench_device()
    values: dict[str, Any] = {
        "device": device,
        "rounds": options.rounds,
        "threads": threads,
        "cameras": CAMERA_COUNT,
    }
    ratios: dict[str, float] = {}
    for name, (encoder, size) in encoders().items():
        images = torch.randn(CAMERA_COUNT, 3, *size)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            methods, differences, values["onnxruntime_provider"] = methods_of(
                encoder, images, Path(folder), threads, device=device
            )
            timings = run_interleaved(methods, options.rounds)
        for method, timing in timings.items():
            values[f"{name}_{method}"] = dict(vars(timing))
            if method != "eager":
                values[f"{name}_{method}"] |= {"relative_difference": differences[method]}
                ratios[f"{name}_{method}_vs_eager"] = speedup(timings["eager"], timing, device)
    return Report("encoder", values, ratios)
