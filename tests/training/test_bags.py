"""Bags written from a recording and read back, bags of other makers, and damaged ones."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import yaml
from rosbags.rosbag2 import Writer
from scipy.spatial import cKDTree

from occbev.geometry import invert_transform, make_transform, rotation_from_wxyz, transform_points
from occbev.messages.bags import BagReader
from occbev.messages.topics import BagTopics, LidarSensor, detect_topics, load_topics, topics_record
from occbev_training.sources.bag_check import check_bag
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.bag_writer import TYPESTORE, cloud_message, write_bag
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.deskew import RayLimits, deskew_rays, middle_ns
from occbev_training.sources.recording import RecordingError
from occbev_training.sources.truth import read_truth, write_truth

SHARED = Path(os.environ.get("OCCBEV_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def rewrite(source: Path, target: Path, change) -> Path:
    """Copy a bag message by message; `change(topic, message)` returns the message, or None to drop it."""
    with BagReader(source) as bag, Writer(target, version=8) as writer:
        connections = {}
        for entry in bag.messages():
            topic, log_ns = entry.topic, entry.log_ns
            message = change(topic, bag.decode(entry))
            if message is None:
                continue
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=TYPESTORE)
            writer.write(connections[topic], log_ns, TYPESTORE.serialize_cdr(message, kind))
    return target


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_round_trip(tmp_path: Path, tiny_recording, storage: str) -> None:
    summary = write_bag(tiny_recording, tmp_path / "bag", storage)
    assert summary.messages["/lidar_top/points"] == len(tiny_recording.sweep_stamp_ns)
    assert summary.messages["/odometry"] == len(tiny_recording.trajectory.stamp_ns)
    read = BagRecording(tmp_path / "bag")
    np.testing.assert_array_equal(read.key_stamp_ns, tiny_recording.key_stamp_ns)
    np.testing.assert_array_equal(read.sweep_stamp_ns, tiny_recording.sweep_stamp_ns)
    np.testing.assert_array_equal(read.trajectory.stamp_ns, tiny_recording.trajectory.stamp_ns)
    np.testing.assert_allclose(read.trajectory.ego2global, tiny_recording.trajectory.ego2global, atol=1e-12)
    np.testing.assert_allclose(read.lidar2ego, tiny_recording.lidar2ego, atol=1e-12)
    assert read.rig.names == tiny_recording.rig.names
    for camera in tiny_recording.rig.cameras:
        np.testing.assert_allclose(read.rig[camera.name].cam2ego, camera.cam2ego, atol=1e-12)
        np.testing.assert_array_equal(read.rig[camera.name].intrinsic, camera.intrinsic)
    for key in range(tiny_recording.keys):
        expected = tiny_recording.frame_set(key).frames
        for name, frame in read.frame_set(key).frames.items():
            assert frame.image == expected[name].image
            assert frame.stamp_ns == expected[name].stamp_ns
            np.testing.assert_allclose(frame.ego2global, expected[name].ego2global, atol=1e-9)
    for index in (0, 7):
        sweep, expected = read.sweep(index), tiny_recording.sweep(index)
        np.testing.assert_array_equal(sweep.points, expected.points)
        np.testing.assert_array_equal(sweep.time_offset, expected.time_offset)
        np.testing.assert_array_equal(sweep.intensity, expected.intensity)


def test_messages_are_logged_in_stamp_order(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    with BagReader(tmp_path / "bag") as bag:
        logged = [(entry.log_ns, entry.topic, bag.decode(entry)) for entry in bag.messages()]
    assert [entry[0] for entry in logged] == sorted(entry[0] for entry in logged)
    for log_ns, topic, message in logged:
        header = message.transforms[0].header if topic.startswith("/tf") else message.header
        if topic != "/tf_static":
            assert header.stamp.sec * 10**9 + header.stamp.nanosec == log_ns, topic
    assert logged[0][1] == "/tf_static"


def test_a_missing_camera_is_counted_and_reported(tmp_path: Path, make_recording) -> None:
    class OneCameraSilent(make_recording):
        def frame_set(self, key: int):
            frame_set = super().frame_set(key)
            if key in (1, 2):
                frame_set.frames["CAM_BACK"] = None
                frame_set.missing["CAM_BACK"] = "silent"
            return frame_set

    summary = write_bag(OneCameraSilent(), tmp_path / "bag")
    assert summary.missing == {"CAM_BACK": 2}
    read = BagRecording(tmp_path / "bag")
    assert [len(read.frame_set(key).cameras) for key in range(4)] == [3, 2, 2, 3]
    assert "/cam_back/image/compressed" in read.frame_set(1).missing["CAM_BACK"]


def test_an_existing_bag_is_never_overwritten(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    with pytest.raises(RecordingError, match="never overwritten"):
        write_bag(tiny_recording, tmp_path / "bag")


def test_a_failed_write_leaves_nothing(tmp_path: Path, make_recording) -> None:
    class Broken(make_recording):
        def sweep(self, index: int):
            if index == 5:
                raise OSError("disk gone")
            return super().sweep(index)

    with pytest.raises(OSError, match="disk gone"):
        write_bag(Broken(), tmp_path / "bag")
    assert list(tmp_path.iterdir()) == []


def test_fewer_messages_than_promised_is_an_error(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    path = tmp_path / "bag" / "metadata.yaml"
    record = yaml.safe_load(path.read_text())
    for entry in record["rosbag2_bagfile_information"]["topics_with_message_count"]:
        if entry["topic_metadata"]["name"] == "/lidar_top/points":
            entry["message_count"] += 1
    path.write_text(yaml.safe_dump(record))
    with pytest.raises(RecordingError, match="/lidar_top/points: .*promises 23 messages but 22 were read"):
        BagRecording(tmp_path / "bag")


@pytest.mark.parametrize("cut", ["metadata", "header"])
def test_damaged_files_are_named(tmp_path: Path, tiny_recording, cut: str) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    if cut == "metadata":
        (tmp_path / "bag" / "metadata.yaml").write_text("rosbag2_bagfile_information: 3")
        message = "not the metadata"
    else:
        next((tmp_path / "bag").glob("*.mcap")).write_bytes(b"no bag at all")
        message = "no readable ROS 2 bag"
    with pytest.raises(RecordingError, match=message):
        BagRecording(tmp_path / "bag")


def test_a_bag_without_cameras_lists_its_topics(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    lidar_only = rewrite(tmp_path / "bag", tmp_path / "lidar", lambda t, m: None if "cam_" in t else m)
    with pytest.raises(RecordingError, match=r"/odometry \[nav_msgs/msg/Odometry\]"):
        BagRecording(lidar_only)


def test_a_wrong_mapping_names_the_topic(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    topics = BagTopics({"CAM_FRONT": "/nothing"}, {"CAM_FRONT": "/cam_front/camera_info"})
    with pytest.raises(RecordingError, match="/nothing"):
        BagRecording(tmp_path / "bag", BagOptions(topics))


def test_a_missing_transform_is_named(tmp_path: Path, tiny_recording) -> None:
    def forget(topic: str, message):
        if topic == "/tf_static":
            message.transforms = [t for t in message.transforms if t.child_frame_id != "cam_back"]
        return message

    write_bag(tiny_recording, tmp_path / "bag")
    read = BagRecording(rewrite(tmp_path / "bag", tmp_path / "untied", forget))
    assert read.rig.names == tuple(n for n in tiny_recording.rig.names if n != "CAM_BACK"), "the others are kept"
    assert "/cam_back/camera_info: no transform from 'cam_back'" in read.left_out["CAM_BACK"]
    assert any("camera left out" in reason and count == 4 for reason, count in read.skipped.items())


def test_a_camera_that_moves_on_the_vehicle_is_placed_at_its_exposures(tmp_path: Path, tiny_recording) -> None:
    begin = int(tiny_recording.key_stamp_ns[0])

    def height(stamp_ns: int) -> float:
        return 1.0 + (stamp_ns - begin) / 1e9

    write_bag(tiny_recording, tmp_path / "bag")
    mount = []

    def lift(topic: str, message):
        if topic == "/tf_static":
            mount.extend(t for t in message.transforms if t.child_frame_id == "cam_back")
            message.transforms = [t for t in message.transforms if t.child_frame_id != "cam_back"]
        elif topic == "/tf":
            moved, stamp = copy.deepcopy(mount[0]), message.transforms[0].header.stamp
            moved.header.stamp, moved.transform.translation.z = stamp, height(stamp.sec * 10**9 + stamp.nanosec)
            message.transforms = [*message.transforms, moved]
        return message

    read = BagRecording(rewrite(tmp_path / "bag", tmp_path / "lift", lift))
    for key in range(len(read.key_stamp_ns)):
        frames = read.frame_set(key).frames
        back, front = frames["CAM_BACK"], frames["CAM_FRONT"]
        cam2ego = tiny_recording.rig["CAM_BACK"].cam2ego.copy()
        cam2ego[2, 3] = height(back.stamp_ns)
        cam2global = back.ego2global @ read.rig["CAM_BACK"].cam2ego
        np.testing.assert_allclose(cam2global, read.trajectory.at(back.stamp_ns) @ cam2ego, atol=1e-6)
        np.testing.assert_array_equal(front.ego2global, read.trajectory.at(front.stamp_ns))


def test_poses_come_from_tf_where_odometry_is_absent(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    without = rewrite(tmp_path / "bag", tmp_path / "tf", lambda t, m: None if t == "/odometry" else m)
    read = BagRecording(without)
    np.testing.assert_allclose(read.trajectory.ego2global, tiny_recording.trajectory.ego2global, atol=1e-12)
    neither = rewrite(tmp_path / "bag", tmp_path / "none", lambda t, m: None if t in ("/odometry", "/tf") else m)
    with pytest.raises(RecordingError, match="no poses"):
        BagRecording(neither)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8", "16UC1"])
def test_raw_images_by_an_explicit_mapping(tmp_path: Path, tiny_recording, encoding: str) -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)

    def raw(topic: str, message):
        if topic != "/cam_front/image/compressed":
            return message
        pixels = {"bgr8": image[..., ::-1], "mono8": image[..., :1]}.get(encoding, image)
        rows = np.zeros((40, pixels.shape[2] * 64 + 8), np.uint8)  # padded rows
        rows[:, :-8] = pixels.reshape(40, -1)
        return TYPESTORE.types["sensor_msgs/msg/Image"](
            message.header, 40, 64, encoding, 0, rows.shape[1], rows.reshape(-1)
        )

    write_bag(tiny_recording, tmp_path / "bag")
    topics = BagTopics(
        {"front": "/cam_front/image/compressed"},
        {"front": "/cam_front/camera_info"},
        "/lidar_top/points",
        "/odometry",
    )
    bag = rewrite(tmp_path / "bag", tmp_path / "raw", raw)
    if encoding == "16UC1":
        with pytest.raises(RecordingError, match=r"no camera can be used; front: .*encoding '16UC1'"):
            BagRecording(bag, BagOptions(topics))
        return
    read = BagRecording(bag, BagOptions(topics))
    got = read.frame_set(0).frames["front"].image
    np.testing.assert_array_equal(got, image if encoding != "mono8" else image[..., [0, 0, 0]])


def test_keys_keep_their_least_distance(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    read = BagRecording(tmp_path / "bag", BagOptions(key_interval=0.9))
    np.testing.assert_array_equal(read.key_stamp_ns, tiny_recording.key_stamp_ns[::2])


def test_detection_of_other_naming_schemes() -> None:
    image, info = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/CameraInfo"
    cloud = "sensor_msgs/msg/PointCloud2"
    found = detect_topics(
        {
            "/sensing/camera/camera0/image_rect_color/compressed": image,
            "/sensing/camera/camera0/image_rect_color": "sensor_msgs/msg/Image",
            "/sensing/camera/camera0/camera_info": info,
            "/perception/voxels": cloud,
            "/sensing/lidar/top/points": cloud,
            "/localization/kinematic_state": "nav_msgs/msg/Odometry",
        }
    )
    assert found.images == {"camera0": "/sensing/camera/camera0/image_rect_color/compressed"}
    assert found.lidar == "/sensing/lidar/top/points"
    assert found.odometry == "/localization/kinematic_state"
    with pytest.raises(RecordingError, match="several topics"):
        detect_topics({"/c/image/compressed": image, "/c/camera_info": info, "/a": cloud, "/b": cloud})


@pytest.mark.parametrize("kind", ["seconds", "absolute", "nanoseconds"])
def test_time_fields_of_drivers(tmp_path: Path, tiny_recording, kind: str) -> None:
    expected = tiny_recording.sweep(4)
    assert expected.time_offset is not None

    def retime(topic: str, message):
        if topic != "/lidar_top/points":
            return message
        start = message.header.stamp.sec + message.header.stamp.nanosec / 1e9
        cloud = np.asarray(message.data).view("<f4").reshape(-1, 5)
        dtype = {"seconds": "<f4", "absolute": "<f8", "nanoseconds": "<u4"}[kind]
        layout = np.dtype([(n, "<f4") for n in "xyz"] + [("pad", "<u4"), ("t", dtype)])
        rows = np.zeros(len(cloud), layout)
        for i, axis in enumerate("xyz"):
            rows[axis] = cloud[:, i]
        offset = np.abs(cloud[:, 4]).astype(np.float64)
        rows["t"] = {"seconds": offset, "absolute": start + offset, "nanoseconds": offset * 1e9}[kind]
        field = TYPESTORE.types["sensor_msgs/msg/PointField"]
        number = {"seconds": 7, "absolute": 8, "nanoseconds": 6}[kind]
        name = "timestamp" if kind == "absolute" else "t"
        message.fields = [field(a, 4 * i, 7, 1) for i, a in enumerate("xyz")]
        message.fields.append(field(name, 16, number, 1))
        message.point_step, message.row_step = layout.itemsize, layout.itemsize * len(rows)
        message.data = rows.view(np.uint8).reshape(-1)
        return message

    write_bag(tiny_recording, tmp_path / "bag")
    read = BagRecording(rewrite(tmp_path / "bag", tmp_path / "timed", retime))
    sweep = read.sweep(4)
    np.testing.assert_array_equal(sweep.points, expected.points)
    np.testing.assert_allclose(sweep.time_offset, np.abs(expected.time_offset), atol=1e-6)
    assert sweep.intensity is None


def test_a_cut_cloud_is_an_error(tmp_path: Path, tiny_recording) -> None:
    def cut(topic: str, message):
        if topic == "/lidar_top/points":
            message.data = message.data[:-7]
        return message

    write_bag(tiny_recording, tmp_path / "bag")
    with pytest.raises(RecordingError, match="/lidar_top/points: 9993 bytes"):
        BagRecording(rewrite(tmp_path / "bag", tmp_path / "cut", cut))


def test_a_cloud_without_time_has_no_time_field(tiny_recording) -> None:
    sweep = tiny_recording.sweep(0)
    assert [f.name for f in cloud_message(sweep).fields][-1] == "time"
    compensated = type(sweep)(sweep.points, sweep.stamp_ns, sweep.lidar2ego)
    assert [f.name for f in cloud_message(compensated).fields] == ["x", "y", "z", "intensity"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {SHARED} is not there")
@pytest.mark.parametrize("folder", ["mcap", "sqlite3"])
def test_a_bag_of_ros_itself_is_read_whole(folder: str, tmp_path: Path) -> None:
    source = SHARED / "rosbag2-talker" / folder
    copy = tmp_path / folder  # a write-ahead log is made beside a .db3 that is opened
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with BagReader(copy) as bag:
        read = [(entry.topic, bag.decode(entry)) for entry in bag.messages()]
        assert Counter(topic for topic, _ in read) == +Counter(bag.promised) == {"/topic": 10, "/rosout": 10}
        assert [m.data for t, m in read if t == "/topic"] == [f"Hello, world! {i}" for i in range(10)]
    with pytest.raises(RecordingError, match="no image topic"):
        BagRecording(copy)


def test_truth_round_trip(tmp_path: Path, tiny_recording) -> None:
    write_truth(tiny_recording, tmp_path / "truth")
    truth = read_truth(tmp_path / "truth")
    assert truth.name == tiny_recording.name
    np.testing.assert_array_equal(truth.key_stamp_ns, tiny_recording.key_stamp_ns)
    np.testing.assert_array_equal(truth.trajectory.ego2global, tiny_recording.trajectory.ego2global)
    assert truth.rig.names == tiny_recording.rig.names
    for key in range(tiny_recording.keys):
        expected, got = tiny_recording.annotations(key), truth.annotations(key)
        np.testing.assert_array_equal(got.boxes.box, expected.boxes.box)
        np.testing.assert_array_equal(got.boxes.label, expected.boxes.label)
        np.testing.assert_array_equal(got.lidar_points, expected.lidar_points)
        assert got.instance == expected.instance
        dense, expected_dense = truth.occupancy_truth(key), tiny_recording.occupancy_truth(key)
        np.testing.assert_array_equal(dense.semantics, expected_dense.semantics)
        np.testing.assert_array_equal(dense.mask_camera, expected_dense.mask_camera)
        np.testing.assert_array_equal(dense.mask_lidar, expected_dense.mask_lidar)
        assert dense.grid == expected_dense.grid
    stamp = int(truth.key_stamp_ns[2])
    assert truth.nearest_key(stamp + 40_000_000) == 2
    assert truth.nearest_key(stamp + 70_000_000) is None


def test_unknown_velocity_survives_the_truth_folder(tmp_path: Path, make_recording) -> None:
    class Unknown(make_recording):
        def annotations(self, key: int):
            annotations = super().annotations(key)
            annotations.boxes.box[1, 7:] = np.nan
            return annotations

    write_truth(Unknown(), tmp_path / "truth")
    box = read_truth(tmp_path / "truth").annotations(0).boxes.box
    assert np.isnan(box[1, 7:]).all()
    assert np.isfinite(box[0]).all()


def test_a_folder_that_is_no_truth_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=str(tmp_path)):
        read_truth(tmp_path)


def in_base_link(recording, fields: dict[str, object]):
    """Change a bag's clouds into those of a driver that moves them into base_link, with further fields."""

    def change(topic: str, message):
        if topic != "/lidar_top/points":
            return message
        cloud = np.asarray(message.data).view("<f4").reshape(-1, 5)
        layout = [(n, "<f4") for n in ("x", "y", "z", "intensity", "time")] + [(n, "<u2") for n in fields]
        rows = np.zeros(len(cloud), layout)
        points = transform_points(recording.lidar2ego, cloud[:, :3])
        for i, axis in enumerate("xyz"):
            rows[axis] = points[:, i]
        rows["time"] = cloud[:, 4]
        for name, make in fields.items():
            rows[name] = make(len(rows))
        message.header.frame_id = "base_link"
        field = TYPESTORE.types["sensor_msgs/msg/PointField"]
        message.fields = [field(n, rows.dtype.fields[n][1], 7 if k == "<f4" else 4, 1) for n, k in layout]
        message.point_step, message.row_step = rows.itemsize, rows.itemsize * len(rows)
        message.data = rows.view(np.uint8).reshape(-1)
        return message

    return change


def test_clouds_in_the_frame_of_the_vehicle_need_the_place_of_their_sensor(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    moved = rewrite(tmp_path / "bag", tmp_path / "moved", in_base_link(tiny_recording, {}))
    with pytest.raises(
        RecordingError, match=r"/lidar_top/points: its clouds are in 'base_link' itself.*--lidar-origin"
    ):
        BagRecording(moved)
    place = tiny_recording.lidar2ego[:3, 3]
    read = BagRecording(moved, BagOptions(lidar_origin=tuple(place.tolist())))
    np.testing.assert_allclose(read.lidar2ego[:3, 3], place)
    for index in (0, 5):
        ours, plain = (
            deskew_rays(r.sweep(index), r.trajectory, int(r.key_stamp_ns[1])) for r in (read, tiny_recording)
        )
        np.testing.assert_allclose(ours.end, plain.end, atol=1e-4)
        np.testing.assert_allclose(ours.origin, plain.origin, atol=1e-6)


def two_lidars(source: Path, target: Path, late_ns: int, cut: bool = False) -> Path:
    """Divide the points of a bag's LiDAR among two topics: the second LiDAR stands elsewhere and publishes later.

    cut: the second has one cloud less, and one that is damaged.
    """
    place = make_transform(rotation_from_wxyz((0.8, 0, 0, 0.6)), (-1.0, 0.5, 1.2))
    number = count(0)
    with BagReader(source) as bag, Writer(target, version=8) as writer:
        known: dict[str, object] = {}

        def write(topic: str, log_ns: int, message) -> None:
            kind = message.__msgtype__
            if topic not in known:
                known[topic] = writer.add_connection(topic, kind, typestore=TYPESTORE)
            writer.write(known[topic], log_ns, TYPESTORE.serialize_cdr(message, kind))

        lidar2ego = BagRecording(source).lidar2ego
        for entry in bag.messages():
            message = bag.decode(entry)
            if entry.topic == "/tf_static":
                row = copy.deepcopy(message.transforms[-1])
                row.header.frame_id, row.child_frame_id = "base_link", "lidar_left"
                for axis, value in zip("xyz", place[:3, 3], strict=True):
                    setattr(row.transform.translation, axis, float(value))
                for axis, value in zip("xyzw", (0.0, 0.0, 0.6, 0.8), strict=True):
                    setattr(row.transform.rotation, axis, value)
                message.transforms.append(row)
            if entry.topic != "/lidar_top/points":
                write(entry.topic, entry.log_ns, message)
                continue
            rows = np.asarray(message.data).view("<f4").reshape(-1, 5)
            data = rows[::2].copy(), rows[1::2].copy()
            moved = invert_transform(place) @ lidar2ego
            data[1][:, :3] = transform_points(moved, data[1][:, :3])
            data[1][:, 4] -= late_ns / 1e9
            stamp, index = entry.log_ns, next(number)
            for topic, part, late in zip(("/top/points", "/left/points"), data, (0, late_ns), strict=True):
                if cut and topic == "/left/points" and index == 3:
                    continue
                message.width, message.row_step = len(part), len(part) * 20
                message.data = part.view(np.uint8).reshape(-1)[: -7 if cut and late and index == 4 else None]
                nanoseconds = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec + late
                message.header.stamp.sec, message.header.stamp.nanosec = divmod(nanoseconds, 10**9)
                message.header.frame_id = "lidar_left" if late else message.header.frame_id
                write(topic, stamp + late, message)
    return target


def test_several_lidars_are_one_sweep_whose_beams_begin_at_each(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    both = two_lidars(tmp_path / "bag", tmp_path / "both", 30_000_000)
    with pytest.raises(
        RecordingError, match=r"several topics .*\['/left/points', '/top/points'\]; name one, or all of"
    ):
        BagRecording(both)
    record = topics_record(detect_topics({t: k for t, k in BagReader(both).topics.items() if t != "/left/points"}))
    (tmp_path / "topics.yaml").write_text(yaml.safe_dump(record | {"lidar": ["/top/points", "/left/points"]}))
    topics = load_topics(tmp_path / "topics.yaml")
    assert topics_record(topics)["lidar"] == ["/top/points", "/left/points"]
    read = BagRecording(both, BagOptions(topics))
    np.testing.assert_array_equal(read.key_stamp_ns, tiny_recording.key_stamp_ns)
    for index in (2, 7):
        stamp, limits = int(read.sweep_stamp_ns[index]), RayLimits(min_range=0.0)
        rays, plain = (deskew_rays(r.sweep(index), r.trajectory, stamp, limits=limits) for r in (read, tiny_recording))
        assert len(rays) == len(plain)
        assert middle_ns(read.sweep(index)) == pytest.approx(middle_ns(tiny_recording.sweep(index)), abs=2e6)
        apart = cKDTree(plain.end).query(rays.end)[0]
        assert apart.max() < 2e-3, "each point where it was, by its own time"
        left = np.abs(rays.origin - (-1.0, 0.5, 1.2)).max(axis=1) < 1.0
        top = np.abs(rays.origin - tiny_recording.lidar2ego[:3, 3]).max(axis=1) < 1.0
        assert (left ^ top).all()
        assert left.mean() == pytest.approx(0.5, abs=0.01)
    found = {verdict.requirement: verdict for verdict in check_bag(both, BagOptions(topics))}
    assert {"clock of /left/points", "turns seen on /left/points", "turns seen on /top/points"} <= set(found)


def test_a_cloud_of_another_lidar_that_is_lost_costs_no_sweep(tmp_path: Path, tiny_recording, caplog) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    both = two_lidars(tmp_path / "bag", tmp_path / "both", 50_000_000, cut=True)
    topics = detect_topics({t: k for t, k in BagReader(both).topics.items() if t != "/left/points"})
    read = BagRecording(both, BagOptions(dataclasses.replace(topics, other_lidars=("/left/points",))))
    shares = [read.sweep(i).sensor.mean() for i in range(7)]
    assert np.round(shares, 1).tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5]
    assert "sweep 4 is read without a cloud of /left/points: /left/points: " in caplog.text


def test_each_sensor_of_a_merged_cloud_has_its_place(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "bag")
    rings = {"ring": lambda count: np.arange(count) % 4}
    merged = rewrite(tmp_path / "bag", tmp_path / "merged", in_base_link(tiny_recording, rings))
    topics = detect_topics(BagReader(merged).topics)
    sensors = (LidarSensor(0, 1, "lidar_top"), LidarSensor(2, 3, (0.0, 1.0, 0.5)))
    read = BagRecording(merged, BagOptions(dataclasses.replace(topics, lidar_field="ring", sensors=sensors)))
    stamp, limits = int(read.sweep_stamp_ns[5]), RayLimits(min_range=0.0)
    rays, plain = (deskew_rays(r.sweep(5), r.trajectory, stamp, limits=limits) for r in (read, tiny_recording))
    assert len(rays) == len(plain)
    first = np.abs(rays.origin - tiny_recording.lidar2ego[:3, 3]).max(axis=1) < 2.0
    second = np.abs(rays.origin - (0.0, 1.0, 0.5)).max(axis=1) < 2.0
    assert (first | second).all()
    assert np.ptp(rays.origin[:, 2]) == pytest.approx(abs(tiny_recording.lidar2ego[2, 3] - 0.5), abs=0.02)
    order = [np.lexsort(np.round(ends.T, 3)) for ends in (rays.end, plain.end)]
    np.testing.assert_allclose(rays.end[order[0]], plain.end[order[1]], atol=2e-3)
    fewer = dataclasses.replace(topics, lidar_field="ring", sensors=sensors[:1])
    with pytest.raises(RecordingError, match="points have ring 2 to 3, which belongs to no sensor"):
        BagRecording(merged, BagOptions(fewer)).sweep(0)
