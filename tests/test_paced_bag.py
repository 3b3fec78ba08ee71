"""A short bag played forth and back: the right pictures at the right times, with the poses that belong to them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.small_bags import START, Camera, Drive

from occbev.benchmarks.paced_bag import LEAD_NS, PacedBag, fold
from occbev.messages.bags import BagError, BagReader
from occbev.messages.readers import pose_from_message, stamp_to_ns

LATE_NS, SETS, RATE = 30_000_000, 9, 20.0
ORDER = [0, 1, 2, 3, 2, 1, 0, 1, 2]
DRIVE = Drive(cameras={"front": Camera(), "left": Camera(delay_ns=LATE_NS)})


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[BagReader]:
    with BagReader(DRIVE.write(tmp_path / "bag")) as bag:
        yield bag


def test_the_way_folds() -> None:
    assert [fold(number, 3) for number in range(9)] == ORDER


def test_images_come_at_the_rate_as_far_apart_as_cameras_fired(reader: BagReader) -> None:
    paced = PacedBag(reader, RATE, SETS)
    for topic, offset_ns in (("/front/image_raw/compressed", 0), ("/left/image_raw/compressed", LATE_NS)):
        messages = list(paced.messages([topic]))
        stamps = [stamp_to_ns(reader.decode(message).header.stamp) for message in messages]
        assert stamps == [START + offset_ns + n * 50_000_000 for n in range(SETS)]
        assert [message.log_ns for message in messages] == stamps
        recorded = [bytes(reader.decode(m).data) for m in reader.messages([topic])]
        assert [bytes(reader.decode(m).data) for m in messages] == [recorded[key] for key in ORDER]


def test_everything_is_in_order_and_within_the_span(reader: BagReader) -> None:
    paced = PacedBag(reader, RATE, SETS)
    messages = list(paced.messages())
    assert {message.topic for message in messages} == set(paced.topics)
    assert all(a.log_ns <= b.log_ns for a, b in pairwise(messages))
    first_ns, last_ns = paced.span_ns
    assert all(first_ns <= message.log_ns <= last_ns for message in messages)
    assert sum(message.topic == "/tf_static" for message in messages) == 1


def test_a_pose_at_an_image_is_the_one_at_which_it_was_taken_and_none_jumps(reader: BagReader) -> None:
    paced = PacedBag(reader, RATE, SETS)
    poses = [pose_from_message(reader.decode(m)) for m in paced.messages(["/odom"])]
    stamps = np.array([pose.stamp_ns for pose in poses])
    assert (np.diff(stamps) > 0).all()
    assert stamps[0] < START - LEAD_NS / 2
    assert stamps[-1] > START + 8 * 50_000_000 + LEAD_NS / 2
    places = np.array([pose.child2parent[:3, 3] for pose in poses])
    speed = np.linalg.norm(np.diff(places, axis=0), axis=1) / (np.diff(stamps) / 1e9)
    assert speed.max() < 2.01 * np.hypot(8.0, 0.5), "twice the recorded speed at twice the recorded rate"
    for number, key in enumerate(ORDER):
        x = np.interp(number * 50_000_000, stamps - START, places[:, 0])
        assert x == pytest.approx(8.0 * 0.1 * key, abs=0.17), "within a period of odometry"


def test_a_bag_that_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    with BagReader(Drive(sets=1).write(tmp_path / "bag")) as bag, pytest.raises(BagError, match="at least two"):
        PacedBag(bag, 10.0, 5)
