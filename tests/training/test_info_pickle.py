"""Info files of mmdet3d: honest ones are read in both layouts, hostile ones are refused and do nothing."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import pickletools
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from occbev.geometry import make_transform, rotation_from_wxyz
from occbev_training.cli.arguments.shared import add_input_arguments
from occbev_training.cli.inputs import find_inputs
from occbev_training.sources.discovery import find_recordings
from occbev_training.sources.info_pickle import (
    PickleLimits,
    UnsafePickleError,
    parse_infos,
    read_infos,
    scan_pickle,
)
from occbev_training.sources.infos import convert_infos
from occbev_training.sources.recording import RecordingError

LEFT = [0.5, -0.5, 0.5, -0.5]
T0 = 1_531_883_530_449_377


def old_infos(samples: int = 3) -> dict:
    """The layout before mmdet3d 1.1, with the array kinds that it holds."""

    def pose(x: float) -> dict:
        return {
            "ego2global_translation": [100.0 + x, 5.0, 0.0],
            "ego2global_rotation": [1.0, 0.0, 0.0, 0.0],
        }

    infos = []
    for i in range(samples):
        stamp = T0 + 500_000 * i
        camera = {
            "data_path": f"./data/nuscenes/samples/CAM_FRONT/cam{i}.jpg",
            "type": "CAM_FRONT",
            "timestamp": stamp + 5000,
            "sensor2ego_translation": [1.5, 0.0, 1.5],
            "sensor2ego_rotation": LEFT,
            **pose(4.0 * i + 0.04),
            "cam_intrinsic": np.array([[60.0, 0, 32], [0, 60, 20], [0, 0, 1]]),
            "sensor2lidar_rotation": np.asfortranarray(np.eye(3)),
            "sensor2lidar_translation": np.zeros(3),
        }
        sweep = {
            "data_path": f"./data/nuscenes/sweeps/LIDAR_TOP/sweep{i}.bin",
            "type": "lidar",
            "timestamp": stamp - 50_000,
            "sensor2ego_translation": [0.9, 0.0, 1.8],
            "sensor2ego_rotation": [0.707, 0, 0, -0.707],
            **pose(4.0 * i - 0.4),
        }
        infos.append(
            {
                "lidar_path": f"./data/nuscenes/samples/LIDAR_TOP/key{i}.bin",
                "token": f"t{i}",
                "timestamp": stamp,
                "lidar2ego_translation": [0.9, 0.0, 1.8],
                "lidar2ego_rotation": [0.707, 0, 0, -0.707],
                **pose(4.0 * i),
                "cams": {"CAM_FRONT": camera},
                "sweeps": [sweep],
                "gt_boxes": np.zeros((2, 7), np.float32),
                "gt_names": np.array(["car", "pedestrian"]),
                "valid_flag": np.array([True, False]),
                "gt_velocity": np.array([[np.nan, 1.0]]),
                "num_lidar_pts": np.int64(7),
            }
        )
    return {"infos": infos, "metadata": {"version": "v1.0-mini"}}


def new_infos() -> dict:
    """The layout of mmdet3d 1.1 and later: seconds, matrices, bare file names."""
    samples = []
    for i, old in enumerate(old_infos()["infos"]):
        camera, sweep = old["cams"]["CAM_FRONT"], old["sweeps"][0]

        def matrix(row: dict, kind: str) -> list:
            rotation = rotation_from_wxyz(row[f"{kind}_rotation"])
            return make_transform(rotation, row[f"{kind}_translation"]).tolist()

        samples.append(
            {
                "sample_idx": i,
                "token": old["token"],
                "timestamp": old["timestamp"] / 1e6,
                "ego2global": matrix(old, "ego2global"),
                "lidar_points": {
                    "num_pts_feats": 5,
                    "lidar_path": f"key{i}.bin",
                    "lidar2ego": matrix(old, "lidar2ego"),
                },
                "images": {
                    "CAM_FRONT": {
                        "img_path": f"cam{i}.jpg",
                        "timestamp": camera["timestamp"] / 1e6,
                        "cam2img": camera["cam_intrinsic"].tolist(),
                        "cam2ego": matrix(camera, "sensor2ego"),
                    }
                },
                "lidar_sweeps": [
                    {
                        "timestamp": sweep["timestamp"] / 1e6,
                        "ego2global": matrix(sweep, "ego2global"),
                        "lidar_points": {"lidar_path": f"sweep{i}.bin", "lidar2ego": matrix(sweep, "sensor2ego")},
                    }
                ],
                "instances": [{"bbox_label": 0, "num_lidar_pts": np.float64(3.0)}],
            }
        )
    return {"metainfo": {"dataset": "nuscenes"}, "data_list": samples}


def lay_out(root: Path, infos: dict, protocol: int = 2) -> Path:
    """Write the files that infos name where nuScenes has them, and the infos beside them."""
    image = bytes(cv2.imencode(".jpg", np.full((40, 64, 3), 90, np.uint8))[1])
    rng = np.random.default_rng(0)
    for folder, stem in (("samples", "key"), ("sweeps", "sweep")):
        (root / folder / "LIDAR_TOP").mkdir(parents=True)
        for i in range(3):
            rng.normal(0, 5, (50, 5)).astype("<f4").tofile(root / folder / "LIDAR_TOP" / f"{stem}{i}.bin")
    (root / "samples" / "CAM_FRONT").mkdir()
    for i in range(3):
        (root / "samples" / "CAM_FRONT" / f"cam{i}.jpg").write_bytes(image)
    path = root / "infos_train.pkl"
    path.write_bytes(pickle.dumps(infos, protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("make", [old_infos, new_infos])
def test_honest_infos_become_plain_values(make, protocol: int) -> None:
    record = parse_infos(pickle.dumps(make(), protocol))
    if make is new_infos:
        assert record["data_list"][1]["instances"][0]["num_lidar_pts"] == 3.0
        return
    first = record["infos"][0]
    assert first["num_lidar_pts"] == 7
    assert first["gt_names"] == ["car", "pedestrian"]
    assert first["valid_flag"] == [True, False]
    assert first["gt_velocity"] == [[None, 1.0]], "JSON has no NaN"
    assert first["cams"]["CAM_FRONT"]["sensor2lidar_rotation"] == np.eye(3).tolist()


def test_module_names_of_both_numpys_are_read() -> None:
    data = pickle.dumps({"infos": [np.arange(3.0)]}, 2)
    for old, new in (
        (b"numpy._core.multiarray", b"numpy.core.multiarray"),
        (b"numpy.core.multiarray", b"numpy._core.multiarray"),
    ):
        assert parse_infos(data.replace(old, new)) == {"infos": [[0.0, 1.0, 2.0]]}


@pytest.mark.parametrize("make", [old_infos, new_infos])
def test_both_layouts_make_the_same_recording(tmp_path: Path, make) -> None:
    path = lay_out(tmp_path / "nuscenes", make())
    convert_infos(path, tmp_path / "infos.json")
    (opener,) = find_recordings(tmp_path / "infos.json", data_root=path.parent)
    recording = opener()
    assert opener.keys() == 3
    assert recording.key_stamp_ns.tolist() == [(T0 + 500_000 * i) * 1000 for i in range(3)]
    assert len(recording.sweep_stamp_ns) == 6
    camera = recording.rig["CAM_FRONT"]
    assert (camera.width, camera.height, camera.intrinsic[0, 2]) == (64, 40, 32.0)
    assert np.allclose(camera.cam2ego[:3, 3], [1.5, 0, 1.5])
    frame = recording.frame_set(1).frames["CAM_FRONT"]
    assert frame.stamp_ns == (T0 + 505_000) * 1000
    assert np.allclose(recording.trajectory.at(int(recording.key_stamp_ns[2]))[:3, 3], [108, 5, 0])
    assert recording.sweep(0).points.shape == (50, 3)
    assert recording.annotations(0) is None


def test_points_of_an_info_file_may_have_other_columns(tmp_path: Path) -> None:
    path = lay_out(tmp_path / "nuscenes", old_infos())
    for file in path.parent.glob("s*/LIDAR_TOP/*.bin"):
        np.arange(200, dtype="<f4").tofile(file)
    args = argparse.ArgumentParser()
    add_input_arguments(args)
    (four,) = find_inputs(args.parse_args(["--lidar-columns", "4"]), [path], tmp_path, 0.5).openers
    (five,) = find_inputs(args.parse_args([]), [path], tmp_path, 0.5).openers
    assert four().sweep(0).points[1].tolist() == [4, 5, 6]
    assert five().sweep(0).points[1].tolist() == [5, 6, 7]
    assert four.fingerprint != five.fingerprint


def test_a_gap_begins_another_drive(tmp_path: Path) -> None:
    infos = old_infos()
    infos["infos"][2]["timestamp"] += 60_000_000
    path = lay_out(tmp_path / "nuscenes", infos)
    convert_infos(path, tmp_path / "infos.json")
    assert len(find_recordings(tmp_path / "infos.json", data_root=path.parent)) == 2


def test_a_path_in_an_info_file_cannot_leave_the_data_root(tmp_path: Path) -> None:
    infos = old_infos()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    for info in infos["infos"]:
        info["cams"]["CAM_FRONT"]["data_path"] = "../../../secret.jpg"
    path = lay_out(tmp_path / "nuscenes", infos)
    convert_infos(path, tmp_path / "infos.json")
    (opener,) = find_recordings(tmp_path / "infos.json", data_root=path.parent)
    with pytest.raises(RecordingError, match="no image of drive"):
        opener()


@pytest.mark.parametrize("make", [old_infos, new_infos])
def test_a_camera_name_cannot_leave_the_data_root(tmp_path: Path, make) -> None:
    """A name is a folder's name, too."""
    infos = make()
    for info in infos.get("infos") or infos["data_list"]:
        cameras = info.get("cams") or info["images"]
        cameras["../../secret"] = cameras.pop("CAM_FRONT")
    path = lay_out(tmp_path / "nuscenes", infos)
    (tmp_path / "nuscenes" / "samples" / "CAM_FRONT").rename(tmp_path / "secret")
    convert_infos(path, tmp_path / "infos.json")
    with pytest.raises(RecordingError, match=r"sample 0: .*'\.\./\.\./secret'"):
        find_recordings(tmp_path / "infos.json", data_root=path.parent)


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def computed_global() -> bytes:
    """Push an allowed name, hide it below, and take `os.system` by STACK_GLOBAL."""
    text = b"".join(b"\x8c" + bytes([len(t)]) + t for t in (b"os", b"system"))
    allowed = b"".join(b"\x8c" + bytes([len(t)]) + t for t in (b"numpy", b"ndarray"))
    return b"\x80\x04" + text + allowed + b"00" + b"\x93" + b"\x8c\x04true\x85R."


HOSTILE = {
    "a shell command": pickle.dumps(Calls(os.system, "touch HERE")),
    "in an old protocol": pickle.dumps({"infos": [Calls(os.system, "touch HERE")]}, 0),
    "evaluated text": pickle.dumps({"infos": [Calls(eval, "open('HERE', 'w')")]}, 2),
    "numpy's own loader": pickle.dumps(Calls(np.load, "HERE"), 2),
    "an object array": pickle.dumps({"infos": np.array([{}], object)}, 2),
    "a structured array": pickle.dumps({"infos": np.zeros(2, [("a", "f4")])}, 2),
    "INST": b"(S'touch HERE'\nios\nsystem\n.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a persistent object": b"\x80\x02U\x04here Q.".replace(b" ", b""),
    "a hidden global": computed_global(),
    "another class": pickle.dumps(PickleLimits(), 4),
    "another coding": b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
    "a call of a name": b"cnumpy\nndarray\n(tR.",
    "an array larger than its bytes": pickle.dumps(np.zeros(4), 2).replace(b"K\x04\x85", b"K\x64\x85"),
    "half a file": pickle.dumps(old_infos(), 2)[:2000],
    "nothing": b"",
    "no pickle": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_do_nothing(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickleError):
        parse_infos(HOSTILE[name])
    assert list(tmp_path.iterdir()) == []


def test_each_line_of_defence_holds_alone() -> None:
    """The unpickler refuses what the scan would have let through."""
    from occbev_training.sources.info_pickle import _InfoUnpickler

    for name in ("a shell command", "evaluated text", "a hidden global", "another class"):
        with pytest.raises(UnsafePickleError, match="global"):
            _InfoUnpickler(io.BytesIO(HOSTILE[name])).load()
    assert any(op.name == "STACK_GLOBAL" for op, _, _ in pickletools.genops(computed_global()))
    with pytest.raises(UnsafePickleError, match="more than 10 opcodes"):
        scan_pickle(pickle.dumps(old_infos(), 2), PickleLimits(opcodes=10))


def test_a_small_file_may_cost_two_gigabytes_and_a_minute() -> None:
    small, large = PickleLimits.of_file(10_000), PickleLimits.of_file(200 * 2**20)
    assert (small.memory_bytes // 2**30, small.cpu_seconds) == (2, 60)
    assert (large.memory_bytes // 2**30, large.cpu_seconds) == (13, 660)
    assert PickleLimits.of_file(2**40).memory_bytes == 16 * 2**30


def test_a_file_is_read_in_a_child_with_limits(tmp_path: Path) -> None:
    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps(old_infos(), 2))
    assert len(read_infos(path)["infos"]) == 3
    path.write_bytes(HOSTILE["a shell command"].replace(b"HERE", bytes(tmp_path / "x")[:4]))
    with pytest.raises(RecordingError, match=r"infos.pkl: refused: .*system"):
        read_infos(path)
    with pytest.raises(RecordingError, match="at most 10 are read"):
        read_infos(path, PickleLimits(file_bytes=10))
    # Twenty-five lists, each holding the one before twice: a short pickle, 33 million values.
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(25)
    )
    path.write_bytes(b"\x80\x02}(U\x05infosU\x01xu" + laughs[2:] + b".")
    with pytest.raises(RecordingError, match=r"memory|limit"):
        read_infos(path, PickleLimits(memory_bytes=400 * 1024**2, cpu_seconds=8))
    with pytest.raises(RecordingError, match="No such file"):
        read_infos(tmp_path / "absent.pkl")
    path.write_bytes(pickle.dumps({"anything": struct.calcsize("I")}))
    with pytest.raises(RecordingError, match="neither 'data_list' nor 'infos'"):
        convert_infos(path, tmp_path / "infos.json")
