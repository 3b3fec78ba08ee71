"""The node's side and the training sources read the same bag as the same images, cameras and poses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="reads and writes bags")

from tests.small_bags import FORWARD, HEIGHT, START, WIDTH, Camera, Drive, K, compressed, info, odometry, raw

from occbev.frame_job import FrameJob
from occbev.geometry import make_transform, rotation_from_rpy
from occbev.messages.bags import BagMessage, BagReader, BagWriter, type_store
from occbev.messages.readers import ENCODINGS
from occbev.streams.bag_jobs import BagJobs
from occbev.streams.parameters import PerceptionParameters, parameters_from_record
from occbev_training.sources.bags import BagRecording

MOUNT = make_transform(rotation_from_rpy(0.01, -0.02, 0.03), (0.4, 0.1, 1.2))


def gather_jobs(path: Path, parameters: PerceptionParameters) -> list[FrameJob]:
    """The node's side of a bag, up to what would go into the network; images stay as they came."""
    feed, jobs = BagJobs(parameters, lambda frame, camera: frame, lambda about, text: None), []
    with BagReader(path) as bag:
        for job in feed.jobs(bag):
            feed.intake.gather(job)
            jobs.append(job)
    return jobs


def gather(path: Path, drive: Drive) -> list[FrameJob]:
    cameras = {
        name: {"topic": f"/{name}/{camera.topic}", "info_topic": f"/{name}/camera_info"}
        for name, camera in drive.cameras.items()
    }
    record = {
        "cameras": {"names": list(cameras), **cameras},
        "ego_motion": {"odometry_topic": "/odom", "source": "odometry" if drive.odometry else "tf"},
        "sync": {"min_cameras": 1},
    }
    return gather_jobs(path, parameters_from_record(record))


def assert_equal(path: Path, drive: Drive) -> BagRecording:
    """Hold the node's sets against the recording's key frames."""
    jobs, recording = gather(path, drive), BagRecording(path)
    assert len(jobs) == len(recording.key_stamp_ns) == drive.sets
    for key, job in enumerate(jobs):
        theirs = recording.frame_set(key)
        assert job.frame_set is not None
        assert job.rig is not None
        said, trained_on = job.frame_set.signals, theirs.signals
        assert (said is None) == (trained_on is None) == (not drive.odometry)
        if said is not None and trained_on is not None:
            np.testing.assert_allclose(said.values, trained_on.values, atol=1e-9)
        usable = [name for name, frame in job.frame_set.frames.items() if frame is not None]
        assert set(usable) == set(theirs.cameras), (job.missing, theirs.missing, recording.left_out)
        for name in usable:
            ours, trained = job.frame_set.frames[name], theirs.frames[name]
            assert ours is not None
            assert trained is not None
            assert ours.stamp_ns == trained.stamp_ns
            assert isinstance(ours.image, bytes) == isinstance(trained.image, bytes)
            np.testing.assert_array_equal(ours.image, trained.image)
            np.testing.assert_allclose(ours.ego2global, trained.ego2global, atol=1e-9)
            for field in ("width", "height", "distortion_model", "distortion"):
                assert getattr(job.rig[name], field) == getattr(recording.rig[name], field)
            np.testing.assert_array_equal(job.rig[name].intrinsic, recording.rig[name].intrinsic)
            np.testing.assert_allclose(job.rig[name].cam2ego, recording.rig[name].cam2ego, atol=1e-12)
    return recording


def of_cameras(cameras: dict[str, Camera], **changes: Any) -> Drive:
    """Drive with cameras that look ahead."""
    static = tuple(("base_link", f"{name}_optical", FORWARD) for name in cameras)
    return Drive(cameras, static, **changes)


def test_encodings(tmp_path: Path) -> None:
    kinds = [kind for kind in ENCODINGS if kind != "8UC3"]
    cameras = {f"c_{kind}".lower(): Camera(partial(raw, encoding=kind), topic="image_raw") for kind in kinds}
    cameras["c_png"] = Camera(partial(compressed, kind="png"))
    cameras["c_range"] = Camera(partial(raw, encoding="16UC1"), topic="image_raw")
    drive = of_cameras(cameras, sets=2)
    recording = assert_equal(drive.write(tmp_path / "bag"), drive)
    assert list(recording.left_out) == ["c_range"]
    assert "/c_range/image_raw: encoding '16UC1' is not understood" in recording.left_out["c_range"]
    assert len(recording.rig) == len(cameras) - 1
    assert recording.frame_set(0).frames["c_nv12"].image.shape == (HEIGHT, WIDTH, 3)


def test_calibrations(tmp_path: Path) -> None:
    p = np.array([[18.0, 0, 15.0], [0, 18.0, 11.0], [0, 0, 1]])
    bent = (-0.3, 0.1, 0.001, -0.001, 0.01)
    wide = (0.9, -0.2, 0.0, 0.0, 0.05, 1.2, -0.1, 0.02)
    full = {"size": (2 * WIDTH, 2 * HEIGHT)}
    infos = {
        "plain": {"p": p},
        "bent": {"d": bent, "p": p},
        "four": {"d": bent[:4]},
        "nameless": {"model": "", "d": bent},
        "wide": {"model": "rational_polynomial", "d": wide},
        "fisheye": {"model": "equidistant", "d": (0.02, -0.01, 0.003, -0.001)},
        "kannala": {"model": "fisheye", "d": (0.02, -0.01, 0.003, -0.001)},
        "binned": {**full, "binning": 2},
        "cut": {**full, "roi": (5, 7, WIDTH, HEIGHT)},
        "omni": {"model": "omnidirectional", "d": bent},
        "blank": {"k": np.zeros((3, 3))},
        "short": {"d": (0.1, 0.2)},
    }
    cameras = {name: Camera(info=partial(info, **values)) for name, values in infos.items()}
    cameras["rect"] = Camera(info=partial(info, d=bent, p=p), topic="image_rect/compressed")
    drive = of_cameras(cameras, sets=2)
    recording = assert_equal(drive.write(tmp_path / "bag"), drive)
    assert sorted(recording.left_out) == ["blank", "omni", "short"]
    assert "known are" in recording.left_out["omni"]
    rig = recording.rig
    assert (rig["bent"].intrinsic[0, 0], rig["bent"].distortion_model) == (20.0, "plumb_bob")
    assert (rig["rect"].intrinsic[0, 0], rig["rect"].distortion) == (18.0, ())
    assert (rig["binned"].width, rig["binned"].intrinsic[0, 0]) == (WIDTH, 10.0)
    assert rig["cut"].intrinsic[:2, 2].tolist() == [10.5, 4.5]
    assert rig["kannala"].lens.is_fisheye


def test_a_camera_whose_calibration_is_of_its_full_size(tmp_path: Path) -> None:
    twice = Camera(info=partial(info, size=(2 * WIDTH, 2 * HEIGHT)))
    recording = BagRecording(of_cameras({"front": twice}).write(tmp_path / "bag"))
    np.testing.assert_allclose(recording.rig["front"].intrinsic[:2] * 2, K[:2])
    assert recording.frame_set(0).cameras == ("front",)


CHAINS = {
    "up to the base": Drive(),
    "through base_footprint": Drive(
        static=(("base_footprint", "base_link", MOUNT), ("base_link", "front_optical", FORWARD)),
        odometry="",
        pose_child="base_footprint",
        base2child=MOUNT,
    ),
    "odometry of base_footprint": Drive(
        static=(("base_footprint", "base_link", MOUNT), ("base_link", "front_optical", FORWARD)),
        odometry="base_footprint",
        base2child=MOUNT,
    ),
    "the base hangs below a sensor": Drive(
        static=(("kit", "base_link", MOUNT), ("kit", "front_optical", FORWARD)), odometry="base_link"
    ),
    "a moving link between static ones": Drive(
        static=(("mount", "front_optical", FORWARD),), moving=(("base_link", "mount", MOUNT),)
    ),
    "nothing but /tf": Drive(
        static=(),
        moving=(("base_link", "mount", MOUNT), ("mount", "front_optical", FORWARD)),
        odometry="",
        pose_child="base_link",
    ),
    "static transforms that come last": Drive(static_late=True),
}


@pytest.mark.parametrize("name", CHAINS)
def test_transforms(tmp_path: Path, name: str) -> None:
    assert_equal(CHAINS[name].write(tmp_path / "bag"), CHAINS[name])


def test_cameras_of_different_phases(tmp_path: Path) -> None:
    cameras = {"front": Camera(), "left": Camera(delay_ns=21_000_000), "rear": Camera(delay_ns=33_000_000)}
    assert_equal((drive := of_cameras(cameras)).write(tmp_path / "bag"), drive)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_poses_before_an_estimator_has_begun_are_left_out(tmp_path: Path, value: float) -> None:
    drive = Drive(odometry="", pose_child="")
    with BagWriter(tmp_path / "bag") as writer:
        for message in replace(drive, odometry="base_link").messages():
            if message.topic == "/odom" and message.log_ns < START - 40_000_000:
                bad = odometry(message.log_ns, "base_link", np.eye(4))
                turn = bad.pose.pose.orientation
                turn.x = turn.y = turn.z = turn.w = value
                data = bytes(type_store().serialize_cdr(bad, bad.__msgtype__))
                message = BagMessage(message.topic, message.type, message.log_ns, data)
            writer.write(message)
    recording = assert_equal(tmp_path / "bag", Drive())
    assert recording.skipped["/odom: bad pose"] == 3
