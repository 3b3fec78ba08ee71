"""What the writer puts on disk is what the reader gives back, drive by drive."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from occbev.geometry import wrap_angle
from occbev_training.occupancy.prepare import PrepareConfig, prepare
from occbev_training.sources.deskew import compensated
from occbev_training.sources.nuscenes import open_nuscenes
from occbev_training.sources.nuscenes_writer import (
    TABLES,
    find_written_drives,
    merge_nuscenes,
    usual_attribute,
    write_drive,
    write_nuscenes,
)
from occbev_training.sources.recording import RecordingError


def test_round_trip_of_stamps_poses_and_calibration(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    read = open_nuscenes(tmp_path).recordings()[0]
    np.testing.assert_array_equal(read.key_stamp_ns, tiny_recording.key_stamp_ns)
    np.testing.assert_array_equal(read.sweep_stamp_ns, tiny_recording.sweep_stamp_ns)
    np.testing.assert_allclose(read.lidar2ego, tiny_recording.lidar2ego, atol=1e-12)
    assert read.rig.names == tiny_recording.rig.names
    for camera in read.rig.cameras:
        original = tiny_recording.rig[camera.name]
        np.testing.assert_allclose(camera.cam2ego, original.cam2ego, atol=1e-12)
        np.testing.assert_array_equal(camera.intrinsic, original.intrinsic)
        assert (camera.width, camera.height) == (original.width, original.height)


def test_round_trip_of_images_keeps_bytes_stamps_and_poses(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    read = open_nuscenes(tmp_path).recordings()[0]
    for key in range(tiny_recording.keys):
        expected = tiny_recording.frame_set(key).frames
        for name, frame in read.frame_set(key).frames.items():
            assert frame.image == expected[name].image
            assert frame.stamp_ns == expected[name].stamp_ns
            np.testing.assert_allclose(frame.ego2global, expected[name].ego2global, atol=1e-9)


def test_round_trip_of_boxes(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    read = open_nuscenes(tmp_path).recordings()[0]
    for key in range(tiny_recording.keys):
        expected, got = tiny_recording.annotations(key), read.annotations(key)
        order = np.argsort(got.boxes.label)
        np.testing.assert_array_equal(got.boxes.label[order], expected.boxes.label)
        np.testing.assert_array_equal(got.lidar_points[order], expected.lidar_points)
        box = got.boxes.box[order]
        np.testing.assert_allclose(box[:, :6], expected.boxes.box[:, :6], atol=2e-5)
        assert np.abs(wrap_angle(box[:, 6] - expected.boxes.box[:, 6])).max() < 1e-5
        np.testing.assert_allclose(box[:, 7:], expected.boxes.box[:, 7:], atol=2e-3)


def test_round_trip_of_sweeps_is_motion_compensated(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    read = open_nuscenes(tmp_path).recordings()[0]
    for index in (0, 2, 9):
        raw = tiny_recording.sweep(index)
        expected, got = compensated(raw, tiny_recording.trajectory), read.sweep(index)
        assert got.time_offset is None
        np.testing.assert_array_equal(got.points, expected.points)
        np.testing.assert_array_equal(got.intensity, expected.intensity)
        assert np.abs(got.points - raw.points).max() > 0.1  # 6 m/s over 50 ms


def test_round_trip_of_occupancy(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    read = open_nuscenes(tmp_path).recordings()[0]
    expected, got = tiny_recording.occupancy_truth(1), read.occupancy_truth(1)
    np.testing.assert_array_equal(got.semantics, expected.semantics)
    np.testing.assert_array_equal(got.mask_lidar, expected.mask_lidar)
    np.testing.assert_array_equal(got.mask_camera, expected.mask_camera)


def test_key_between_sweeps_gets_a_sweep_at_its_own_stamp(tmp_path: Path, tiny_recording) -> None:
    tiny_recording.key_stamp_ns = tiny_recording.key_stamp_ns + 30_000_000
    write_nuscenes([tiny_recording], tmp_path)
    read = open_nuscenes(tmp_path).recordings()[0]
    np.testing.assert_array_equal(read.key_stamp_ns, tiny_recording.key_stamp_ns)
    at = int(np.argmax(read.sweep_stamp_ns == read.key_stamp_ns[0]))
    original = compensated(tiny_recording.sweep(at), tiny_recording.trajectory)
    moved = np.linalg.norm(read.sweep(at).points - original.points, axis=1)
    assert 0.1 < np.median(moved) < 0.25  # 6 m/s over 30 ms


def test_key_without_a_sweep_is_an_error(tmp_path: Path, tiny_recording) -> None:
    tiny_recording.sweep_stamp_ns = tiny_recording.sweep_stamp_ns[:3]
    with pytest.raises(RecordingError, match="key frame 1 at"):
        write_nuscenes([tiny_recording], tmp_path)
    assert find_written_drives(tmp_path) == []


def test_drives_written_apart_are_joined_once(tmp_path: Path, make_recording) -> None:
    for number in (1, 0):
        write_drive(make_recording(f"tiny-{number}", keys=2 + number, seed=number), tmp_path)
    assert merge_nuscenes(tmp_path) == 2
    root = open_nuscenes(tmp_path)
    assert root.scenes == ("tiny-0", "tiny-1")
    assert [len(r.key_stamp_ns) for r in root.recordings()] == [2, 3]
    tables = {t: json.loads((tmp_path / "v1.0-sim" / f"{t}.json").read_text()) for t in TABLES}
    for table, rows in tables.items():
        tokens = [row["token"] for row in rows]
        assert len(tokens) == len(set(tokens)), table
    assert len(tables["map"]) == 1
    assert sorted(tables["map"][0]["log_tokens"]) == sorted(row["token"] for row in tables["log"])


def test_finished_drives_are_not_written_again(tmp_path: Path, make_recording) -> None:
    write_nuscenes([make_recording()], tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}

    class Untouchable(make_recording):
        def frame_set(self, key: int):
            raise AssertionError("a finished drive was rendered again")

    write_nuscenes([Untouchable(), make_recording("tiny-1", keys=2)], tmp_path)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert find_written_drives(tmp_path) == ["tiny-0", "tiny-1"]


def test_same_drive_gives_the_same_tables(tmp_path: Path, make_recording) -> None:
    for folder in ("a", "b"):
        write_nuscenes([make_recording()], tmp_path / folder)
    for table in TABLES:
        a, b = (tmp_path / folder / "v1.0-sim" / f"{table}.json" for folder in ("a", "b"))
        assert a.read_bytes() == b.read_bytes(), table


def test_chains_of_rows_are_closed(tmp_path: Path, tiny_recording) -> None:
    write_nuscenes([tiny_recording], tmp_path)
    root = open_nuscenes(tmp_path)
    for table in ("sample", "sample_data", "sample_annotation"):
        rows = root.tables[table]
        for token, row in rows.items():
            if row["next"]:
                assert rows[row["next"]]["prev"] == token
    starts = [row for row in root.tables["sample_data"].values() if not row["prev"]]
    assert len(starts) == 4  # three cameras and the LiDAR


def test_usual_attribute() -> None:
    assert usual_attribute("car", 0.3) == "vehicle.moving"
    assert usual_attribute("car", 0.0) == "vehicle.parked"
    assert usual_attribute("bus", 0.1) == "vehicle.stopped"
    assert usual_attribute("bicycle", 3.0) == "cycle.with_rider"
    assert usual_attribute("pedestrian", 0.2) == "pedestrian.standing"
    assert usual_attribute("barrier", 9.0) == ""


def test_names_of_drives_and_cameras_cannot_leave_the_folder(tmp_path: Path, tiny_recording) -> None:
    tiny_recording.name = "../../up"
    with pytest.raises(ValueError, match=r"drive name '\.\./\.\./up' cannot be a file name"):
        prepare({"../../up": lambda: tiny_recording}, tmp_path / "cache", PrepareConfig(), 1)
    with pytest.raises(ValueError, match="drive name"):
        write_nuscenes([tiny_recording], tmp_path / "root")
    assert list(tmp_path.rglob("*up*")) == []
