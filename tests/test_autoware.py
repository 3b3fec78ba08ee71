"""Boxes as Autoware's DetectedObjects: written with classes of the very fields, serialised, and read back as labels."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from occbev import graph
from occbev.classes import DETECTION_CLASSES
from occbev.messages.bags import INTERFACES, BagMessage, BagWriter
from occbev.results import Boxes3D
from occbev.ros import autoware
from occbev.ros.compat import MissingCapability
from occbev_training.sources.box_topics import _type_store, read_box_topic

STORE = _type_store()
KIND = graph.OPTIONAL_OUTPUTS["autoware"].type
STAMP_NS = 1_600_000_000_123_456_789


def default(kind: str) -> Any:
    """A message with the defaults that rclpy's classes have."""
    values = {}
    for name, (node, detail) in STORE.fielddefs[kind][1]:
        if node.name == "NAME":
            values[name] = default(detail)
        elif node.name == "BASE":
            values[name] = {"string": "", "bool": False}.get(detail[0], 0.0 if detail[0].startswith("float") else 0)
        elif node.name == "ARRAY":
            values[name] = np.zeros(detail[1])
        else:
            values[name] = []
    return STORE.types[kind](**values)


def stand_in(kind: str) -> Any:
    """A class that is called as rclpy's are: with some of the fields, and holds the constants of its type."""
    own = STORE.types[kind]

    def make(**given: Any) -> Any:
        assert set(given) <= {entry.name for entry in dataclasses.fields(own)}
        message = default(kind)
        for name, value in given.items():
            setattr(message, name, value)
        return message

    for name, _, value in STORE.fielddefs[kind][0]:
        setattr(make, name, value)
    return make


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if autoware_perception_msgs were installed."""
    module = types.ModuleType(f"{autoware.PACKAGE}.msg")
    for file in (INTERFACES / autoware.PACKAGE / "msg").glob("*.msg"):
        setattr(module, file.stem, stand_in(f"{autoware.PACKAGE}/msg/{file.stem}"))
    monkeypatch.setattr("occbev.ros.compat.Capability.present", True)
    monkeypatch.setitem(sys.modules, autoware.PACKAGE, types.ModuleType(autoware.PACKAGE))
    monkeypatch.setitem(sys.modules, f"{autoware.PACKAGE}.msg", module)


def header() -> Any:
    made = default("std_msgs/msg/Header")
    made.frame_id = "base_link"
    made.stamp.sec, made.stamp.nanosec = divmod(STAMP_NS, 10**9)
    return made


def boxes(labels: list[int]) -> Boxes3D:
    """A car that turns left at 5 m/s, and others beside it."""
    box = np.tile(np.array([12, 3, 0.8, 4.5, 1.9, 1.6, 0.5, 5 * np.cos(0.5), 5 * np.sin(0.5)]), (len(labels), 1))
    box[:, 1] += 4 * np.arange(len(labels))
    return Boxes3D(box.astype(np.float32), np.array(labels), np.linspace(0.9, 0.4, len(labels)).astype(np.float32))


def test_a_bag_of_them_is_read_back_as_the_same_boxes(installed: None, tmp_path: Path) -> None:
    sent = boxes([0, 1, 5, 8])
    message = autoware.detected_objects(sent, header())
    with BagWriter(tmp_path / "bag") as bag:
        bag.write(BagMessage("/objects", KIND, STAMP_NS, bytes(STORE.serialize_cdr(message, KIND))))
    frames, left_out = read_box_topic(tmp_path / "bag", "/objects")
    assert left_out == {}
    assert (frames[0].stamp_ns, frames[0].frame) == (STAMP_NS, "base_link")
    for read, box, score in zip(frames[0].boxes, sent.box, sent.score, strict=True):
        np.testing.assert_allclose(read.box2frame[:3, 3], box[:3], atol=1e-5)
        np.testing.assert_allclose(read.lwh, box[3:6], atol=1e-5)
        assert np.arctan2(read.box2frame[1, 0], read.box2frame[0, 0]) == pytest.approx(0.5, abs=1e-5)
        np.testing.assert_allclose(read.velocity, [*box[7:9], 0], atol=1e-5)
        assert read.score == pytest.approx(score)
    assert [read.category for read in frames[0].boxes] == ["car", "truck", "unknown", "pedestrian"]


def test_the_twist_is_along_the_box_and_covariances_are_whole(installed: None) -> None:
    (item,) = autoware.detected_objects(boxes([0]), header()).objects
    motion = item.kinematics
    assert (motion.has_twist, motion.has_twist_covariance, motion.has_position_covariance) == (True,) * 3
    assert motion.orientation_availability == 2
    twist = motion.twist_with_covariance
    assert (twist.twist.linear.x, twist.twist.linear.y) == (pytest.approx(5, abs=1e-5), pytest.approx(0, abs=1e-5))
    covariance = np.array(motion.pose_with_covariance.covariance).reshape(6, 6)
    assert np.linalg.eigvalsh(covariance[:3, :3]).min() > 0
    np.testing.assert_array_equal(covariance, covariance.T)
    assert covariance[5, 5] == pytest.approx(autoware.YAW_RAD**2)
    assert np.array(twist.covariance).reshape(6, 6)[1, 1] == pytest.approx(autoware.VELOCITY**2)
    assert item.existence_probability == pytest.approx(0.9)
    assert item.classification[0].probability == 1.0


def test_every_class_has_a_constant_of_autoware() -> None:
    assert set(autoware.LABELS) == set(DETECTION_CLASSES)
    text = (INTERFACES / autoware.PACKAGE / "msg/ObjectClassification.msg").read_text()
    assert set(autoware.LABELS.values()) <= set(re.findall(r"uint8 ([A-Z_]+)\s*=", text))


def test_without_the_package_the_remedy_is_named() -> None:
    try:
        import autoware_perception_msgs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingCapability, match="apt install ros-.ROS_DISTRO-autoware-perception-msgs"):
            autoware.detected_objects(boxes([0]), header())
    else:
        pytest.skip("autoware_perception_msgs is installed here")
