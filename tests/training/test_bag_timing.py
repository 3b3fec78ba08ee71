"""Bags whose clocks, rates and phases differ: their key frames are complete, or one line says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="bags are read with rosbags")

from tests.small_bags import FORWARD, PERIOD, START, Camera, Drive, header, make

from occbev.messages.bags import BagMessage, BagWriter, type_store
from occbev_training.sources.bag_check import check_bag, refuse_bad_clocks
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.bags import BagRecording
from occbev_training.sources.recording import RecordingError

LIDAR = "/points"


def cloud(stamp_ns: int, frame: str = "lidar") -> object:
    """A turn of 400 points, each with its time from the stamp."""
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    rows = np.zeros(400, [(n, "<f4") for n in ("x", "y", "z", "time")])
    rows["x"], rows["y"], rows["time"] = 10 * np.cos(angle), 10 * np.sin(angle), np.linspace(0, 0.1, 400)
    fields = [make("sensor_msgs/msg/PointField", n, 4 * i, 7, 1) for i, n in enumerate(rows.dtype.names)]
    data = rows.view(np.uint8).reshape(-1)
    step = rows.itemsize
    return make(
        "sensor_msgs/msg/PointCloud2", header(stamp_ns, frame), 1, 400, fields, False, step, step * 400, data, True
    )


def with_lidar(drive: Drive, phase_ns: int = 0, period_ns: int = PERIOD) -> list[BagMessage]:
    """Add sweeps that begin `phase_ns` after each camera period."""
    messages = drive.messages()
    for stamp in range(START - PERIOD + phase_ns, START + (drive.sets + 1) * PERIOD, period_ns):
        made = cloud(stamp)
        data = bytes(type_store().serialize_cdr(made, made.__msgtype__))  # type: ignore[attr-defined]
        messages.append(BagMessage(LIDAR, "sensor_msgs/msg/PointCloud2", stamp + PERIOD, data))
    return sorted(messages, key=lambda message: message.log_ns)


def write(path: Path, messages: Sequence[BagMessage]) -> Path:
    with BagWriter(path) as writer:
        for message in messages:
            writer.write(message)
    return path


def of_phases(*phases_ms: float, sets: int = 8) -> Drive:
    cameras = {f"cam{i}": Camera(delay_ns=round(phase * 1e6)) for i, phase in enumerate(phases_ms)}
    static = [("base_link", f"{name}_optical", FORWARD) for name in cameras]
    return Drive(cameras, (*static, ("base_link", "lidar", np.eye(4))), sets=sets)


@pytest.mark.parametrize("phase_ms", [0, 20, 50, 80])
@pytest.mark.parametrize("cameras", [(0, 3), (0, 16, 33, 50, 67, 83)], ids=["together", "around"])
def test_keys_are_complete_whatever_the_phase_of_the_lidar(tmp_path: Path, phase_ms: int, cameras: tuple) -> None:
    """Cameras at 10 Hz that fire at once or as the LiDAR passes, and a LiDAR of any phase."""
    from occbev_training.occupancy.pairs import camera_reach

    pytest.importorskip("numba", reason="pairs need the label kernels: training environment")
    recording = BagRecording(write(tmp_path / "bag", with_lidar(of_phases(*cameras), phase_ms * 1_000_000)))
    reach = camera_reach(recording)
    for key in range(1, len(recording.key_stamp_ns) - 1):
        frames = recording.frame_set(key)
        assert len(frames.cameras) == len(cameras)
        away = [abs(frame.stamp_ns - frames.stamp_ns) / 1e9 for frame in frames.frames.values() if frame]
        assert max(away) <= reach


def test_a_camera_half_a_period_from_the_first_is_in_the_keys(tmp_path: Path) -> None:
    recording = BagRecording(write(tmp_path / "bag", with_lidar(of_phases(0, 50.4))))
    assert all(len(recording.frame_set(key).cameras) == 2 for key in range(1, len(recording.key_stamp_ns)))


def test_key_frames_come_at_their_interval_although_stamps_jitter(tmp_path: Path) -> None:
    drive, rng = of_phases(0, sets=31), np.random.default_rng(1)
    messages = []
    for message in with_lidar(drive):
        if message.topic.startswith("/cam0/image"):
            shift = int(rng.integers(-2_000_000, 2_000_000))
            record = type_store().deserialize_cdr(message.data, message.type)
            stamp = record.header.stamp.sec * 10**9 + record.header.stamp.nanosec + shift
            record.header.stamp.sec, record.header.stamp.nanosec = divmod(stamp, 10**9)
            message = replace(message, data=bytes(type_store().serialize_cdr(record, message.type)))
        messages.append(message)
    stamps = BagRecording(write(tmp_path / "bag", messages), BagOptions(key_interval=0.5)).key_stamp_ns
    assert len(stamps) == 7
    np.testing.assert_allclose(np.diff(stamps) / 1e9, 0.5, atol=0.101)  # half a turn of the LiDAR either way


def test_the_first_complete_set_begins_a_drive(tmp_path: Path) -> None:
    messages = with_lidar(of_phases(0, 5, 10))
    late = [m for m in messages if not (m.topic.startswith("/cam2/image") and m.log_ns < START + PERIOD)]
    recording = BagRecording(write(tmp_path / "bag", late), BagOptions(key_interval=0.5))
    assert len(recording.frame_set(0).cameras) == 3


@pytest.mark.parametrize(("period_ms", "ok"), [(200.3, True), (250, False)])
def test_exactly_five_hertz_are_five_hertz(tmp_path: Path, period_ms: float, ok: bool) -> None:
    drive = of_phases(0, sets=20)
    messages = []
    for message in with_lidar(drive):
        if message.topic.startswith("/cam0/image"):
            number = (message.log_ns - START) // PERIOD
            stamp = START + round(number * period_ms * 1e6)
            record = type_store().deserialize_cdr(message.data, message.type)
            record.header.stamp.sec, record.header.stamp.nanosec = divmod(stamp, 10**9)
            data = bytes(type_store().serialize_cdr(record, message.type))
            message = replace(message, log_ns=stamp + 2_000_000, data=data)
        messages.append(message)
    bag = write(tmp_path / "bag", sorted(messages, key=lambda m: m.log_ns))
    verdicts = {verdict.requirement: verdict for verdict in check_bag(bag, measure_turns=False)}
    assert verdicts["camera cam0"].ok == ok


def test_simulated_time_is_told_from_wall_time(tmp_path: Path) -> None:
    """A simulation's stamps begin at zero while the recorder logs wall time; one sensor in wall time is refused."""
    messages = with_lidar(of_phases(0, 5))
    simulated = [replace(m, log_ns=m.log_ns) for m in messages]

    def restamped(message: BagMessage, back_ns: int) -> BagMessage:
        record = type_store().deserialize_cdr(message.data, message.type)
        for part in getattr(record, "transforms", [record]):
            stamp = part.header.stamp.sec * 10**9 + part.header.stamp.nanosec - back_ns
            part.header.stamp.sec, part.header.stamp.nanosec = divmod(stamp, 10**9)
        return replace(message, data=bytes(type_store().serialize_cdr(record, message.type)))

    back = START - 5 * 10**9
    simulated = [restamped(message, back) for message in messages]
    bag = write(tmp_path / "simulated", simulated)
    refuse_bad_clocks(bag, BagOptions())
    assert len(BagRecording(bag).key_stamp_ns) == 8
    mixed = [restamped(m, back) if m.topic != LIDAR else m for m in messages]
    with pytest.raises(RecordingError, match=r"simulated time.* /points.*wall time|/points.*wall time.*simulated"):
        refuse_bad_clocks(write(tmp_path / "mixed", mixed), BagOptions())


def test_a_bag_that_was_played_and_recorded_again_is_read(tmp_path: Path) -> None:
    """Its log is years after its stamps, for all topics alike; one topic alone that is late is refused."""
    late = 10**17
    messages = [replace(message, log_ns=message.log_ns + late) for message in with_lidar(of_phases(0, 5))]
    refuse_bad_clocks(write(tmp_path / "again", messages), BagOptions())
    mixed = [replace(m, log_ns=m.log_ns - 2 * 10**9) if m.topic == LIDAR else m for m in messages]
    with pytest.raises(RecordingError, match=rf"{LIDAR}: stamps are .* s behind the log"):
        refuse_bad_clocks(write(tmp_path / "mixed", sorted(mixed, key=lambda m: m.log_ns)), BagOptions())
