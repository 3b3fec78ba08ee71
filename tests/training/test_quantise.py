"""Quantised graphs: which convolutions become bytes, how near the result is, and who gets to run it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("nncf")

from tests.small_network import SMALL  # noqa: E402

from occbev.config import to_record  # noqa: E402
from occbev.inference import openvino_backend  # noqa: E402
from occbev.inference.backend import RunSettings, load_backend  # noqa: E402
from occbev.inference.example_inputs import ring_rig  # noqa: E402
from occbev.inference.families.bevdet import BevDetModel  # noqa: E402
from occbev.inference.model_package import ModelPackage  # noqa: E402
from occbev_training.cli import main  # noqa: E402
from occbev_training.data.cache import CacheInfo, SampleCache  # noqa: E402
from occbev_training.export.package import ExportError, export_package, write_ir  # noqa: E402
from occbev_training.export.quantise import (  # noqa: E402
    QuantisationError,
    _alike,
    _frames,
    agreement,
    check_frames,
    find_float_convolutions,
    module_of,
)
from occbev_training.models.build import build_model  # noqa: E402


class RandomFrames(SampleCache):
    """A cache whose samples are noise seen by the ring rig, drawn anew from the index."""

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        from types import SimpleNamespace

        rig, image = ring_rig(SMALL, 3), SMALL.image
        shape = (3, image.height, image.width, 3)
        return SimpleNamespace(
            images=np.random.default_rng(index).integers(0, 255, shape, np.uint8),
            camera_valid=np.ones(3, bool),
            intrinsic=np.stack([c.intrinsic for c in rig.cameras]),
            cam2ego=np.stack([c.cam2ego for c in rig.cameras]),
        )


def frames(count: int = 40) -> RandomFrames:
    samples = tuple(("noise", f"{i}.npz") for i in range(count))
    return RandomFrames(Path("noise"), CacheInfo(SMALL.image, ("a", "b", "c")), samples)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    torch.manual_seed(0)
    network = build_model(SMALL, "finetune").eval()
    folder = tmp_path_factory.mktemp("int8")
    return export_package(network, SMALL, folder, {"data": "noise"}, {}, (), (3,), frames(), gpu=True)


def test_the_int8_graph_takes_the_place_of_the_rounded_one(package: ModelPackage) -> None:
    assert package.has("model_int8.xml")
    assert package.has("model_int8.bin")
    assert not package.has("model.xml")
    assert not (package.folder / "model.bin").exists()
    assert 0.7 <= package.metrics["int8_agreement"] <= 1
    assert "model_int8.xml" in (package.folder / "README.md").read_text()


def test_the_fp16_graph_for_gpus_is_in_the_package_and_agrees(package: ModelPackage) -> None:
    assert package.has("model_fp16.onnx")
    assert 0 < max(package.metrics["export_difference"]["onnxruntime_fp16"].values()) <= 0.1


def test_convolutions_are_bytes_except_the_kept_ones(package: ModelPackage) -> None:
    graph = openvino_backend.shared_core().read_model(package.path("model_int8.xml"))
    kept, bytes_of = set(find_float_convolutions(graph)), {}
    for op in graph.get_ordered_ops():
        if op.get_type_name() not in ("Convolution", "GroupConvolution"):
            continue
        weights = op.input(1).get_source_output().get_node()
        while weights.get_type_name() != "Constant":
            weights = weights.input(0).get_source_output().get_node()
        kind = weights.get_element_type().get_type_name()
        bytes_of[op.get_friendly_name()] = kind in ("i8", "u8")
        if module_of(op).startswith("bev_encoder.down.0."):
            assert op.get_friendly_name() in kept
    assert 7 <= len(kept) < len(bytes_of) / 2
    assert {name for name, is_bytes in bytes_of.items() if not is_bytes} == kept
    rounded = [op for op in graph.get_ordered_ops() if op.get_type_name() == "FakeQuantize"]
    readers = {r.get_node().get_type_name() for op in rounded for r in op.output(0).get_target_inputs()}
    assert readers <= {"Convolution", "GroupConvolution", "Reshape"}


def test_any_number_of_cameras_runs_and_is_near_float(package: ModelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    from occbev.inference.table_cache import TableCache

    monkeypatch.setattr(openvino_backend, "multiplies_bytes", lambda: True)
    image = SMALL.image
    for count in (2, 5):
        results = []
        for precision, device in (("auto", "int8"), ("f32", "f32")):
            backend = load_backend(package, count, "openvino", RunSettings(1, precision))
            assert device in backend.device
            assert ("int8" in backend.device) == (precision == "auto")
            pixels = np.random.default_rng(7).integers(0, 255, (1, count, 3, image.height, image.width))
            mean, std = (np.array(v, np.float32)[:, None, None] for v in (image.mean, image.std))
            tables = TableCache(SMALL, backend.form).tables(ring_rig(SMALL, count))
            inputs = {
                "images": ((pixels - mean) / std).astype(np.float32),
                "camera_valid": np.ones((1, count), np.float32),
                **tables,
            }
            results.append(1 / (1 + np.exp(-backend.run(inputs)["heatmap"].copy())))
        assert agreement([results[1]], [results[0]]) > 0.7


def test_a_cpu_without_byte_products_reads_another_graph(
    package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_backend, "multiplies_bytes", lambda: False)
    assert "int8" not in load_backend(package, 2, "openvino", RunSettings(1)).device


def test_too_few_frames_or_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    network = build_model(SMALL, "finetune").eval()
    with pytest.raises(QuantisationError, match="holds 39 frames, want 40 or more"):
        export_package(network, SMALL, tmp_path / "few", {}, {}, (), (3,), frames(39))
    other = replace(SMALL, image=replace(SMALL.image, width=128))
    with pytest.raises(QuantisationError, match="was prepared for"):
        check_frames(other, frames())
    with pytest.raises(ExportError, match="only our own"):
        export_package(network, BevDetModel(), tmp_path / "other", {}, {}, (), (3,), frames())
    assert not list(tmp_path.iterdir())


def test_frames_of_a_network_with_a_memory_are_first_ones(tmp_path: Path) -> None:
    model = replace(SMALL, memory=1)
    graph = write_ir(build_model(model, "finetune").eval(), model, tmp_path / "model.xml", True)
    names = {port.get_any_name() for port in graph.inputs}
    assert any(name.startswith("state_in") for name in names)
    inputs = _frames(graph, model, frames())
    assert len(inputs) == 40
    assert all(set(arrays) == names for arrays in inputs)


def test_frames_of_another_rig_are_not_compared_in_one_compiled_graph() -> None:
    two, three = ({"images": np.zeros((1, count, 3, 8, 8)), "points": np.zeros(5)} for count in (2, 3))
    assert _alike([two, three, two]) == [two, two]


def test_agreement_is_one_of_equals_and_falls_with_what_differs() -> None:
    said = [np.array([0.5, 0.5]), np.array([1.0])]
    assert agreement(said, said) == 1
    assert agreement(said, [np.array([0.5, 0.0]), np.array([1.0])]) == 0.5


def test_an_untrained_network_is_exported_for_its_latency_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "model.yaml"
    config.write_text(yaml.safe_dump(to_record(replace(SMALL, name="reduced", memory=1))))
    out = tmp_path / "package"
    assert main(["export", str(config), "--untrained", "--out", str(out), "--cameras", "3"]) == 0
    made = ModelPackage.load(out)
    assert made.has("model_int8.xml")
    assert not made.has("model.xml")
    assert "int8_agreement" not in made.metrics
    assert made.trained_on.startswith("Untrained: random weights")
    assert "**Untrained: random weights" in (out / "README.md").read_text()
    backend = load_backend(made, 3, "openvino", RunSettings(1))
    assert {"heatmap", "occupied", "state_out_bev"} <= set(backend._outputs)  # type: ignore[attr-defined]
    assert main(["export", str(config), "--untrained", "--model", str(config), "--out", str(out)]) == 2
    assert "--model cannot be used with --untrained" in capsys.readouterr().err
