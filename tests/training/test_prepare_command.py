"""The prepare command: inputs as positions, nothing that is lost in silence, no cache without boxes by mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from occbev_training.cli import main
from occbev_training.data.cache import CacheError, open_cache
from occbev_training.data.samples import require_boxes
from occbev_training.sources.nuscenes import NuscenesRecording
from occbev_training.sources.nuscenes_writer import write_nuscenes


@pytest.fixture
def root(tmp_path: Path, make_recording: Any) -> Path:
    """A root of two drives."""
    write_nuscenes([make_recording("tiny-0", 2), make_recording("tiny-1", 2, 1)], tmp_path / "root")
    return tmp_path / "root"


def prepare(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments), "--no-labels"])


def rename_categories(root: Path, name: str) -> None:
    path = root / "v1.0-sim" / "category.json"
    path.write_text(json.dumps([row | {"name": f"{name} {i}"} for i, row in enumerate(json.loads(path.read_text()))]))


def test_broken_images_and_drives_cost_nothing_else(root: Path, tmp_path: Path, capsys: Any) -> None:
    images = sorted((root / "samples" / "CAM_BACK").glob("tiny-0*"))
    images[0].write_bytes(images[0].read_bytes()[:200])
    images[1].write_bytes(b"no image")
    shutil.rmtree(root / "samples" / "CAM_FRONT", ignore_errors=True)
    for path in [*root.glob("s*s/LIDAR_TOP/tiny-1*")]:
        path.write_bytes(b"x")
    for workers in (1, 2):
        out = tmp_path / f"cache{workers}"
        assert prepare(root, "--out", out, "--workers", workers) == 1
        printed = " ".join(capsys.readouterr().out.split())
        assert "tiny-0: 2 samples" in printed
        assert "tiny-0: left out: 2 images of CAM_BACK, the first: key 0: " in printed
        assert "tiny-0: left out: 2 images of CAM_FRONT, the first: key 0: no file samples/CAM_FRONT/" in printed
        assert "left out: tiny-1: 2 key frames, the first: key 0: " in printed
        assert "no rows of 5 float32" in printed
        (cache, *others) = open_cache(out).drives
        assert (cache, others) == ("tiny-0", [])
    assert [sample.camera_valid.tolist() for sample in open_cache(out)] == [[True, False, False]] * 2


@pytest.mark.parametrize("command", ["prepare", "pairs"])
def test_an_error_of_the_code_costs_one_key_frame_and_the_status(root, tmp_path, monkeypatch, capsys, command) -> None:
    frame_set = NuscenesRecording.frame_set

    def fail(self: Any, key: int) -> Any:
        return self.no_such_thing if key == 1 and self.name == "tiny-0" else frame_set(self, key)

    options = [] if command == "pairs" else ["--no-labels"]
    options += ["--no-gate", "--grid", "tiny", "--min-support", "0"] if command == "pairs" else []
    arguments = [command, str(root), "--out", str(tmp_path / "out"), *options]
    with monkeypatch.context() as fault:
        fault.setattr(NuscenesRecording, "frame_set", fail)
        assert main(arguments) == 1
    assert "AttributeError: 'NuscenesRecording' object has no attribute" in " ".join(capsys.readouterr().out.split())
    assert main(arguments) == 0, "it is made anew when the fault is gone"


def test_returns_from_the_vehicle_itself_give_neither_label_nor_depth(root: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["prepare", str(root), "--label-window", "0.3", "--out"]
    body = ["--ego-box", "-90", "-90", "-9", "90", "90", "9"]
    assert main([*arguments, str(tmp_path / "car")]) == 0
    assert main([*arguments, str(tmp_path / "hall"), *body]) == 0
    car, all_body = open_cache(tmp_path / "car")[0], open_cache(tmp_path / "hall")[0]
    assert car.hit_sweeps.any()
    assert len(car.lidar_depth) > 0
    assert not all_body.hit_sweeps.any()
    assert len(all_body.lidar_depth) == 0
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "hall")]) == 1
    assert "made with ego_box [-90.0, -90.0, -9.0, 90.0, 90.0, 9.0], asked for is [-1.3," in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_drive_whose_content_changed_is_made_anew(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    assert prepare(root, "--out", out) == 0
    before = {path: path.stat().st_mtime_ns for path in sorted(out.glob("*/drive.json"))}
    for path in root.glob("s*s/LIDAR_TOP/tiny-1*"):
        (np.fromfile(path, "<f4") + np.float32(7)).tofile(path)
    assert prepare(out, "--nuscenes", root) == 0
    renewed = [path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert renewed == ["tiny-1"]


def test_categories_without_a_class_are_listed_and_no_box_at_all_is_an_error(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    rename_categories(root, "own")
    assert prepare(root, "--out", tmp_path / "none") == 1
    printed = capsys.readouterr().out
    assert "8 boxes are of categories without a class: own " in printed
    assert "no box is left" in printed
    with pytest.raises(CacheError, match=r"4 samples and no box.*no detection head"):
        require_boxes(open_cache(tmp_path / "none"))
    names = sorted({row["name"] for row in json.loads((root / "v1.0-sim" / "category.json").read_text())})
    (tmp_path / "classes.yaml").write_text("".join(f"{name}: car\n" for name in names))
    assert prepare(root, "--out", tmp_path / "mapped", "--classes", tmp_path / "classes.yaml") == 0
    assert "boxes: car 8; 0 of them without a LiDAR return" in capsys.readouterr().out
    require_boxes(open_cache(tmp_path / "mapped"))


def test_boxes_without_returns_are_counted_and_teach_nothing(root: Path, tmp_path: Path, capsys: Any) -> None:
    path = root / "v1.0-sim" / "sample_annotation.json"
    path.write_text(json.dumps([row | {"num_lidar_pts": 0} for row in json.loads(path.read_text())]))
    assert prepare(root, "--out", tmp_path / "cache") == 1
    assert "8 of them without a LiDAR return" in capsys.readouterr().out
    with pytest.raises(CacheError, match="8 boxes, none of them with a LiDAR return"):
        require_boxes(open_cache(tmp_path / "cache"))


def test_an_output_must_be_named(root: Path, capsys: Any) -> None:
    assert prepare(root) == 2
    assert "name the cache with --out FOLDER" in capsys.readouterr().err
