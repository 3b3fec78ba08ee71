"""`occbev-train evaluate`: a package on every kind of data, result files, and that both say the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from occbev.config import (  # noqa: E402
    BevEncoderConfig,
    DepthConfig,
    DetectionHeadConfig,
    ImageConfig,
    LiftConfig,
    OccupancyHeadConfig,
)
from occbev.grid import GRIDS, BevGrid  # noqa: E402
from occbev.inference.families.lift_splat import LiftSplatModel  # noqa: E402
from occbev.inference.model_package import ModelPackage, write_package  # noqa: E402
from occbev_training.cli import main  # noqa: E402
from occbev_training.evaluation.data import EvaluationDataError, RootFrames, open_evaluation_data  # noqa: E402
from occbev_training.evaluation.run_package import RunOptions, run_package, shares  # noqa: E402
from occbev_training.metrics.nuscenes_results import ResultsError  # noqa: E402
from occbev_training.models.build import build_model  # noqa: E402
from occbev_training.models.checkpoints import save_weights  # noqa: E402
from occbev_training.occupancy.prepare import PrepareConfig, prepare  # noqa: E402
from occbev_training.sources.nuscenes import open_nuscenes  # noqa: E402
from occbev_training.sources.nuscenes_writer import write_nuscenes  # noqa: E402

MODEL = replace(
    LiftSplatModel(),
    name="probe",
    image=ImageConfig(width=64, height=32),
    lift=LiftConfig(channels=8, depth=DepthConfig(1.0, 13.0, 2.0), max_points=4096),
    bev=BevGrid((-51.2, -51.2), (3.2, 3.2), (32, 32)),
    bev_encoder=BevEncoderConfig(channels=(8, 8, 8), blocks=(1, 1, 1), out_channels=8),
    grid=GRIDS["occ3d"],
    occupancy=OccupancyHeadConfig(channels=8, height_channels=2, cell_channels=8),
    detection=DetectionHeadConfig(channels=8),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with random weights, for the torch runtime."""
    torch.manual_seed(0)
    network, folder = build_model(MODEL, "finetune").eval(), tmp_path_factory.mktemp("probe")
    with torch.no_grad():  # random weights hardly say anything: let answers differ, some over the threshold
        for head in (network.detection_head, network.occupancy_head):
            for value in head.parameters():
                value.mul_(6.0 if value.ndim > 1 else 0.3)
    save_weights(folder / "weights.safetensors", network.state_dict(), {})
    return write_package(folder, MODEL, {"data": "nothing"}, {}).folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_recording: Any) -> Path:
    """Two drives of two key frames as a nuScenes root with dense labels."""
    folder = tmp_path_factory.mktemp("root")
    write_nuscenes([make_recording("tiny-0", 2), make_recording("tiny-1", 2, seed=1)], folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_recording: Any) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    jobs = {name: (lambda n=name: make_recording(n, 2)) for name in ("tiny-0", "tiny-1")}
    prepare(jobs, folder, PrepareConfig(MODEL.image, MODEL.grid, None))
    return folder


def run(*arguments: object) -> None:
    assert main(["evaluate", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def scored(package: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves of a run over the root."""
    out = tmp_path_factory.mktemp("scored") / "out"
    run(package, "--data", root, "--backend", "torch", "--out", out, "--save-voxels", "--draws", 5)
    return out


def test_a_root_is_scored_in_every_part(scored: Path, root: Path) -> None:
    record = json.loads((scored / "metrics.json").read_text())
    assert record["measured"] == ["boxes", "occupancy", "rays"]
    assert (record["samples"], record["drives"], record["data"]) == (4, 2, "nuScenes root")
    assert record["package"]["outputs"] == ["box", "heatmap", "occupancy_logits"]
    assert sum(record["detection"]["predictions"].values()) > 0
    assert set(record["intervals"]) > set(record["summary"])
    assert (record["intervals"]["drawn"], record["intervals"]["units"]) == ("drive", 2)
    rings = record["occupancy"]["iou_by_range"]
    assert list(rings) == [
        "20-30 m",
        "30-40 m",
        "over 40 m",
    ]  # what the cameras of these drives see
    seen = record["occupancy"]["iou_by_visibility"]
    assert {"one camera", "LiDAR alone"} <= set(seen)
    inside = sum(group["occupied_voxels"] for group in rings.values())
    cameras = sum(seen[name]["occupied_voxels"] for name in ("one camera", "several cameras") if name in seen)
    assert inside == cameras
    assert 0 <= record["summary"]["RayIoU"] <= 1


def test_pictures_and_files_are_left(scored: Path, root: Path) -> None:
    files = {path.name for path in scored.iterdir()}
    assert {"metrics.json", "precision_recall.png", "tp_errors.png", "by_range.png", "results.json"} <= files
    record = json.loads((scored / "metrics.json").read_text())
    assert {line["by"] for line in record["worst"]} >= {"voxels"}
    for line in record["worst"]:
        assert (scored / line["picture"]).stat().st_size > 10_000
    voxels = [line["quality"] for line in record["worst"] if line["by"] == "voxels"]
    assert voxels == sorted(voxels)
    tokens = set(open_nuscenes(root).tables["sample"])
    assert {path.stem for path in (scored / "voxels").iterdir()} == tokens


def test_the_files_of_a_run_score_as_the_run_did(scored: Path, root: Path, tmp_path: Path) -> None:
    """The official result file and the Occ3D voxels, read back, give the same numbers."""
    run(
        "--results",
        scored / "results.json",
        "--voxels",
        scored / "voxels",
        "--nuscenes",
        root,
        "--draws",
        0,
        "--json",
        tmp_path / "again.json",
    )
    first = json.loads((scored / "metrics.json").read_text())
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["intervals"] is None
    assert again["summary"] == pytest.approx(first["summary"], abs=1e-5)
    assert again["occupancy"] == first["occupancy"]
    assert again["detection"]["AP"] == first["detection"]["AP"]


def test_only_the_scenes_asked_for_are_scored(scored: Path, package: Path, root: Path, tmp_path: Path) -> None:
    scenes = tmp_path / "val.txt"
    scenes.write_text("# one of two\ntiny-1\n")
    run(
        package,
        "--data",
        root,
        "--backend",
        "torch",
        "--scenes",
        scenes,
        "--draws",
        0,
        "--workers",
        2,
        "--out",
        tmp_path / "val",
    )
    record = json.loads((tmp_path / "val" / "metrics.json").read_text())
    assert (record["samples"], record["drives"]) == (2, 1)
    run(
        "--results",
        tmp_path / "val" / "results.json",
        "--nuscenes",
        root,
        "--draws",
        0,
        "--json",
        tmp_path / "files.json",
    )
    files = json.loads((tmp_path / "files.json").read_text())
    assert (files["samples"], files["summary"]["NDS"]) == (2, record["summary"]["NDS"])
    run("--voxels", scored / "voxels", "--scenes", scenes, "--nuscenes", root, "--draws", 0)
    rows = json.loads((tmp_path / "val" / "results.json").read_text())
    rows["results"].popitem()
    (tmp_path / "part.json").write_text(json.dumps(rows))
    assert main(["evaluate", "--results", str(tmp_path / "part.json"), "--nuscenes", str(root)]) != 0


def test_scores_do_not_depend_on_the_number_of_processes(
    package: Path, root: Path, scored: Path, tmp_path: Path
) -> None:
    run(package, "--data", root, "--backend", "torch", "--workers", 2, "--draws", 5, "--out", tmp_path)
    one, two = (json.loads((f / "metrics.json").read_text()) for f in (scored, tmp_path))
    assert one == two


def test_drives_stay_whole_and_in_order_in_every_process() -> None:
    drives = ["a"] * 3 + ["b"] * 2 + ["c"]
    assert list(shares(drives, range(6), 2)) == [[0, 1, 2, 5], [3, 4]]
    assert list(shares(drives, [5, 1, 0], 8)) == [[0, 1], [5]]


def test_a_cache_is_scored_with_priors_and_calibrated(package: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    run(
        package,
        "--data",
        cache,
        "--backend",
        "torch",
        "--fit-priors",
        cache,
        "--priors",
        tmp_path / "p.npz",
        "--calibrate",
        "--draws",
        0,
        "--json",
        out,
    )
    record = json.loads(out.read_text())
    assert record["measured"] == ["boxes", "occupancy"]
    assert record["priors"]["occupancy_iou"] > 0.9  # every key of these drives has the same road
    best = record["calibration"]
    assert best["occupancy_iou"] >= record["summary"]["occupancy_iou"]
    assert (tmp_path / "p.npz").is_file()
    run(package, "--data", cache, "--backend", "torch", "--min-free", best["min_free"], "--draws", 0, "--json", out)
    again = json.loads(out.read_text())
    assert again["summary"]["occupancy_iou"] == pytest.approx(best["occupancy_iou"], abs=1e-12)
    assert again["min_free"] == best["min_free"]


def test_a_cache_and_its_recording_give_the_network_the_same(package: Path, cache: Path, root: Path) -> None:
    """What is scored on a cache is what is scored on the drive that it was made of."""
    loaded, options = ModelPackage.load(package), RunOptions(backend="torch")
    cached = run_package(loaded, open_evaluation_data(cache), [0, 1], options).results()
    direct = run_package(loaded, open_evaluation_data(root), [0, 1], options).results()
    for a, b in zip(cached, direct, strict=True):
        assert (a.drive, a.name) == (b.drive, b.name)
        np.testing.assert_array_equal(a.annotations.boxes.label, b.annotations.boxes.label)
        assert len(a.boxes) == len(b.boxes)
        agree = np.trace(a.occupancy.confusion) - np.trace(b.occupancy.confusion)
        assert abs(agree) <= 0.01 * a.occupancy.confusion.sum()  # JPEG in the root


def test_wrong_asks_are_answered(package: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert main(["evaluate", *map(str, arguments)]) != 0
        return capsys.readouterr().err

    assert "name a package" in refused()
    assert "--data" in refused(package)
    assert "--nuscenes" in refused("--results", "r.json")
    assert "not both" in refused(package, "--data", root, "--results", "r.json")
    assert "neither a sample cache" in refused(package, "--data", tmp_path)
    assert "probability" in refused(package, "--data", root, "--min-free", 2)
    assert "--split has no effect on a package on --data" in refused(package, "--data", root, "--split", "train")
    assert "--boxes has no effect" in refused(package, "--data", root, "--boxes", "boxes.json")
    assert "--calibrate has no effect on result files" in refused("--voxels", root, "--nuscenes", root, "--calibrate")
    assert "--workers has no effect on a package on --pairs" in refused(package, "--pairs", root, "--workers", 2)
    assert "--fit-priors CACHE" in refused(package, "--data", root, "--priors", "priors.npz")
    assert "scored on a sample cache" in refused(package, "--data", root, "--fit-priors", root)
    assert f"empty: holds none of {root}" in refused("--voxels", tmp_path / "empty", "--nuscenes", root)
    assert "--threads 0" in refused(package, "--data", root, "--threads", 0)
    (tmp_path / "names.txt").write_text("tiny-0\nelsewhere\n")
    assert "elsewhere" in refused(package, "--data", root, "--scenes", tmp_path / "names.txt")


def test_voxels_that_are_missing_or_wrong_are_named(scored: Path, root: Path, tmp_path: Path) -> None:
    from occbev_training.metrics.occ3d_results import read_occupancy, write_occupancy

    token = next(iter(open_nuscenes(root).tables["sample"]))
    with pytest.raises(ResultsError, match=f"no {token}.npz"):
        read_occupancy(tmp_path, token, (2, 2, 2))
    label = np.random.default_rng(0).integers(0, 18, (2, 3, 4))
    path = write_occupancy(tmp_path, token, label)
    np.testing.assert_array_equal(read_occupancy(tmp_path, token, (2, 3, 4)), label)
    with np.load(path) as arrays:
        assert list(arrays) == ["arr_0"]
    with pytest.raises(ResultsError, match=r"want integers \(2, 2, 2\)"):
        read_occupancy(tmp_path, token, (2, 2, 2))
    write_occupancy(tmp_path, token, label + 1)
    with pytest.raises(ResultsError, match="class 18"):
        read_occupancy(tmp_path, token, (2, 3, 4))
    nested = tmp_path / "scene-1" / "other"
    nested.mkdir(parents=True)
    np.savez(nested / "labels.npz", semantics=label.astype(np.uint8))
    np.testing.assert_array_equal(read_occupancy(tmp_path, "other", (2, 3, 4)), label)
    np.savez(nested / "labels.npz", wrong=label)
    with pytest.raises(ResultsError, match="wrong"):
        read_occupancy(tmp_path, "other", (2, 3, 4))


def test_a_root_without_images_can_still_be_scored_by_files(root: Path, tmp_path: Path) -> None:
    for name in ("v1.0-sim", "gts"):
        (tmp_path / name).symlink_to(root / name)
    bare = open_nuscenes(tmp_path)
    assert len(RootFrames(bare, with_images=False)) == 4
    with pytest.raises(EvaluationDataError, match="no key frame has an image"):
        RootFrames(bare)


def test_simulated_bags_are_scored_with_the_truth_beside_them(
    package: Path, tmp_path: Path, make_recording: Any
) -> None:
    from occbev_training.sources.bag_writer import write_bag
    from occbev_training.sources.truth import write_truth

    drive = make_recording("tiny-0", 3)
    write_bag(drive, tmp_path / "bags" / drive.name)
    write_truth(drive, tmp_path / "truth" / drive.name)
    evaluation_data = open_evaluation_data(tmp_path)
    assert evaluation_data.drives == ("tiny-0",) * 3
    frame = evaluation_data.frame(1)
    np.testing.assert_array_equal(frame.annotations.boxes.label, drive.annotations(1).boxes.label)
    assert frame.frame_set.stamp_ns == drive.key_stamp_ns[1]
    assert len(frame.frame_set.cameras) == len(drive.rig)
    assert frame.truth.origins.shape == (3, 3)
    results = run_package(ModelPackage.load(package), evaluation_data, [1], RunOptions("torch")).results()
    assert results[0].occupancy.rays is not None
