"""The nuScenes reader on tables made here, on broken ones, and on real key frames."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from occbev.classes import DETECTION_CLASSES
from occbev.geometry import (
    invert_transform,
    make_transform,
    rotation_from_wxyz,
    transform_points,
    wrap_angle,
)
from occbev_training.sources.can_bus import read_can_bus
from occbev_training.sources.nuscenes import NuscenesRecording, open_nuscenes
from occbev_training.sources.nuscenes_writer import write_nuscenes
from occbev_training.sources.recording import RecordingError

SHARED = Path(os.environ.get("OCCBEV_SHARED", Path(__file__).parents[3] / "shared")) / "data"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {SHARED} is not there")

REAL_FRAMES = {
    ("nuscenes-one", "frame.json", 0): {
        "CAM_FRONT": (3067, 10.358),
        "CAM_FRONT_RIGHT": (3079, 13.789),
        "CAM_FRONT_LEFT": (3704, 12.061),
        "CAM_BACK": (4826, 10.179),
        "CAM_BACK_LEFT": (4097, 8.794),
        "CAM_BACK_RIGHT": (3379, 15.967),
    },
    ("nuscenes-0103", "frame-001.json", 1): {
        "CAM_FRONT": (2759, 17.268),
        "CAM_FRONT_RIGHT": (2326, 7.910),
        "CAM_FRONT_LEFT": (2912, 14.468),
        "CAM_BACK": (3767, 8.500),
        "CAM_BACK_LEFT": (2104, 7.573),
        "CAM_BACK_RIGHT": (1954, 4.787),
    },
}
"""Returns deeper than 1 m inside each image and their median depth, counted by another reader."""


@needs_shared
@pytest.mark.parametrize("source", REAL_FRAMES)
def test_lidar_of_real_frames_projects_as_counted(source: tuple[str, str, int]) -> None:
    folder, _, key = source
    recording = open_nuscenes(SHARED / folder).recordings()[0]
    sweep = recording.sweep(0)
    sweep2global = recording.trajectory.at(sweep.stamp_ns) @ sweep.lidar2ego
    points = transform_points(sweep2global, sweep.points)
    frames = recording.frame_set(key).frames
    for camera in recording.rig.cameras:
        frame = frames[camera.name]
        in_ego = transform_points(invert_transform(frame.ego2global), points)
        _, depth, inside = camera.project(in_ego)
        seen = depth[inside & (depth > 1)]
        count, median = REAL_FRAMES[source][camera.name]
        assert (len(seen), round(float(np.median(seen)), 3)) == (count, median), camera.name


@needs_shared
@pytest.mark.parametrize("source", REAL_FRAMES)
def test_boxes_of_real_frames_equal_the_converted_ones(source: tuple[str, str, int]) -> None:
    folder, file, key = source
    annotations = open_nuscenes(SHARED / folder).recordings()[0].annotations(key)
    expected = {
        row["instance_token"]: row
        for row in json.loads((SHARED / folder / file).read_text())["annotations"]
        if row["name"] in DETECTION_CLASSES
    }
    assert sorted(expected) == sorted(annotations.instance)
    for token, box, label, points in zip(
        annotations.instance,
        annotations.boxes.box,
        annotations.boxes.label,
        annotations.lidar_points,
        strict=True,
    ):
        row = expected[token]
        width, length, height = row["size_wlh"]
        np.testing.assert_allclose(box[:3], row["center_ego"], atol=1e-4)
        np.testing.assert_allclose(box[3:6], (length, width, height), atol=1e-6)
        assert abs(wrap_angle(box[6] - row["yaw_ego"])) < 1e-5
        assert row["name"] == DETECTION_CLASSES[label]
        assert row["num_lidar_pts"] == points
        if folder == "nuscenes-0103" and row["velocity_ego_xy"] is not None:
            np.testing.assert_allclose(box[7:], row["velocity_ego_xy"], atol=1e-4)


@needs_shared
def test_point_counts_of_all_real_boxes() -> None:
    root = open_nuscenes(SHARED / "nuscenes-one")
    recording = root.recordings()[0]
    sweep = recording.sweep(0)
    points = transform_points(recording.key_pose(0) @ sweep.lidar2ego, sweep.points)
    counted = []
    for row in root.annotations_of(recording.sample_tokens[0]):
        box2global = make_transform(rotation_from_wxyz(row["rotation"]), row["translation"])
        width, length, height = row["size"]
        local = np.abs(transform_points(invert_transform(box2global), points))
        inside = np.all(local <= np.array([length, width, height]) / 2, axis=1).sum()
        assert inside == row["num_lidar_pts"]
        counted.append(inside)
    assert (len(counted), sum(counted)) == (69, 1009)


@needs_shared
def test_files_that_are_not_there_are_counted_not_fatal() -> None:
    root = open_nuscenes(SHARED / "nuscenes-0103")
    recording = root.recordings()[0]
    assert len(recording.key_stamp_ns) == 40
    assert len(recording.sweep_stamp_ns) == 1
    assert recording.absent == {
        "LIDAR_TOP": 387,
        **dict.fromkeys(recording.rig.names, 38),
    }
    frames = recording.frame_set(7)
    assert frames.cameras == ()
    assert set(frames.missing) == set(recording.rig.names)
    assert len(root.recordings(available_only=True)[0].key_stamp_ns) == 2


def test_scenes_of_one_town_share_a_location(tmp_path: Path, tiny_recording) -> None:
    """It decides on splits: what drives by the same houses must not be learned from and scored."""
    write_nuscenes([tiny_recording], tmp_path)
    recording = open_nuscenes(tmp_path).recordings()[0]
    assert recording.location == recording.name, "whose poses are in coordinates of its own"
    (logs,) = tmp_path.glob("*/log.json")
    logs.write_text(json.dumps([{**row, "location": "boston-seaport"} for row in json.loads(logs.read_text())]))
    assert open_nuscenes(tmp_path).recordings()[0].location == "boston-seaport"
    logs.unlink()
    assert open_nuscenes(tmp_path).recordings()[0].location == recording.name


def test_version_is_named_where_it_must_be(tmp_path: Path, tiny_recording) -> None:
    with pytest.raises(RecordingError, match="found \\[\\]"):
        open_nuscenes(tmp_path)
    write_nuscenes([tiny_recording], tmp_path)
    assert open_nuscenes(tmp_path).version == "v1.0-sim"
    with pytest.raises(RecordingError, match="v1.0-mini"):
        open_nuscenes(tmp_path, "v1.0-mini")


def test_unknown_scene_names_the_known_ones(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    with pytest.raises(RecordingError, match="tiny-0"):
        open_nuscenes(tmp_path).recording("scene-0001")


def test_dangling_token_names_the_table(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    path = tmp_path / "v1.0-sim" / "ego_pose.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(rows[1:]))
    with pytest.raises(RecordingError, match="ego_pose.json: no row"):
        open_nuscenes(tmp_path).recordings()


def test_missing_and_broken_tables_are_named(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    path = tmp_path / "v1.0-sim" / "instance.json"
    path.write_text("[{")
    with pytest.raises(RecordingError, match="instance.json: not a table"):
        open_nuscenes(tmp_path)
    path.unlink()
    with pytest.raises(RecordingError, match="instance.json: no such table"):
        open_nuscenes(tmp_path)


def test_truncated_lidar_file_is_named(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    recording = open_nuscenes(tmp_path).recordings()[0]
    path = next((tmp_path / "sweeps" / "LIDAR_TOP").glob("*1600000*"))
    path.write_bytes(path.read_bytes()[:-4])
    broken = int(np.argmax(recording.sweep_stamp_ns == int(path.name.split("__")[2][:16]) * 1000))
    with pytest.raises(RecordingError, match=path.name):
        recording.sweep(broken)


def test_velocity_needs_near_neighbours(tmp_path: Path, make_recording) -> None:
    write_nuscenes([make_recording(keys=3)], tmp_path)
    path = tmp_path / "v1.0-sim" / "sample.json"
    rows = json.loads(path.read_text())

    def velocity(key: int) -> np.ndarray:
        recording: NuscenesRecording = open_nuscenes(tmp_path).recordings()[0]
        annotations = recording.annotations(key)
        return annotations.boxes.box[annotations.boxes.label == 0][0, 7:]

    assert np.linalg.norm(velocity(1)) == pytest.approx(4.0, abs=1e-3)
    rows[2]["timestamp"] += 1_600_000  # key 1: neighbours 2.6 s apart, still a central difference
    path.write_text(json.dumps(rows))
    assert np.isfinite(velocity(1)).all()
    assert np.isnan(velocity(2)).all()  # one-sided and over 1.5 s


def test_can_messages_are_those_that_published_weights_know(shared: Path) -> None:
    """The last message that is not later than the key frame, or the first; its numbers in the order of the file."""
    root = shared / "data" / "nuscenes-0103"
    rows = json.loads((root / "can_bus" / "scene-0103_pose.json").read_text())
    (recording,) = open_nuscenes(root).recordings(available_only=True)
    for key, stamp_ns in enumerate(recording.key_stamp_ns):
        last = [rows[0], *(row for row in rows if row["utime"] * 1000 <= stamp_ns)][-1]
        signals = recording.frame_set(key).signals
        assert signals is not None
        assert signals.values == [*last["accel"], *last["rotation_rate"], *last["vel"]]


def test_a_can_file_that_is_none_is_refused(tmp_path: Path) -> None:
    assert read_can_bus(tmp_path, "scene-0001") is None
    (tmp_path / "can_bus").mkdir()
    for text, problem in (
        ("[]", "no message"),
        ('[{"utime": 1, "accel": [0, 0, 9.8], "vel": [1, 0, 0]}]', "rotation_rate"),
        ('[{"utime": 1, "accel": [0, 0, NaN], "rotation_rate": [0, 0, 0], "vel": [1, 0, 0]}]', "finite"),
    ):
        (tmp_path / "can_bus" / "scene-0001_pose.json").write_text(text)
        with pytest.raises(RecordingError, match=problem):
            read_can_bus(tmp_path, "scene-0001")
