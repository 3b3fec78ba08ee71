"""Boxes of one's own, from topics and files, brought to base_link at the key frames, into a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rosbags", reason="bags are read with rosbags")
pytest.importorskip("numba", reason="the label kernels need numba: training environment")

from occbev.geometry import (
    invert_transform,
    make_transform,
    rotation_from_yaw,
    transform_points,
    xyzw_from_rotation,
    yaw_from_rotation,
)
from occbev.messages.bags import BagMessage, BagReader, BagWriter
from occbev.trajectory import Trajectory
from occbev_training.cli import main
from occbev_training.data.cache import open_cache
from occbev_training.sources.bag_writer import write_bag
from occbev_training.sources.box_labels import LabelBox, LabelFrame, read_labels
from occbev_training.sources.box_topics import _type_store, box_topics, read_box_topic
from occbev_training.sources.labelled import LabelledRecording
from occbev_training.sources.recording import RecordingError

LAG_NS = 40_000_000
"""Labels are this much later than the key frames; they must be brought back."""

STORE = _type_store()
KIND = {
    "detections": "vision_msgs/msg/Detection3DArray",
    "detected": "autoware_perception_msgs/msg/DetectedObjects",
    "tracked": "autoware_perception_msgs/msg/TrackedObjects",
    "older": "autoware_auto_perception_msgs/msg/TrackedObjects",
}


class MovingCar:
    """A car of the tiny drive that goes straight at 4 m/s, in the frame of the poses."""

    LWH = (4.5, 1.9, 1.6)

    def __init__(self, recording: Any) -> None:
        self.recording = recording

    def global_pose(self, stamp_ns: int) -> np.ndarray:
        seconds = (stamp_ns - int(self.recording.key_stamp_ns[0])) / 1e9
        return make_transform(
            rotation_from_yaw(0.3), (512.0 + 4 * np.cos(0.3) * seconds, 905 + 4 * np.sin(0.3) * seconds, 0.8)
        )

    def in_frame(self, frame: str, stamp_ns: int) -> np.ndarray:
        global2base = invert_transform(self.recording.trajectory.at(stamp_ns))
        base = {
            "base_link": global2base,
            "lidar_top": invert_transform(self.recording.lidar2ego) @ global2base,
            "odom": np.eye(4),
        }[frame]
        return base @ self.global_pose(stamp_ns)

    def at_key(self, key: int) -> np.ndarray:
        return self.in_frame("base_link", int(self.recording.key_stamp_ns[key]))


def make(kind: str, **fields: Any) -> Any:
    return STORE.types[kind](**fields)


def pose_message(matrix: np.ndarray) -> Any:
    point = make("geometry_msgs/msg/Point", **dict(zip("xyz", map(float, matrix[:3, 3]), strict=True)))
    turn = map(float, xyzw_from_rotation(matrix[:3, :3]))
    return make(
        "geometry_msgs/msg/Pose",
        position=point,
        orientation=make("geometry_msgs/msg/Quaternion", **dict(zip("xyzw", turn, strict=True))),
    )


def vector(*values: float) -> Any:
    return make("geometry_msgs/msg/Vector3", **dict(zip("xyz", map(float, values), strict=True)))


def header(stamp_ns: int, frame: str) -> Any:
    seconds, rest = divmod(stamp_ns, 10**9)
    return make(
        "std_msgs/msg/Header", stamp=make("builtin_interfaces/msg/Time", sec=seconds, nanosec=rest), frame_id=frame
    )


def with_covariance(what: str, value: Any) -> Any:
    return make(f"geometry_msgs/msg/{what}WithCovariance", covariance=np.zeros(36), **{what.lower(): value})


def detections(stamp_ns: int, frame: str, boxes: list[tuple[str, np.ndarray, tuple[float, float, float]]]) -> Any:
    rows = []
    for name, matrix, lwh in boxes:
        result = make(
            "vision_msgs/msg/ObjectHypothesisWithPose",
            hypothesis=make("vision_msgs/msg/ObjectHypothesis", class_id=name, score=0.8),
            pose=with_covariance("Pose", pose_message(matrix)),
        )
        box = make("vision_msgs/msg/BoundingBox3D", center=pose_message(matrix), size=vector(*lwh))
        rows.append(
            make("vision_msgs/msg/Detection3D", header=header(stamp_ns, frame), results=[result], bbox=box, id="7")
        )
    return make(KIND["detections"], header=header(stamp_ns, frame), detections=rows)


def objects(
    kind: str, stamp_ns: int, frame: str, boxes: list[tuple[int, np.ndarray, tuple[float, float, float]]]
) -> Any:
    package, tracked = kind.split("/")[0], "Tracked" in kind
    rows = []
    for label, matrix, lwh in boxes:
        twist = make("geometry_msgs/msg/Twist", linear=vector(4, 0, 0), angular=vector(0, 0, 0))
        motion: dict[str, Any] = {
            "pose_with_covariance": with_covariance("Pose", pose_message(matrix)),
            "twist_with_covariance": with_covariance("Twist", twist),
            "orientation_availability": 2,
        }
        if tracked:
            accel = make("geometry_msgs/msg/Accel", linear=vector(0, 0, 0), angular=vector(0, 0, 0))
            motion |= {"acceleration_with_covariance": with_covariance("Accel", accel), "is_stationary": False}
        else:
            motion |= {"has_position_covariance": False, "has_twist": True, "has_twist_covariance": False}
        shape = make(
            f"{package}/msg/Shape",
            type=0,
            footprint=make("geometry_msgs/msg/Polygon", points=[]),
            dimensions=vector(*lwh),
        )
        row = {
            "existence_probability": 0.7,
            "classification": [make(f"{package}/msg/ObjectClassification", label=label, probability=0.9)],
            "kinematics": make(f"{package}/msg/{'Tracked' if tracked else 'Detected'}ObjectKinematics", **motion),
            "shape": shape,
        }
        if tracked:
            row["object_id"] = make("unique_identifier_msgs/msg/UUID", uuid=np.full(16, 3, np.uint8))
        rows.append(make(f"{package}/msg/{'Tracked' if tracked else 'Detected'}Object", **row))
    return make(kind, header=header(stamp_ns, frame), objects=rows)


def bag_with_topic(folder: Path, recording: Any, kind: str, frame: str) -> Path:
    """A bag of the tiny drive with one message of boxes a key frame: the car, a forklift or animal, one without size."""
    write_bag(recording, folder / "plain")
    car = MovingCar(recording)
    added = []
    for stamp in recording.key_stamp_ns:
        stamp_ns = int(stamp) + LAG_NS
        pose = car.in_frame(frame, stamp_ns)
        other = pose @ make_transform(np.eye(3), (0.0, 5.0, 0.0))
        names: tuple[Any, Any] = ("Car", "forklift") if kind == KIND["detections"] else (1, 8)
        boxes = [(names[0], pose, car.LWH), (names[1], other, (2.0, 1.0, 2.0)), (names[0], other, (0.0, 0.0, 0.0))]
        message = (
            detections(stamp_ns, frame, boxes) if kind == KIND["detections"] else objects(kind, stamp_ns, frame, boxes)
        )
        added.append(BagMessage("/objects", kind, stamp_ns, bytes(STORE.serialize_cdr(message, kind))))
    path = folder / "drive"
    with BagReader(folder / "plain") as reader, BagWriter(path) as writer:
        connection = writer._writer.add_connection("/objects", kind, typestore=STORE)
        writer._connections["/objects"] = connection
        for message in sorted([*reader.messages(), *added], key=lambda m: m.log_ns):
            writer.write(message)
    return path


@pytest.mark.parametrize(
    ("kind", "frame"),
    [
        ("detections", "lidar_top"),
        ("detections", "base_link"),
        ("detected", "base_link"),
        ("tracked", "odom"),
        ("older", "odom"),
    ],
)
def test_boxes_of_a_topic_become_a_cache(
    tmp_path: Path, tiny_recording: Any, capsys: pytest.CaptureFixture[str], kind: str, frame: str
) -> None:
    bag = bag_with_topic(tmp_path, tiny_recording, KIND[kind], frame)
    assert box_topics(bag) == {"/objects": KIND[kind]}
    out = tmp_path / "labels"
    assert main(["labels", str(bag), "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    name = "forklift" if kind == "detections" else "animal"
    assert "12 boxes in 4 frames" not in printed
    assert "8 boxes in 4 frames of /objects; 4 key frames get labels, 0 have none" in printed
    assert "boxes: car 4" in printed
    assert "left out: 4 boxes without a size" in printed
    assert f"categories without a class: {name} 4; --classes" in printed
    assert cv2.imread(str(out / "drive.jpg")).shape[1] > 800
    made = json.loads((out / "drive.json").read_text())
    car = MovingCar(tiny_recording)
    assert [frame["stamp_ns"] for frame in made["frames"]] == tiny_recording.key_stamp_ns.tolist()
    for key, labels in enumerate(made["frames"]):
        (box,) = labels["boxes"]
        # vision_msgs has no velocity: its car stands between its stamp and the key, 4 m/s times 40 ms
        reach = 0.17 if kind == "detections" else 5e-3
        assert np.linalg.norm(np.subtract(box["xyz"], car.at_key(key)[:3, 3])) < reach
        assert box["yaw"] == pytest.approx(yaw_from_rotation(car.at_key(key)[:3, :3]), abs=1e-3)
        if kind != "detections":
            assert np.hypot(*box["velocity"]) == pytest.approx(4.0, abs=1e-2)

    cache = tmp_path / "cache"
    prepare = ["prepare", str(bag), "--labels", str(out), "--out", str(cache), "--no-labels"]
    assert main(prepare) == 0
    samples = open_cache(cache)
    assert len(samples) == 4
    for key in range(4):
        assert samples[key].labels.tolist() == [0]
        np.testing.assert_allclose(samples[key].boxes[0, :3], made["frames"][key]["boxes"][0]["xyz"], atol=1e-3)


def test_a_topic_that_is_absent_or_of_another_type_is_named(tmp_path: Path, tiny_recording: Any) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    for topic, text in (("/none", "/none is not there"), ("/odometry", "/odometry is a nav_msgs")):
        with pytest.raises(RecordingError, match=f"{text}.*want one of vision_msgs/msg/Detection3DArray"):
            read_box_topic(tmp_path / "bag", topic)
    assert main(["labels", str(tmp_path / "bag"), "--out", str(tmp_path / "out")]) == 1


def plain(**changes: Any) -> dict[str, Any]:
    box = {"class": "car", "track": "a", "xyz": [10.0, 1.0, 0.8], "lwh": [4.5, 1.9, 1.6], "yaw": 0.2, "lidar_points": 9}
    return {"frame": "base_link", "frames": [{"stamp_ns": 5, "boxes": [box | changes]}]}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (plain(xyz=[1.0, float("nan"), 0.0]), "frame 5, box 0: ValueError: xyz is .*want 3 finite numbers"),
        (plain(lwh=[4.0, -1.0, 2.0]), "lwh is .*want three numbers above 0"),
        (plain(yaw=None), "yaw is"),
        (plain(velocity=[1.0]), "velocity is .*want 2 finite"),
        ({"frame": "base_link", "frames": [{"stamp_ns": 1.5, "boxes": []}]}, "want whole nanoseconds"),
        ({"frame": "base_link", "frames": [{"stamp_ns": 5, "boxes": []}]}, "1 frames and no box"),
        ({"frames": plain()["frames"]}, "names no frame of its boxes"),
        ({"frame": "base_link", "frames": plain()["frames"] * 2}, "two frames have the stamp 5"),
        ([], "no plain labels"),
    ],
)
def test_plain_labels_that_are_wrong_are_named(tmp_path: Path, record: Any, text: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(record))
    with pytest.raises(RecordingError, match=rf"boxes\.json: .*{text}"):
        read_labels(path)


def test_kitti_boxes_are_the_same_boxes(tmp_path: Path, tiny_recording: Any) -> None:
    """A box of base_link, written as KITTI has it in a camera's frame, comes back as it was."""
    camera = tiny_recording.rig["CAM_FRONT"]
    # KITTI's boxes turn about the camera's vertical: a camera that looks straight ahead, as this one does
    box2base = make_transform(rotation_from_yaw(0.4), (14.0, 2.0, 1.0))
    box2cam = camera.ego2cam @ box2base
    ahead = box2cam[:3, 0]
    turn = float(np.arctan2(-ahead[2], ahead[0]))
    x, y, z = box2cam[:3, 3]
    line = f"Car 0 0 -1.5 0 0 50 50 1.6 1.9 4.5 {x} {y + 0.8} {z} {turn}"
    for key, stamp in enumerate(tiny_recording.key_stamp_ns):
        (tmp_path / f"{int(stamp)}.txt").write_text(
            f"{line}\nDontCare -1 -1 -10 0 0 1 1 -1 -1 -1 -1000 -1000 -1000 -10\n" if key else ""
        )
    frames = read_labels(tmp_path, "CAM_FRONT")
    assert [len(frame.boxes) for frame in frames] == [0, 1, 1, 1]
    moved = frames[1].boxes[0].move(camera.cam2ego)
    np.testing.assert_allclose(moved.box2frame, box2base, atol=1e-6)
    assert moved.lwh == (4.5, 1.9, 1.6)

    tracking, times = tmp_path / "0001.txt", tmp_path / "times.txt"
    tracking.write_text(f"0 3 {line}\n1 3 {line}\n")
    times.write_text("1700000000.25\n1700000000750000001\n")
    frames = read_labels(tracking, "CAM_FRONT", times)
    assert [frame.stamp_ns for frame in frames] == [1_700_000_000_250_000_000, 1_700_000_000_750_000_001]
    assert frames[0].boxes[0].track == "3"
    with pytest.raises(RecordingError, match="frame 0 has no time"):
        read_labels(tracking, "CAM_FRONT")
    with pytest.raises(RecordingError, match="--frame CAM_FRONT"):
        read_labels(tracking)
    tracking.write_text(f"0 3 {line} 1 2 3\n")
    with pytest.raises(RecordingError, match=r"0001\.txt: line 1: 18 columns"):
        read_labels(tracking, "CAM_FRONT", times)


def label_frames(
    recording: Any, stamps: list[int], change: Callable[[LabelBox], LabelBox] = lambda box: box
) -> list[LabelFrame]:
    car = MovingCar(recording)
    return [
        LabelFrame(s, "base_link", (change(LabelBox("car", car.in_frame("base_link", s), car.LWH, None, "a")),))
        for s in stamps
    ]


def test_a_track_gives_the_velocity_that_brings_a_box_to_the_key(tiny_recording: Any) -> None:
    stamps = [int(stamp) + LAG_NS for stamp in tiny_recording.key_stamp_ns]
    labelled = LabelledRecording(tiny_recording, label_frames(tiny_recording, stamps))
    car = MovingCar(tiny_recording)
    for key in range(4):
        boxes = labelled.annotations(key).boxes.box
        np.testing.assert_allclose(boxes[0, :3], car.at_key(key)[:3, 3], atol=2e-3)
        assert np.hypot(*boxes[0, 7:]) == pytest.approx(4.0, abs=1e-2)


def test_two_boxes_of_a_track_that_are_far_apart_give_no_velocity(tiny_recording: Any) -> None:
    first = int(tiny_recording.key_stamp_ns[0])
    longer = np.arange(first - 500_000_000, first + 5_000_000_000, 100_000_000)
    tiny_recording.trajectory = Trajectory(longer, np.tile(np.eye(4), (len(longer), 1, 1)))
    for away, known in ((1_400_000_000, True), (1_600_000_000, False)):
        boxes = LabelledRecording(tiny_recording, label_frames(tiny_recording, [first, first + away])).annotations(0)
        assert np.isfinite(boxes.boxes.box[0, 7:]).all() == known


def test_returns_in_a_box_are_counted(tiny_recording: Any) -> None:
    stamps = [int(stamp) for stamp in tiny_recording.key_stamp_ns]
    frames = label_frames(tiny_recording, stamps)
    sweep = tiny_recording.sweep
    centre = MovingCar(tiny_recording).at_key(1)[:3, 3]

    def inside(index: int) -> Any:
        found = sweep(index)
        points = transform_points(invert_transform(found.lidar2ego), np.tile(centre, (7, 1)))
        return SimpleNamespace(
            **{**vars(found), "points": points.astype(np.float32), "intensity": None, "time_offset": None}
        )

    tiny_recording.sweep = inside
    assert LabelledRecording(tiny_recording, frames).annotations(1).lidar_points.tolist() == [7]


def test_key_frames_without_labels_are_left_out_and_counted(tiny_recording: Any) -> None:
    near, far = (int(tiny_recording.key_stamp_ns[key]) + gap for key, gap in ((1, 100_000_000), (2, 200_000_000)))
    labelled = LabelledRecording(tiny_recording, label_frames(tiny_recording, [near, far]))
    assert labelled.key_stamp_ns.tolist() == [tiny_recording.key_stamp_ns[1]]
    assert labelled.unlabelled == 3
    assert (
        len(LabelledRecording(tiny_recording, label_frames(tiny_recording, [near, far]), max_gap=0.25).key_stamp_ns)
        == 2
    )
    with pytest.raises(RecordingError, match=r"none of its 4 key frames has labels within 0\.15 s.*--max-gap"):
        LabelledRecording(tiny_recording, label_frames(tiny_recording, [far]))
    frames = [LabelFrame(near, "base_link", (LabelBox("forklift", np.eye(4), (1.0, 1.0, 1.0)),))]
    with pytest.raises(RecordingError, match="forklift 1; --classes"):
        LabelledRecording(tiny_recording, frames)
