"""A recorded replay holds what the node read: the same sets, compressed, latched where it was, with every fate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

pytest.importorskip("rosbags", reason="bags are read with rosbags")

from tests import small_bags
from tests.small_bags import FORWARD, PERIOD, START, Camera, Drive

from occbev.messages.bags import BagMessage, BagReader, BagWriter, latched_topics
from occbev.messages.readers import image_from_message
from occbev.streams.bag_jobs import BagFrames
from occbev.streams.kept_inputs import keep_inputs
from occbev.streams.parameters import PerceptionParameters, parameters_from_record

SETS = 4


def parameters(front: str) -> PerceptionParameters:
    cameras: dict[str, Any] = {
        "names": ["front", "rear"],
        "front": {"topic": front, "info_topic": "/front/camera_info"},
        "rear": {"topic": "/rear/image_raw/compressed", "info_topic": "/rear/camera_info"},
    }
    motion = {"odometry_topic": "/odom"}
    return parameters_from_record({"anchor": "front", "cameras": cameras, "ego_motion": motion})


def smooth(stamp: int, frame: str, seed: int) -> Any:
    """A raw image that JPEG hardly changes."""
    x, y = np.meshgrid(np.linspace(40, 200, small_bags.WIDTH), np.linspace(0, 50, small_bags.HEIGHT))
    image = np.stack([x, x + y, np.full_like(x, 50 + seed % 100)], -1).astype(np.uint8)
    fields = (small_bags.HEIGHT, small_bags.WIDTH, "rgb8", 0, 3 * small_bags.WIDTH, image.reshape(-1))
    return small_bags.make("sensor_msgs/msg/Image", small_bags.header(stamp, frame), *fields)


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    static = [("base_link", f"{name}_optical", FORWARD) for name in ("front", "rear")]
    cameras = {"front": Camera(image=smooth, topic="image_raw"), "rear": Camera(delay_ns=5_000_000)}
    messages = Drive(cameras, static=static, sets=SETS).messages()
    cloud = BagMessage("/points", "sensor_msgs/msg/PointCloud2", START, b"\0" * 64)
    with BagWriter(tmp_path / "drive", latched={"/tf_static", "/rear/camera_info"}) as writer:
        for message in [*messages, cloud]:
            writer.write(message)
    return tmp_path / "drive"


def frames() -> list[dict[str, Any]]:
    """Fates of the key times: the second is lost, of the third the rear camera is missing."""
    made: list[dict[str, Any]] = []
    for number in range(SETS):
        stages, missing = {"inference": 80.0 + number, "total": 100.0 + number}, {"rear": "late"} if number == 2 else {}
        done = {"outcome": "processed", "stages_ms": stages, "missing": missing}
        made.append({"stamp_ns": START + number * PERIOD, **(done if number != 1 else {"outcome": "too_late"})})
    return made


@pytest.fixture
def kept(drive: Path, tmp_path: Path) -> Path:
    with BagReader(drive) as bag, BagWriter(tmp_path / "run") as writer:
        keep_inputs(writer, bag, parameters("/front/image_raw"), frames())
    return tmp_path / "run"


def test_the_recorded_inputs_give_the_sets_that_the_bag_gave(drive: Path, kept: Path) -> None:
    given = list(BagFrames(drive, parameters("/front/image_raw")))
    found = list(BagFrames(kept, parameters("/front/image_raw/compressed")))
    assert len(given) == len(found) == SETS
    for (a, motion_a), (b, motion_b) in zip(given, found, strict=True):
        assert a.stamp_ns == b.stamp_ns
        assert motion_a is not None
        assert motion_b is not None
        for name in ("front", "rear"):
            np.testing.assert_allclose(motion_a[name], motion_b[name])
            first, second = (frame_set.frames[name] for frame_set in (a, b))
            assert first is not None
            assert second is not None
            assert first.stamp_ns == second.stamp_ns
            limit = 6 if name == "front" else 0  # the rear camera's JPEG is the very same
            assert np.abs(np.subtract(first.image, second.image, dtype=np.int16)).max() <= limit


def test_a_topic_that_nobody_reads_is_left_out_and_the_log_times_stay(drive: Path, kept: Path) -> None:
    with BagReader(drive) as bag, BagReader(kept) as run:
        assert "/points" not in run.topics
        assert run.topics["/front/image_raw/compressed"] == "sensor_msgs/msg/CompressedImage"
        for topic, copy in (("/front/image_raw", "/front/image_raw/compressed"), ("/odom", "/odom")):
            assert [m.log_ns for m in bag.messages([topic])] == [m.log_ns for m in run.messages([copy])]


def test_what_was_latched_stays_latched(drive: Path, kept: Path) -> None:
    assert latched_topics(drive) == latched_topics(kept) == {"/tf_static", "/rear/camera_info"}
    assert latched_topics(drive / "drive.mcap") == {"/tf_static"}, "a file alone says nothing that is read"


@pytest.mark.parametrize("text", ["durability: 1", "durability: transient_local", "{'durability': 'transient_local'}"])
def test_latched_topics_are_known_in_all_versions_of_metadata(tmp_path: Path, text: str) -> None:
    entry = {"name": "/map", "offered_qos_profiles": f"- history: 1\n  {text}\n"}
    entries = [{"topic_metadata": entry}, {"topic_metadata": {"name": "/x", "offered_qos_profiles": "durability: 2"}}]
    record = {"rosbag2_bagfile_information": {"topics_with_message_count": entries}}
    (tmp_path / "metadata.yaml").write_text(yaml.safe_dump(record))
    assert latched_topics(tmp_path) == {"/tf_static", "/map"}


def test_every_key_time_has_its_latency_or_the_reason_why_it_was_lost(kept: Path) -> None:
    def values(run: BagReader, topic: str) -> list[tuple[int, float]]:
        return [((m.log_ns - START) // PERIOD, run.decode(m).data) for m in run.messages([topic])]

    with BagReader(kept) as run:
        assert values(run, "/perception/debug/processing_time/total_ms") == [(0, 100.0), (2, 102.0), (3, 103.0)]
        assert values(run, "/perception/debug/dropped/too_late") == [(1, 1.0)]
        assert values(run, "/perception/debug/missing_cameras") == [(0, 0.0), (2, 1.0), (3, 0.0)]


def test_an_image_that_cannot_be_read_stays_as_it_is(tmp_path: Path) -> None:
    def depth(stamp: int, frame: str, seed: int) -> Any:
        return small_bags.raw(stamp, frame, seed, "16UC1")

    cameras = {"front": Camera(image=depth, topic="image_raw"), "rear": Camera()}
    path = Drive(cameras, static=[("base_link", f"{n}_optical", FORWARD) for n in cameras]).write(tmp_path / "drive")
    with BagReader(path) as bag, BagWriter(tmp_path / "run") as writer:
        keep_inputs(writer, bag, parameters("/front/image_raw"), [])
    with BagReader(tmp_path / "run") as run:
        assert run.topics["/front/image_raw"] == "sensor_msgs/msg/Image"
        message = next(run.messages(["/front/image_raw"]))
        assert run.decode(message).encoding == "16UC1"


def test_a_compressed_copy_looks_like_the_raw_image(drive: Path, kept: Path) -> None:
    with BagReader(drive) as bag, BagReader(kept) as run:
        raw = image_from_message(bag.decode(next(bag.messages(["/front/image_raw"]))))
        packed = run.decode(next(run.messages(["/front/image_raw/compressed"])))
    assert packed.header.frame_id == "front_optical"
    image = cv2.imdecode(np.asarray(packed.data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(image.astype(int) - raw).mean() < 3, "red and blue are not exchanged"
