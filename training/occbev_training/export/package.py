"""A trained network of any family as a model package: weights and graphs, each checked against torch.

Geometry and state stay outside the graphs: they take the tables of `occbev.inference.tables` and what
`occbev.inference.memory` carries from frame to frame as inputs.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from torch import nn

from occbev.config import MAX_CAMERAS, ImageConfig, ModelConfig, to_record
from occbev.files import YamlError, read_yaml
from occbev.inference.backend import FACTORS, PER_CAMERA
from occbev.inference.example_inputs import example_inputs as all_example_inputs
from occbev.inference.model_package import CONFIG_NAME, ModelPackage, write_package
from occbev.inference.openvino_backend import INT8_GRAPH, shared_core
from occbev.rig import CameraRig
from occbev_training.data.samples import Samples
from occbev_training.export.half import FP16_GRAPH, write_fp16
from occbev_training.export.quantise import check_frames, described, quantise, quantise_on
from occbev_training.models.checkpoints import save_weights
from occbev_training.models.encoders.deformable_conv import plain_operators
from occbev_training.models.families import make_graph, training_family
from occbev_training.models.graphs import Graph, GraphError
from occbev_training.models.heads.occupancy_head import SEMANTICS, SUBPIXEL, interleave
from occbev_training.models.heads.record import heads_of, learns_from

logger = logging.getLogger(__name__)

OPSET = 18
"""ONNX operator set; every runtime's parser of the last years knows it."""

DOUBT = 2.0
"""A graph may differ from double precision this many times as much as torch in single precision does."""

ROUNDING = 1e-5
"""Further allowed difference, relative to an output's largest value: sums are made in another order."""

IR_TOLERANCE = 1e-1
"""Largest such difference of OpenVINO's graph, whose weights are rounded to fp16: box maps of random images are wild."""

FACTOR_TOLERANCE = 1e-4
"""Largest difference between a probability that factors give and that of the same graph's logits."""

FORBIDDEN_OPERATORS = frozenset({"Loop", "Scan", "If", "NonZero", "Unique", "ScatterND", "ScatterElements", "CumSum"})
"""Operators that some runtime lacks or computes badly; a graph that holds one, or a Sequence*, is refused."""

WEIGHTS, CARD = "weights.safetensors", "README.md"
"""Files of every package beside its graphs and its configuration."""

PARTIAL = ".partial-"
"""What the name of the folder begins with in which a package is written."""

GRAPH_SUFFIXES = (".onnx", ".xml", ".bin")
"""Files of a package that hold its graphs."""

IN_FP16, FP16_TOLERANCE = "the fp16 graph in ONNX Runtime", 1e-1
"""Allowed difference of the graph for GPUs, with images of noise and any weights."""

IN_FP32, ROUNDED = "OpenVINO in fp32", "OpenVINO with fp16 weights"

Arrays = dict[str, NDArray[Any]]
Differences = dict[str, float]


UNTRAINED = "Untrained: random weights, to measure latency. Its results have no meaning."
"""Data of the card of an untrained network."""

NOISE_FRAMES = 2
"""Random frames on which the graph of an untrained network is quantised."""


class ExportError(RuntimeError):
    """A graph whose outputs differ from the network's, or that uses a forbidden operator."""


@dataclass(frozen=True)
class Parity:
    """Largest difference of each output from double precision, relative to its largest value, by runtime.

    torch: that of torch in single precision, which says how far a sound graph may be.

    The OpenVINO graph is written for our own Lift-Splat networks; of others OpenVINO reads the ONNX graph.
    """

    onnxruntime: Mapping[str, float]
    openvino: Mapping[str, float]
    torch: Mapping[str, float]
    openvino_before_rounding: Mapping[str, float] | None = None
    onnxruntime_fp16: Mapping[str, float] | None = None

    def as_record(self) -> dict[str, dict[str, float]]:
        """The measured differences with two digits."""
        return {
            runtime: {name: float(f"{value:.2g}") for name, value in values.items()}
            for runtime, values in vars(self).items()
            if values is not None
        }


def export_package(
    network: nn.Module,
    model: ModelConfig,
    folder: Path,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    extra_files: Sequence[Path] = (),
    cameras: Sequence[int] | None = None,
    calibration: Samples | None = None,
    untrained: bool = False,
    gpu: bool = False,
) -> ModelPackage:
    """Write a model package and prove its graphs against the network.

    network: of any stage, with the heads that were trained; it is put in eval mode. extra_files: copied in (priors.npz).
    cameras: sizes of the rigs that the graphs are checked on.
    calibration: prepared frames on which the OpenVINO graph is quantised; it takes the place of the rounded one.
    untrained: of random weights; the graph is quantised on noise, so that its latency can be measured.
    gpu: also write the graph in fp16 that TensorRT reads, see `occbev_training.export.half`.
    The package is written beside the folder and moved into it when it is complete: a refused export leaves what was
    there. Raises: ExportError if a weight is not finite, a graph is further from double precision than it may be, or
    the folder holds what is of no package; QuantisationError if it cannot be quantised.
    """
    require_own_folder(folder, [path.name for path in extra_files])
    if calibration is not None:
        if not has_ir(model) or SEMANTICS not in heads_of(network):
            raise ExportError(f"{model.name}: only our own Lift-Splat networks with a semantic head are quantised")
        check_frames(model, calibration)
    network.eval().float().cpu()
    require_finite(network, model.name)
    if untrained:
        provenance = {**provenance, "data": UNTRAINED}
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(f"{PARTIAL}*"):  # of an export that was killed
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as partial:
        _write(network, model, Path(partial), provenance, metrics, extra_files, cameras, calibration, untrained, gpu)
        sealed = _sealed(folder)
        for stale in [path for path in folder.iterdir() if path.suffix in GRAPH_SUFFIXES or path.name in sealed]:
            stale.unlink()  # of an earlier export
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # it comes last: without it a folder is no package
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            os.replace(path, folder / path.name)
    return ModelPackage.load(folder)


def require_own_folder(folder: Path, more: Collection[str] = ()) -> None:
    """Raise ExportError if a folder holds what is of no package, such as a training run: its files would be replaced.

    more: names of further files of the package. What a killed export left may be there.
    """
    sealed = _sealed(folder)
    own = {WEIGHTS, CARD, *more, *sealed, *([CONFIG_NAME] if sealed else [])}
    strangers = [
        path.name
        for path in sorted(folder.iterdir() if folder.is_dir() else [])
        if path.name not in own and path.suffix not in GRAPH_SUFFIXES and not path.name.startswith(PARTIAL)
    ]
    if strangers:
        raise ExportError(f"{folder}: holds {strangers[:5]}, which are of no package; name another folder")


def _sealed(folder: Path) -> set[str]:
    """Return the names of the files that the package in a folder lists, none if it is no package."""
    try:
        record = read_yaml(folder / CONFIG_NAME)
    except (OSError, YamlError):
        return set()
    files = record.get("files") if isinstance(record, dict) else None
    return set(files) if isinstance(files, dict) else set()


def require_finite(network: nn.Module, name: str) -> None:
    """Raise ExportError naming the first weight that holds values that are not finite."""
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ExportError(f"{name}: weight {key} holds values that are not finite")


def _write(
    network: nn.Module,
    model: ModelConfig,
    folder: Path,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    extra_files: Sequence[Path],
    cameras: Sequence[int] | None,
    calibration: Samples | None,
    untrained: bool,
    gpu: bool,
) -> ModelPackage:
    graph = _graph(network, "onnx")
    save_weights(folder / WEIGHTS, network.state_dict(), {"model": to_record(model)})
    for path in extra_files:
        shutil.copyfile(path, folder / path.name)
    operators = write_onnx(graph, model, folder / "model.onnx")
    if gpu:
        write_fp16(folder / "model.onnx", folder / FP16_GRAPH)
    unrounded = None
    if has_ir(model):
        unrounded = write_ir(network, model, folder / "model.xml", compress=True)
    parity = check_graphs(network, model, folder, unrounded, cameras)
    metrics = {**metrics, "export_difference": parity.as_record()}
    if unrounded is not None and calibration is not None:
        metrics["int8_agreement"] = write_int8(unrounded, model, folder, calibration)
        provenance = {**provenance, "int8": described(calibration)}
    if unrounded is not None and untrained:
        factored = _graph(network, "factored")
        noise = [example_inputs(model, factored, min(6, model.max_cameras), seed) for seed in range(NOISE_FRAMES)]
        save_int8(quantise_on(unrounded, noise), folder)
        provenance = {**provenance, "int8": "ranges from noise: for latency alone"}
    provenance = {
        **provenance,
        "exported_with": _versions(),
        "operators": " ".join(f"{name}:{count}" for name, count in sorted(operators.items())),
    }
    (folder / CARD).write_text(model_card(network, model, provenance, metrics))
    return write_package(folder, model, provenance, metrics)


def has_ir(model: ModelConfig) -> bool:
    """Whether networks of the family get an OpenVINO graph as well, which can be quantised."""
    return "factored" in training_family(model).graphs


def write_onnx(graph: Graph, model: ModelConfig, path: Path) -> Mapping[str, int]:
    """Write a graph as ONNX with a free number of cameras and return how often it uses each operator.

    Raises: ExportError naming operators that a graph must not hold.
    """
    inputs = example_inputs(model, graph, min(6, model.max_cameras), seed=1)
    count = torch.export.Dim("cameras", min=1, max=model.max_cameras)
    shapes = {n: {PER_CAMERA[n]: count} if n in PER_CAMERA else None for n in inputs}
    with warnings.catch_warnings(), torch.no_grad(), plain_operators(graph):
        warnings.simplefilter("ignore")  # the exporter's notes on its own deprecations
        program = torch.onnx.export(
            graph,
            kwargs={name: torch.from_numpy(array) for name, array in inputs.items()},
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=list(graph.outputs),
            external_data=False,
            verbose=False,
            optimize=True,
        )
    assert program is not None
    onnx.save(without_traces(program.model_proto), path)
    return require_plain_operators(path)


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take out what the exporter notes of each operator: calls in source files, with the paths of this machine."""
    graph = model.graph
    for entry in (
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")
    return model


def require_plain_operators(path: Path) -> Mapping[str, int]:
    """Check an ONNX file and return how often it uses each operator.

    Raises: ExportError naming operators that a graph must not hold.
    """
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    used = Counter(node.op_type for node in graph.graph.node)
    found = sorted(n for n in used if n in FORBIDDEN_OPERATORS or n.startswith("Sequence"))
    if found or len(graph.functions) or {d.domain for d in graph.opset_import} - {"", "ai.onnx"}:
        raise ExportError(f"{path}: holds {found or 'functions or custom operators'}")
    return used


def write_ir(network: nn.Module, model: ModelConfig, path: Path, compress: bool) -> openvino.Model:
    """Write the factored form as OpenVINO IR with a free number of cameras.

    compress: store weights as fp16 (computing stays in the runtime's precision).
    Returns: the graph with its weights still in fp32.
    """
    factored = _graph(network, "factored")
    inputs = example_inputs(model, factored, 6, seed=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(factored, example_input={n: torch.from_numpy(a) for n, a in inputs.items()})
    shapes: dict[str, list[int]] = {name: list(value.shape) for name, value in inputs.items()}
    for name, axis in PER_CAMERA.items():
        if name in shapes:
            shapes[name][axis] = -1
    graph.reshape(shapes)
    for port, name in zip(graph.outputs, factored.outputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(graph, path, compress_to_fp16=compress)
    return graph


def write_int8(graph: openvino.Model, model: ModelConfig, folder: Path, calibration: Samples) -> float:
    """Write the quantised graph in place of the rounded one; return how well it agrees with the given one.

    One graph for OpenVINO in a package: where bytes are slow, or exactness is asked for, it reads the ONNX graph.
    """
    quantised, agreement = quantise(graph, model, calibration)
    save_int8(quantised, folder)
    return round(agreement, 3)


def save_int8(quantised: openvino.Model, folder: Path) -> None:
    """Write a quantised graph in place of the rounded one."""
    openvino.save_model(quantised, folder / INT8_GRAPH, compress_to_fp16=True)
    for suffix in (".xml", ".bin"):
        (folder / "model").with_suffix(suffix).unlink()


def check_graphs(
    network: nn.Module,
    model: ModelConfig,
    folder: Path,
    unrounded: openvino.Model | None = None,
    cameras: Sequence[int] | None = None,
) -> Parity:
    """Run every graph of a package on two frames of rigs of several sizes, beside torch.

    unrounded: the OpenVINO graph before its weights were stored as fp16, run on the first rig.
    Raises: ExportError naming the output that differs.
    """
    sizes = cameras or [n for n in (6, 5, 7) if n <= model.max_cameras]
    plain, native = _graph(network, "onnx"), _graph(network, "native")
    judge = _Judge(_graph(copy.deepcopy(network).double(), "native"), native)
    for count, seed in itertools.product(sizes, (0, 1) if model.past_frames else (0,)):
        inputs, bags = (example_inputs(model, g, count, seed) for g in (plain, native))
        judge.take(bags)
        answers = run_onnx(folder / "model.onnx", inputs)
        check_factors(answers)
        judge.hold("ONNX Runtime", answers)
        if (folder / FP16_GRAPH).exists():
            judge.hold(IN_FP16, run_onnx(folder / FP16_GRAPH, inputs), FP16_TOLERANCE)
        if unrounded is None:  # OpenVINO reads the ONNX graph then
            judge.hold(IN_FP32, run_openvino(shared_core().read_model(folder / "model.onnx"), inputs))
            continue
        got = run_openvino(shared_core().read_model(folder / "model.xml"), bags)
        check_factors(got)
        judge.hold(ROUNDED, got, IR_TOLERANCE)
        if count == sizes[0]:
            judge.hold(IN_FP32, run_openvino(unrounded.clone(), bags))
    worst, half = judge.worst, judge.worst.get(IN_FP16)
    if unrounded is None:
        return Parity(worst["ONNX Runtime"], worst[IN_FP32], worst["torch"], None, half)
    return Parity(worst["ONNX Runtime"], worst[ROUNDED], worst["torch"], worst[IN_FP32], half)


class _Judge:
    """Compares outputs of runtimes with double precision. worst: runtime -> output -> largest difference."""

    def __init__(self, exact: Graph, single: Graph) -> None:
        self._exact, self._single = exact, single
        self.worst: dict[str, Differences] = {}

    def take(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Answer the next inputs; raises ExportError if the network's own answer is not finite."""
        wide = {n: array.astype(np.float64) if array.dtype == np.float32 else array for n, array in inputs.items()}
        self._want = run_torch(self._exact, wide)
        runs = [run_torch(self._single, one) for one in (inputs, _nudged(inputs))]
        found = [relative_differences(self._want, run, "torch") for run in runs]
        self._doubt = {name: max(one[name] for one in found) for name in self._want}
        self._note("torch", self._doubt)

    def hold(self, runtime: str, got: Mapping[str, NDArray[Any]], tolerance: float | None = None) -> None:
        """Compare a runtime's answer; raises ExportError naming the output.

        tolerance: by default `DOUBT` times the difference of torch in single precision, and `ROUNDING`.
        """
        differences = relative_differences(self._want, got, runtime)
        self._note(runtime, differences)
        for name, difference in differences.items():
            allowed = DOUBT * self._doubt[name] + ROUNDING if tolerance is None else tolerance
            if difference > allowed:
                raise ExportError(
                    f"{runtime}: {name} differs from double precision by {difference:.1e} of its largest value,"
                    f" {allowed:.1e} is allowed"
                )

    def _note(self, runtime: str, differences: Differences) -> None:
        worst = self.worst.setdefault(runtime, {})
        for name, difference in differences.items():
            worst[name] = max(worst.get(name, 0.0), difference)
            logger.info("%s: %s differs by %.1e of its largest value", runtime, name, difference)


def _nudged(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Change images in their last digit: two runs show better than one how rounding affects a network."""
    images = inputs["images"]
    towards = np.random.default_rng(0).choice(np.array([-np.inf, np.inf], images.dtype), images.shape)
    return {**inputs, "images": np.nextafter(images, towards)}


def check_factors(outputs: Mapping[str, NDArray[Any]]) -> None:
    """Compare the factors of a graph with its own logits; of equally likely classes either may be named.

    Raises: ExportError if what they say is likeliest is not, or has other probabilities.
    """
    if not set(FACTORS) <= set(outputs):
        return
    share = torch.from_numpy(outputs["occupancy_logits"]).double().softmax(1)
    occupied, class_id, class_probability = (torch.from_numpy(outputs[name]) for name in FACTORS)
    occupied = interleave(occupied.flatten(1, 2))
    class_id, class_probability = (
        part[:, None].repeat_interleave(SUBPIXEL, 3).repeat_interleave(SUBPIXEL, 4)
        for part in (class_id, class_probability)
    )
    claimed = occupied * class_probability
    worst = max(
        float((1 - share[:, -1:] - occupied).abs().max()),
        float((share[:, :-1].amax(1, keepdim=True) - claimed).abs().max()),
        float((share.gather(1, class_id.long()) - claimed).abs().max()),
    )
    if worst > FACTOR_TOLERANCE:
        raise ExportError(f"the factors differ from the logits by a probability of {worst:.2g}")


def example_inputs(
    model: ModelConfig, graph: Graph, cameras: int, seed: int = 0, rig: CameraRig | None = None
) -> Arrays:
    """Return the inputs that a graph takes of `occbev.inference.example_inputs`."""
    arrays = all_example_inputs(model, graph.form, cameras, seed, rig)
    return {name: arrays[name] for name in graph.inputs}


def run_torch(graph: Graph, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Run a graph in torch; returns its outputs by name."""
    with torch.no_grad():
        outputs = graph(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {n: output.numpy() for n, output in zip(graph.outputs, outputs, strict=True)}


def run_onnx(path: Path, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Run a file in ONNX Runtime on the CPU; inputs that nothing in it reads are left out."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    feed = {name: array for name, array in inputs.items() if name in taken}
    return dict(zip(names, session.run(names, feed), strict=True))


def run_openvino(graph: openvino.Model, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Run an OpenVINO graph on the CPU in fp32."""
    taken = {port.get_any_name() for port in graph.inputs}
    feed = {name: array for name, array in inputs.items() if name in taken}
    graph.reshape({name: list(array.shape) for name, array in feed.items()})
    compiled = shared_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled(feed)
    return {port.get_any_name(): result[port.get_any_name()] for port in graph.outputs}


def relative_differences(
    want: Mapping[str, NDArray[Any]], got: Mapping[str, NDArray[Any]], runtime: str = "the graph"
) -> Differences:
    """Return max |a - b| / max |a| of every output.

    Raises: ExportError where outputs lack or hold values that are not finite.
    """
    absent = sorted(set(want) - set(got))
    if absent:
        raise ExportError(f"{runtime} lacks the outputs {absent}; it has {sorted(got)}")
    for name in want:
        if not (np.isfinite(want[name]).all() and np.isfinite(got[name]).all()):
            raise ExportError(f"{runtime}: {name} holds values that are not finite, for images of ordinary noise")
    return {
        name: float(np.abs(got[name] - expected).max() / max(np.abs(expected).max(), 1e-30))
        for name, expected in want.items()
    }


def _seen_share(image: ImageConfig) -> str:
    """Say which rows of a level camera's images reach the network."""
    if image.fit == "pad":
        return "all"
    wide, tall = (min(1.0, image.height / image.width * aspect) for aspect in (16 / 9, 4 / 3))
    lower = f"the lower {wide:.0%} of a 16:9 image, {tall:.0%} of a 4:3 one"
    return f"{lower}; the rows around the horizon if the lower rows do not contain it"


def model_card(
    network: nn.Module,
    model: ModelConfig,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> str:
    """Return the package's README: what the network is, where it comes from, how good it is."""
    parameters = sum(p.numel() for p in network.parameters())
    image, grid = model.image, model.grid
    has_boxes, has_voxels = (learns_from(network, truth) for truth in ("boxes", "voxels"))
    has_classes = SEMANTICS in heads_of(network)
    outputs = [f"3D boxes of {len(model.detection_classes)} classes"] * has_boxes
    outputs += [f"semantic occupancy of {len(model.occupancy_classes)} classes"] * has_classes
    outputs += ["geometric occupancy (free, occupied, unknown) without classes"] * (has_voxels and not has_classes)
    cameras = "any number of" if model.max_cameras == MAX_CAMERAS else f"up to {model.max_cameras}"
    rows = {
        "parameters": f"{parameters / 1e6:.2f} million",
        "input": f"{cameras} cameras, {image.width}x{image.height} pixels each",
        "image rows used": _seen_share(image),
        **training_family(model).describe(model),
        "BEV": f"{_extent(model.bev.lo, model.bev.hi)}, cells of {model.bev.pitch[0]:.4g} m, frame {model.bev.frame}",
    }
    if has_voxels:
        rows["occupancy"] = f"{_extent(grid.lo, grid.hi)}, voxels of {grid.pitch[0]:.4g} m, frame {grid.frame}"
    return "\n".join(
        [
            f"# {model.name}",
            "",
            f"Camera-BEV perception: {' and '.join(outputs)} from surround cameras.",
            *(["", f"**{UNTRAINED}**"] * (provenance.get("data") == UNTRAINED)),
            *(["", "It predicts no boxes: the detection head was not trained."] * (not has_boxes)),
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in rows.items()),
            "",
            "`config.yaml` holds the configuration of the model and the SHA-256 of every file. ONNX Runtime and TensorRT",
            "read `model.onnx`, on a GPU `model_fp16.onnx` if it is there. torch reads `weights.safetensors`. OpenVINO reads",
            "`model_int8.xml` (int8 convolutions) on CPUs with VNNI or AMX, else `model.xml` (weights stored as fp16), else",
            "the ONNX graph. The graphs take calibration and state as inputs.",
            "",
            "## Training",
            "",
            *_bullets(provenance),
            "",
            "## Scores",
            "",
            *_bullets(metrics),
            "",
        ]
    )


def _graph(network: nn.Module, form: str) -> Graph:
    try:
        return make_graph(network, form)
    except GraphError as error:
        raise ExportError(f"it is not exported: {error}") from error


def _extent(lo: Sequence[float], hi: Sequence[float]) -> str:
    return " x ".join(f"[{a:g}, {b:g}]" for a, b in zip(lo, hi, strict=True)) + " m"


def _bullets(record: Mapping[str, Any], depth: int = 0) -> list[str]:
    lines = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            lines += [f"{'  ' * depth}- {key}:", *_bullets(value, depth + 1)]
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"{'  ' * depth}- {key}: {text}")
    return lines


def _versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__.split("-")[0],
        "opset": str(OPSET),
    }
