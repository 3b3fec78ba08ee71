"""MCAP files of foxglove's protobuf messages, as nuscenes2mcap names them, read like bags of ROS 2."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="bags are read with rosbags")

from occbev.geometry import xyzw_from_rotation
from occbev.messages import foxglove
from occbev.messages.bags import BagMessage, BagReader
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.recording import RecordingError

pytest.importorskip("mcap_protobuf", reason="the optional extra foxglove is not installed")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from mcap_protobuf.writer import Writer

STAMP = "google.protobuf.Timestamp"
MESSAGES = {
    "Vector3": [("x", 1, "double"), ("y", 2, "double"), ("z", 3, "double")],
    "Quaternion": [("x", 1, "double"), ("y", 2, "double"), ("z", 3, "double"), ("w", 4, "double")],
    "Pose": [("position", 1, "Vector3"), ("orientation", 2, "Quaternion")],
    "CompressedImage": [
        ("timestamp", 1, STAMP),
        ("data", 2, "bytes"),
        ("format", 3, "string"),
        ("frame_id", 4, "string"),
    ],
    "CameraCalibration": [
        ("timestamp", 1, STAMP),
        ("width", 2, "fixed32"),
        ("height", 3, "fixed32"),
        ("distortion_model", 4, "string"),
        ("D", 5, "doubles"),
        ("K", 6, "doubles"),
        ("R", 7, "doubles"),
        ("P", 8, "doubles"),
        ("frame_id", 9, "string"),
    ],
    "PackedElementField": [("name", 1, "string"), ("offset", 2, "fixed32"), ("type", 3, "int32")],
    "PointCloud": [
        ("timestamp", 1, STAMP),
        ("frame_id", 2, "string"),
        ("pose", 3, "Pose"),
        ("point_stride", 4, "fixed32"),
        ("fields", 5, "PackedElementFields"),
        ("data", 6, "bytes"),
    ],
    "FrameTransform": [
        ("timestamp", 1, STAMP),
        ("parent_frame_id", 2, "string"),
        ("child_frame_id", 3, "string"),
        ("translation", 4, "Vector3"),
        ("rotation", 5, "Quaternion"),
    ],
    "PoseInFrame": [("timestamp", 1, STAMP), ("frame_id", 2, "string"), ("pose", 3, "Pose")],
    "SceneUpdate": [("note", 1, "string")],
}
"""The messages of the foxglove schemas that a drive needs, with their public field numbers."""


def make_types() -> dict:
    field = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "double": field.TYPE_DOUBLE,
        "bytes": field.TYPE_BYTES,
        "string": field.TYPE_STRING,
        "fixed32": field.TYPE_FIXED32,
        "int32": field.TYPE_INT32,
    }
    file = descriptor_pb2.FileDescriptorProto(
        name="foxglove/all.proto", package="foxglove", syntax="proto3", dependency=["google/protobuf/timestamp.proto"]
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for text, number, kind in fields:
            many = kind.endswith("s") and kind != "bytes"
            kind = kind[:-1] if many else kind
            entry = message.field.add(
                name=text, number=number, label=field.LABEL_REPEATED if many else field.LABEL_OPTIONAL
            )
            if kind in scalars:
                entry.type = scalars[kind]
            else:
                entry.type, entry.type_name = (
                    field.TYPE_MESSAGE,
                    f".{kind if '.' in kind else f'foxglove.{kind}'}",
                )
    from google.protobuf import timestamp_pb2

    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(timestamp_pb2.DESCRIPTOR.serialized_pb))
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"foxglove.{name}")) for name in MESSAGES}


def set_stamp(message, stamp_ns: int):
    message.timestamp.seconds, message.timestamp.nanos = divmod(int(stamp_ns), 10**9)
    return message


def transform(types: dict, stamp_ns: int, parent: str, child: str, matrix: np.ndarray):
    message = types["FrameTransform"](parent_frame_id=parent, child_frame_id=child)
    message.translation.x, message.translation.y, message.translation.z = matrix[:3, 3]
    rotation = xyzw_from_rotation(matrix[:3, :3])
    message.rotation.x, message.rotation.y, message.rotation.z, message.rotation.w = rotation
    return set_stamp(message, stamp_ns)


@pytest.fixture
def mcap(tmp_path: Path, tiny_recording) -> Path:
    """The tiny drive as nuscenes2mcap would write it: calibration repeated, no /tf_static, no point times."""
    types, path = make_types(), tmp_path / "drive.mcap"
    recording = tiny_recording
    with path.open("wb") as stream, Writer(stream, chunk_size=20_000) as writer:

        def write(topic: str, message, stamp_ns: int) -> None:
            writer.write_message(topic, message, int(stamp_ns), int(stamp_ns))

        for stamp, pose in zip(recording.trajectory.stamp_ns, recording.trajectory.ego2global, strict=True):
            write("/tf", transform(types, stamp, "map", "base_link", pose), stamp)
        for key, stamp in enumerate(recording.key_stamp_ns):
            write("/tf", transform(types, stamp, "base_link", "lidar_top", recording.lidar2ego), stamp)
            for name, frame in recording.frame_set(key).frames.items():
                camera, low = recording.rig[name], name.lower()
                write("/tf", transform(types, stamp, "base_link", low, camera.cam2ego), stamp)
                image = types["CompressedImage"](data=frame.image, format="jpeg", frame_id=low)
                write(f"/{low}/image_rect_compressed", set_stamp(image, frame.stamp_ns), stamp)
                projection = np.column_stack([camera.intrinsic, np.zeros(3)])
                info = types["CameraCalibration"](
                    width=64, height=40, K=camera.intrinsic.ravel(), P=projection.ravel(), frame_id=low
                )
                write(f"/{low}/camera_info", set_stamp(info, frame.stamp_ns), stamp)
            # nuscenes2mcap's /pose says where base_link is in base_link, at key frames.
            pose = types["PoseInFrame"](frame_id="base_link")
            pose.pose.orientation.w = 1.0
            write("/pose", set_stamp(pose, stamp), stamp)
            write("/markers/annotations", types["SceneUpdate"](note="boxes"), stamp)
        for index, stamp in enumerate(recording.sweep_stamp_ns):
            sweep = recording.sweep(index)
            values = np.column_stack([sweep.points, sweep.intensity, np.zeros(len(sweep.points))]).astype("<f4")
            cloud = types["PointCloud"](frame_id="lidar_top", point_stride=20, data=values.tobytes())
            for i, name in enumerate(("x", "y", "z", "intensity", "ring")):
                cloud.fields.add(name=name, offset=4 * i, type=7)
            write("/lidar_top", set_stamp(cloud, stamp), stamp)
    return path


def test_a_foxglove_file_is_a_recording(mcap: Path, tiny_recording) -> None:
    read = BagRecording(mcap)
    assert read.topics.profile == "nuscenes2mcap"
    assert read.deskew == "compensated"
    np.testing.assert_array_equal(read.key_stamp_ns, tiny_recording.key_stamp_ns)
    np.testing.assert_array_equal(read.sweep_stamp_ns, tiny_recording.sweep_stamp_ns)
    np.testing.assert_allclose(read.trajectory.ego2global, tiny_recording.trajectory.ego2global, atol=1e-9)
    np.testing.assert_allclose(read.lidar2ego, tiny_recording.lidar2ego, atol=1e-12)
    for camera in tiny_recording.rig.cameras:
        np.testing.assert_allclose(read.rig[camera.name].cam2ego, camera.cam2ego, atol=1e-12)
        np.testing.assert_array_equal(read.rig[camera.name].intrinsic, camera.intrinsic)
    for name, frame in read.frame_set(1).frames.items():
        expected = tiny_recording.frame_set(1).frames[name]
        assert (frame.image, frame.stamp_ns) == (expected.image, expected.stamp_ns)
    sweep, expected = read.sweep(3), tiny_recording.sweep(3)
    np.testing.assert_array_equal(sweep.points, expected.points)
    np.testing.assert_array_equal(sweep.intensity, expected.intensity)
    assert sweep.time_offset is None


def test_a_cut_file_is_read_up_to_the_cut(mcap: Path) -> None:
    mcap.write_bytes(mcap.read_bytes()[: -mcap.stat().st_size // 8])
    read = BagRecording(mcap)
    assert len(read.key_stamp_ns) > 0
    assert "drive.mcap: the file is cut at byte" in read.notes[0]
    assert "mcap recover" in read.notes[0]


def test_damaged_bytes_are_named(mcap: Path) -> None:
    """With its summary whole, a damaged chunk shows only while it is read."""
    with BagReader(mcap) as bag:
        with pytest.raises(RecordingError, match="/lidar_top: no foxglove.PointCloud"):
            bag.decode(BagMessage("/lidar_top", "sensor_msgs/msg/PointCloud2", 0, b"\xff" * 30))
        with pytest.raises(RecordingError, match=r"foxglove.SceneUpdate is not read"):
            bag.decode(next(bag.messages(["/markers/annotations"])))
    mcap.write_bytes(mcap.read_bytes().replace(b"\x28\xb5\x2f\xfd", b"nope"))  # what zstd begins with
    with pytest.raises(RecordingError, match=r"drive.mcap: its chunk at byte \d+: cannot be unpacked"):
        BagRecording(mcap)


def test_without_the_extra_the_remedy_is_named(mcap: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mcap_protobuf.decoder", None)
    monkeypatch.setattr(foxglove, "_DECODERS", {})
    with pytest.raises(RecordingError, match=r"pip install 'occbev-training\[foxglove\]'"):
        BagRecording(mcap)
