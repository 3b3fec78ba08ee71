"""Faults of bags: clocks that jump, stamps that repeat, broken points and images, transforms that conflict.

Each is refused, or left out with its reason and count; none passes silently.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="bags are read with rosbags")

from tests.training.test_bags import rewrite

from occbev.geometry import make_transform, rotation_from_rpy
from occbev.messages.bags import BagMessage, BagReader
from occbev_training.sources import bag_index
from occbev_training.sources.bag_check import check_bag, refuse_bad_clocks
from occbev_training.sources.bag_index import BagOptions, usable_stamps
from occbev_training.sources.bag_writer import TYPESTORE, write_bag
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.clocks import ClockCorrection, ClockOffset
from occbev_training.sources.discovery import OpenBag
from occbev_training.sources.recording import RecordingError

LIDAR = "/lidar_top/points"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    from tests.training.conftest import TinyRecording

    path = tmp_path_factory.mktemp("good") / "drive"
    write_bag(TinyRecording(keys=6), path)
    return path


def stamp_of(message) -> int:
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def restamp(message, stamp_ns: int):
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(int(stamp_ns), 10**9)
    return message


def headed(message) -> list:
    """Every header of a message."""
    return message.transforms if hasattr(message, "transforms") else [message]


def test_stamps_are_sorted_out() -> None:
    keep, jumps, reasons = usable_stamps([5, 6, 6, 0, 8, 7, 9, 10, 3, 4, 5])
    assert keep == [0, 1, 5, 4, 6, 7, 8, 9, 10]
    assert jumps == [8]
    assert reasons == {"zero stamp": 1, "repeated stamp": 1}
    assert usable_stamps([]) == ([], [], {"zero stamp": 0, "repeated stamp": 0})


def test_messages_that_come_late_are_no_jump_of_the_clock() -> None:
    period, start = 100_000_000, 10**18
    order = [0, 1, 5, 6, 2, 3, 4, 7, 8, 9, 10, 11, 12]  # three come late, one after the other
    stamps = [start + i * period for i in order]
    log = [start + max(order[: n + 1]) * period + n for n in range(len(order))]
    keep, jumps, _ = usable_stamps(stamps, log)
    assert [order[i] for i in keep] == sorted(order)
    assert jumps == []
    back = [start + i * period - (250_000_000 if i >= 7 else 0) for i in range(14)]  # as when NTP sets a clock
    keep, jumps, _ = usable_stamps(back, [start + i * period for i in range(14)])
    assert (keep, jumps) == (list(range(14)), [7])


def test_repeated_and_zero_stamps_are_left_out_and_counted(good: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def repeat(topic: str, message):
        if topic == LIDAR:
            seen.append(stamp_of(message))
            if len(seen) in (5, 9):
                restamp(message, seen[-2] if len(seen) == 5 else 0)
        return message

    read = BagRecording(rewrite(good, tmp_path / "drive", repeat))
    assert read.skipped == {f"{LIDAR}: repeated stamp": 1, f"{LIDAR}: zero stamp": 1}
    assert len(read.sweep_stamp_ns) == len(seen) - 2
    assert np.all(np.diff(read.sweep_stamp_ns) > 0)
    assert read.parts == 1


def test_a_clock_that_jumps_back_begins_another_drive(good: Path, tmp_path: Path) -> None:
    whole = BagRecording(good)
    cut = int(whole.key_stamp_ns[3]) - 100_000_000

    def jump(topic: str, message):
        for part in headed(message):
            if stamp_of(part) > cut:
                restamp(part, stamp_of(part) - 1_300_000_000)
        return message

    path = rewrite(good, tmp_path / "drive", jump)
    parts = [BagRecording(path, BagOptions(part=i)) for i in range(2)]
    assert [part.parts for part in parts] == [2, 2]
    counts = [len(part.key_stamp_ns) for part in parts]
    assert counts == [3, 2], "the key frame at the jump belongs to neither"
    for part in parts:
        assert np.all(np.diff(part.sweep_stamp_ns) > 0)
    apart = parts[1].trajectory.at(int(parts[1].key_stamp_ns[0]))[:3, 3]
    wanted = whole.trajectory.at(int(whole.key_stamp_ns[4]))[:3, 3]
    np.testing.assert_allclose(apart, wanted, atol=1e-6)
    names = [opener.name for opener in OpenBag(path).parts()]
    assert names == ["drive", "drive-part1"], "all clocks jump alike"
    with pytest.raises(RecordingError, match="no part 2, it has 2"):
        BagRecording(path, BagOptions(part=2))


def test_clocks_are_corrected_part_by_part(good: Path, tmp_path: Path, monkeypatch) -> None:
    """After a jump a clock is off by something else."""
    from occbev_training.sources import bag_check

    cut = int(BagRecording(good).key_stamp_ns[3]) - 100_000_000

    def jump(topic: str, message):
        for part in headed(message):
            late = 7_200_000_000_000 if topic == LIDAR else 0
            if stamp_of(part) > cut:
                late = 3_600_000_000_000 if topic == LIDAR else 1_300_000_000
            restamp(part, stamp_of(part) - late)
        return message

    monkeypatch.setattr(bag_check, "measure_clocks", lambda recording: {LIDAR: ClockOffset(0.0)})
    opener = OpenBag(rewrite(good, tmp_path / "drive", jump), check_clocks="fix")
    moved = [part.checked().options.clock[LIDAR].offset_ns / 1e9 for part in opener.parts()]
    np.testing.assert_allclose(moved, [7200.0, 3598.7], atol=0.06)


def test_a_first_part_without_cameras_does_not_hide_the_others(good: Path, tmp_path: Path) -> None:
    first: list[object] = []

    def ahead(topic: str, message):
        if topic == LIDAR and not first:
            first.append(restamp(message, stamp_of(message) + 3_600_000_000_000))
        return message

    path = rewrite(good, tmp_path / "drive", ahead)
    empty, rest = OpenBag(path, check_clocks="ignore").parts()
    assert rest.keys() == len(BagRecording(good).key_stamp_ns)
    with pytest.raises(RecordingError, match="no CameraInfo"):
        empty.keys()


def test_a_bag_is_read_once_for_its_clocks_its_parts_and_its_keys(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    read = bag_index._read
    monkeypatch.setattr(bag_index, "_read", lambda bag, t: reads.append(bag.path) or read(bag, t))
    path = rewrite(good, tmp_path / "drive", lambda topic, message: message)
    (part,) = OpenBag(path).parts()
    assert part.checked().keys() == len(part().key_stamp_ns)
    assert reads == [path]
    shutil.rmtree(path)
    rewrite(good, path, lambda topic, message: message)
    assert len(BagRecording(path).key_stamp_ns) == part.keys()
    assert reads == [path, path], "another bag in its place is read anew"


def test_a_new_calibration_begins_another_drive(good: Path, tmp_path: Path) -> None:
    middle = int(BagRecording(good).key_stamp_ns[3]) - 200_000_000

    def recalibrate(topic: str, message):
        if topic == "/cam_front/camera_info" and stamp_of(message) > middle:
            message.k, message.p = message.k.copy(), message.p.copy()
            message.k[0] = message.p[0] = 66.0
        return message

    path = rewrite(good, tmp_path / "drive", recalibrate)
    focal = []
    for part in range(2):
        read = BagRecording(path, BagOptions(part=part))
        focal.append([camera.intrinsic[0, 0] for camera in read.rig.cameras])
        assert len(read.key_stamp_ns) == 3
    assert focal[0] == [60.0, 60.0, 60.0]
    assert focal[1] == [60.0, 66.0, 60.0]


def test_a_region_of_interest_that_moves_begins_another_drive(good: Path, tmp_path: Path) -> None:
    middle = int(BagRecording(good).key_stamp_ns[3]) - 200_000_000

    def move(topic: str, message):
        if topic == "/cam_front/camera_info" and stamp_of(message) > middle:
            message.roi.x_offset, message.roi.width, message.roi.height = 10, message.width, message.height
        return message

    path = rewrite(good, tmp_path / "drive", move)
    centres = [BagRecording(path, BagOptions(part=part)).rig["CAM_FRONT"].intrinsic[0, 2] for part in range(2)]
    assert centres[0] - centres[1] == 10


def test_what_a_driver_sends_before_its_calibration_is_left_out(good: Path, tmp_path: Path) -> None:
    start = int(BagRecording(good).key_stamp_ns[2]) - 200_000_000

    def wait(topic: str, message):
        if topic == "/cam_front/camera_info" and stamp_of(message) < start:
            message.k, message.p = np.zeros(9), np.zeros(12)
        return message

    read = BagRecording(rewrite(good, tmp_path / "drive", wait))
    assert (read.parts, read.left_out, len(read.key_stamp_ns)) == (1, {}, 6)
    assert read.skipped["/cam_front/camera_info: not calibrated"] > 0
    assert read.rig["CAM_FRONT"].intrinsic[0, 0] == 60.0


def test_a_calibration_that_never_rests_is_refused_but_for_a_rig_file(good: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def zoom(topic: str, message):
        if topic == "/cam_front/camera_info":
            seen.append(1)
            message.k, message.p = message.k.copy(), message.p.copy()
            message.k[0] = message.p[0] = 60.0 + len(seen) % 2
        return message

    path = rewrite(good, tmp_path / "drive", zoom)
    with pytest.raises(RecordingError, match=r"/cam_front/camera_info: the calibration changes 5 times: .* --rig"):
        BagRecording(path)
    read = BagRecording(path, BagOptions(rig=BagRecording(good).rig))
    assert (read.parts, len(read.key_stamp_ns)) == (1, 6)


def test_an_image_of_another_encoding_than_the_others_is_missing(good: Path, tmp_path: Path) -> None:
    number = iter(range(100))

    def change(topic: str, message):
        if topic != "/cam_back/image/compressed":
            return message
        kind = "mono16" if next(number) == 1 else "rgb8"
        return TYPESTORE.types["sensor_msgs/msg/Image"](message.header, 40, 64, kind, 0, 192, np.zeros(7680, np.uint8))

    read = BagRecording(rewrite(good, tmp_path / "drive", change))
    assert [len(read.frame_set(key).cameras) for key in range(3)] == [3, 2, 3]
    assert "encoding 'mono16' is not understood" in read.frame_set(1).missing["CAM_BACK"]


def test_points_that_are_not_finite_are_counted(good: Path, tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the label kernels need numba: training environment")
    from occbev_training.occupancy.labels import LabelBuilder

    def spoil(topic: str, message):
        if topic == LIDAR:
            values = np.array(message.data).view("<f4").reshape(-1, 5)
            values[:7, 0] = np.nan
            values[7:10, 2] = np.inf
            values[10:12, 4] = np.nan
            message.data = values.view(np.uint8).reshape(-1)
        return message

    read = BagRecording(rewrite(good, tmp_path / "drive", spoil))
    stats = LabelBuilder(read).build(2).stats
    assert stats["points_not_finite"] == 12 * stats["sweeps"]


def test_sweeps_that_cannot_be_read_are_counted(good: Path, tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the label kernels need numba: training environment")
    from occbev_training.occupancy.labels import LabelBuilder

    number = iter(range(1000))

    def cut(topic: str, message):
        if topic == LIDAR and next(number) % 4 == 1:
            message.data = message.data[:-7]
        return message

    read = BagRecording(rewrite(good, tmp_path / "drive", cut))
    stats = LabelBuilder(read).build(2).stats
    assert stats["sweeps_unreadable"] == 5
    assert stats["sweeps"] == 16


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: len(data) // 2], "cut off after"),
        (lambda data: np.append(data[:2], data[50:]), "no|pixels|neither|only JPEG and PNG"),
        (lambda data: data[:0], "only JPEG and PNG"),
    ],
)
def test_a_broken_image_is_a_missing_camera(good: Path, tmp_path: Path, spoil, reason: str) -> None:
    def broken(topic: str, message):
        if topic == "/cam_back/image/compressed":
            message.data = spoil(message.data)
        return message

    frames = BagRecording(rewrite(good, tmp_path / "drive", broken)).frame_set(1)
    assert frames.cameras == ("CAM_FRONT_LEFT", "CAM_FRONT")
    import re

    assert re.search(rf"broken image: .*({reason})", frames.missing["CAM_BACK"])


def test_an_image_of_another_size_than_its_calibration_is_missing(good: Path, tmp_path: Path) -> None:
    def resize(topic: str, message):
        if topic == "/cam_back/camera_info":
            message.width = 128
        return message

    frames = BagRecording(rewrite(good, tmp_path / "drive", resize)).frame_set(1)
    assert frames.missing["CAM_BACK"] == "broken image: 64x40 pixels, the calibration is for 128x40"


def test_publishers_of_a_transform_must_agree(good: Path, tmp_path: Path) -> None:
    def twice(shift: float):
        def change(topic: str, message):
            if topic == "/tf_static":
                other = copy.deepcopy(message.transforms[0])
                other.transform.translation.x += shift
                message.transforms.append(other)
            return message

        return change

    near = BagRecording(rewrite(good, tmp_path / "near", twice(0.005)))
    assert near.rig.names == ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_BACK")
    far = rewrite(good, tmp_path / "far", twice(0.02))
    with BagReader(far) as bag:
        spoilt = bag.decode(next(bag.messages(["/tf_static"]))).transforms[0].child_frame_id
    if spoilt == "lidar_top":
        with pytest.raises(RecordingError, match=r"conflict: .* 2\.0 cm and 0\.00 degrees apart"):
            BagRecording(far)
        return
    (reason,) = BagRecording(far).left_out.values()
    assert "conflict: " in reason
    assert "2.0 cm and 0.00 degrees apart" in reason


def test_odometry_may_be_a_pose_or_of_another_frame(good: Path, tmp_path: Path) -> None:
    whole = BagRecording(good)
    imu2base = make_transform(rotation_from_rpy(0, 0, 0.3), [1.0, 0.2, 0.5])

    def as_pose(topic: str, message):
        if topic != "/odometry":
            return message
        return TYPESTORE.types["geometry_msgs/msg/PoseStamped"](message.header, message.pose.pose)

    def as_imu(topic: str, message):
        from occbev_training.sources.bag_writer import _odometry, _transform

        if topic == "/tf_static":
            message.transforms.append(_transform(1, "base_link", "imu", imu2base))
        if topic == "/odometry":
            stamp = stamp_of(message)
            message = _odometry(stamp, whole.trajectory.at(stamp) @ imu2base, np.zeros(6))
            message.child_frame_id = "imu"
        return message

    for name, change in (("pose", as_pose), ("imu", as_imu)):
        read = BagRecording(rewrite(good, tmp_path / name, change))
        np.testing.assert_allclose(read.trajectory.ego2global, whole.trajectory.ego2global, atol=1e-9)

    def untied(topic: str, message):
        if topic == "/odometry":
            message.child_frame_id = "imu"
        return message

    with pytest.raises(RecordingError, match="no transform from 'imu'"):
        BagRecording(rewrite(good, tmp_path / "untied", untied))


def test_poses_in_the_frame_of_the_vehicle_itself_are_refused(good: Path, tmp_path: Path) -> None:
    def own(topic: str, message):
        if topic == "/odometry":
            message.header.frame_id = "base_link"
        return message

    with pytest.raises(RecordingError, match="/odometry: poses in 'base_link' itself"):
        BagRecording(rewrite(good, tmp_path / "own", own))


def test_a_rig_file_stands_in_for_camera_info(good: Path, tmp_path: Path) -> None:
    whole = BagRecording(good)
    bare = rewrite(good, tmp_path / "drive", lambda t, m: None if "camera_info" in t else m)
    from occbev.messages.topics import BagTopics

    images = {name: f"/{name.lower()}/image/compressed" for name in whole.rig.names}
    topics = BagTopics(images, {}, LIDAR, "/odometry")
    with pytest.raises(RecordingError, match="no camera_info of .*rig file"):
        BagRecording(bare, BagOptions(topics))
    read = BagRecording(bare, BagOptions(topics, rig=whole.rig))
    assert read.rig is whole.rig
    assert read.frame_set(0).cameras == whole.rig.names


def test_corrections_move_a_topic(good: Path) -> None:
    whole = BagRecording(good)
    moved = BagRecording(good, BagOptions(clock={LIDAR: ClockCorrection(7_000_000)}))
    np.testing.assert_array_equal(moved.sweep_stamp_ns, whole.sweep_stamp_ns + 7_000_000)
    sweep, expected = moved.sweep(3), whole.sweep(3)
    assert sweep.stamp_ns == expected.stamp_ns + 7_000_000
    np.testing.assert_array_equal(sweep.time_offset, expected.time_offset)
    np.testing.assert_array_equal(moved.trajectory.stamp_ns, whole.trajectory.stamp_ns)


def test_messages_that_are_none_are_named(good: Path) -> None:
    bag = BagReader(good)
    whole = next(bag.messages([LIDAR]))

    def cut(data: bytes) -> BagMessage:
        return BagMessage(LIDAR, whole.type, whole.log_ns, data)

    for spoilt in (whole.data[:9], whole.data[:40], whole.data[:-9], b""):
        with pytest.raises(RecordingError, match=LIDAR):
            bag.decode(cut(spoilt))
    for spoilt in (whole.data[:7], b""):
        with pytest.raises(RecordingError, match=f"{LIDAR}: a message without stamp"):
            bag.stamp_ns(cut(spoilt))


@pytest.mark.parametrize(("name", "value"), [("datatype", 77), ("offset", 4000)])
def test_a_cloud_of_an_impossible_layout_is_named(good: Path, tmp_path: Path, name: str, value: int) -> None:
    def change(topic: str, message):
        if topic == LIDAR:
            setattr(message.fields[3], name, value)
        return message

    with pytest.raises(RecordingError, match=r"no cloud of .* can have the fields|unknown datatype"):
        BagRecording(rewrite(good, tmp_path / "drive", change))


@pytest.mark.parametrize("text", ["rosbag2_bagfile_information: [1]", "a: \xff", "a: b: c"])
def test_metadata_that_is_none_is_named(good: Path, tmp_path: Path, text: str) -> None:
    path = rewrite(good, tmp_path / "drive", lambda topic, message: message)
    (path / "metadata.yaml").write_bytes(text.encode("latin1"))
    with pytest.raises(RecordingError, match="not the metadata of a bag"):
        BagRecording(path)


def test_a_raw_image_that_is_cut_is_a_missing_camera(good: Path, tmp_path: Path) -> None:
    def cut(topic: str, message):
        if topic != "/cam_back/image/compressed":
            return message
        return TYPESTORE.types["sensor_msgs/msg/Image"](message.header, 40, 64, "rgb8", 0, 192, np.zeros(100, np.uint8))

    frames = BagRecording(rewrite(good, tmp_path / "drive", cut)).frame_set(1)
    assert frames.cameras == ("CAM_FRONT_LEFT", "CAM_FRONT")
    assert "100 bytes, but 40 rows of 192 bytes" in frames.missing["CAM_BACK"]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.98])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_cut_bag_is_refused_or_read_as_promised(tmp_path: Path, tiny_recording, storage: str, share: float) -> None:
    write_bag(tiny_recording, tmp_path / "drive", storage)
    (file,) = [*(tmp_path / "drive").glob("*.mcap"), *(tmp_path / "drive").glob("*.db3")]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    if (storage, share) == ("mcap", 0.98):  # what is cut off is the index
        read = BagRecording(tmp_path / "drive")
        assert len(read.sweep_stamp_ns) == len(tiny_recording.sweep_stamp_ns)
        assert "the file is cut at byte" in read.notes[0]
        return
    with pytest.raises(RecordingError, match="drive"):
        BagRecording(tmp_path / "drive")


def test_a_bag_that_is_cut_before_its_first_message_says_so(tmp_path: Path, tiny_recording) -> None:
    write_bag(tiny_recording, tmp_path / "drive")
    (file,) = (tmp_path / "drive").glob("*.mcap")
    file.write_bytes(file.read_bytes()[:3000])
    for read in (BagRecording, lambda path: refuse_bad_clocks(path, BagOptions())):
        with pytest.raises(RecordingError, match=r"drive: no image topic .*topics are none; .*the file is cut at byte"):
            read(tmp_path / "drive")
    (verdict,) = check_bag(tmp_path / "drive")
    assert "the file is cut at byte" in verdict.text


def test_what_was_left_out_is_counted_in_the_report(good: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("numba", reason="the label kernels need numba: training environment")
    from occbev_training.cli import main

    seen: list[str] = []

    def spoil(topic: str, message):
        seen.append(topic)
        if topic == LIDAR and seen.count(LIDAR) == 5:
            restamp(message, 0)
        if topic == "/cam_back/image/compressed" and seen.count(topic) == 3:
            message.data = message.data[:200]
        return message

    bag = rewrite(good, tmp_path / "drive", spoil)
    options = ["--grid", "tiny", "--window", "0.3", "--min-support", "0.2", "--no-gate", "--json"]
    assert main(["pairs", str(tmp_path / "out"), str(bag), *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["skipped_messages"] == {f"{LIDAR}: zero stamp": 1}
    assert record["missing_images"] == {"CAM_BACK": 1}


def test_one_bad_bag_does_not_stop_the_others(good: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("numba", reason="the label kernels need numba: training environment")
    from occbev_training.cli import main

    bags = tmp_path / "bags"
    bags.mkdir()
    rewrite(good, bags / "fine", lambda topic, message: message)
    broken = rewrite(good, bags / "broken", lambda topic, message: message)
    (file,) = broken.glob("*.db3")
    file.write_bytes(file.read_bytes()[:4000])
    arguments = [
        "pairs",
        str(tmp_path / "out"),
        str(bags),
        "--grid",
        "tiny",
        "--window",
        "0.3",
        "--min-support",
        "0.2",
    ]
    assert main([*arguments, "--no-gate", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["samples"] >= 4
    assert list(record["problems"]) == ["broken"]
    assert json.loads((tmp_path / "out" / "quality.json").read_text()) == record
