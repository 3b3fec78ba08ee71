"""Labelled recordings as moments: labels, sweep and images in base_link at the key time; shown by `occbev view`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from occbev.classes import FREE, OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.cli import main
from occbev.geometry import invert_transform, transform_points
from occbev_training.sources.moments import recording_moments
from occbev_training.sources.nuscenes_writer import write_nuscenes


def test_a_moment_holds_what_the_recording_says_of_its_key_frame(make_recording) -> None:
    recording = make_recording("tiny-0", 3)
    moments = list(recording_moments(recording))
    assert [m.stamp_ns for m in moments] == recording.key_stamp_ns.tolist()
    for key, moment in enumerate(moments):
        labels = recording.occupancy_truth(key)
        np.testing.assert_array_equal(moment.true_boxes.box, recording.annotations(key).boxes.box)
        seen = moment.true_occupancy.state != UNOBSERVED_STATE
        np.testing.assert_array_equal(seen, labels.mask_camera)
        occupied = (labels.semantics != FREE) & labels.mask_camera
        np.testing.assert_array_equal(moment.true_occupancy.state == OCCUPIED_STATE, occupied)
        assert set(moment.images) == set(recording.rig.names)
        assert moment.boxes is None


def test_the_sweep_is_carried_to_the_key_time(make_recording) -> None:
    from occbev_training.sources.deskew import compensated

    recording = make_recording("tiny-0", 3)
    moment = list(recording_moments(recording))[1]
    index = int(np.argmin(np.abs(recording.sweep_stamp_ns - moment.stamp_ns)))
    sweep = compensated(recording.sweep(index), recording.trajectory)
    lidar2global = recording.trajectory.at(sweep.stamp_ns) @ sweep.lidar2ego
    in_global = transform_points(lidar2global, sweep.points)
    found = transform_points(recording.trajectory.at(moment.stamp_ns), moment.clouds["lidar"])
    np.testing.assert_allclose(found, in_global, atol=1e-2)
    assert np.isfinite(invert_transform(moment.ego2global)).all()


def test_a_nuscenes_root_is_shown(make_recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rerun", reason="needs the extra view")
    write_nuscenes([make_recording("tiny-0", 3), make_recording("tiny-1", 3)], tmp_path / "root")
    out = tmp_path / "run.rrd"
    command = ["view", str(tmp_path / "root"), "--scene", "tiny-1", "--save", str(out), "--frames", "2"]
    assert main(command) == 0
    assert "2 key times" in capsys.readouterr().err
    data = out.read_bytes()
    for path in (b"world/truth/boxes", b"world/lidar/lidar", b"world/cameras/"):
        assert path in data, path
