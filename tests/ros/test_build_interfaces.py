"""The message packages that the set-up builds are the upstream ones by hash, and nothing installed is shadowed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from occbev.ros import build_interfaces
from occbev.ros.build_interfaces import InterfaceError, ensure

rclpy = pytest.importorskip("rclpy", reason="needs the ROS 2 wheels or a ROS 2 distribution")

UPSTREAM = {
    "tf2_msgs/msg/TFMessage": "RIHS01_e369d0f05a23ae52508854b66f6aa0437f3449d652e8cbf22d5abe85d020f087",
    "vision_msgs/msg/Detection3DArray": "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018",
}
"""Type hashes of the packages as ROS 2 distributions ship them."""


@pytest.mark.ros
def test_published_type_hashes_are_the_upstream_ones(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tf2 = pytest.importorskip("tf2_msgs.msg")
    vision = pytest.importorskip("vision_msgs.msg")
    standard = pytest.importorskip("std_msgs.msg")
    monkeypatch.setenv("ROS_DOMAIN_ID", "83")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context)
    try:
        node = rclpy.create_node("hashes", context=context)
        node.create_publisher(tf2.TFMessage, "transforms", 1)
        node.create_publisher(vision.Detection3DArray, "detections", 1)
        node.create_subscription(standard.String, "text", print, 1)
        seen = {_hash_on(node, topic) for topic in ("transforms", "detections")}
    finally:
        rclpy.shutdown(context=context)
    assert seen == set(UPSTREAM.values())
    assert "error" not in capfd.readouterr().err, "Fast DDS misses a type support"


def _hash_on(node: object, topic: str) -> str:
    deadline = time.monotonic() + 10
    while not (found := node.get_publishers_info_by_topic(f"/{topic}")):
        assert time.monotonic() < deadline, f"no publisher was seen on {topic}"
        time.sleep(0.05)
    return str(found[0].topic_type_hash)


def test_a_build_from_nothing_imports_and_has_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (Path(sys.prefix) / "share/geometry_msgs/msg").is_dir():
        pytest.skip("ROS 2 is not from the wheels: there is nothing to build")
    monkeypatch.setattr(build_interfaces, "_folder_of", lambda package: None)
    assert ensure("tf2_msgs", tmp_path) == f"built into {tmp_path / 'tf2_msgs'}"
    monkeypatch.setattr(build_interfaces, "_folder_of", lambda package: tmp_path / package)
    name = "tf2_msgs/msg/TFMessage"
    assert build_interfaces.type_hashes("tf2_msgs")[name] == UPSTREAM[name]
    assert ensure("tf2_msgs", tmp_path) == "up to date"
    assert list((tmp_path / "tf2_msgs").glob("tf2_msgs_s__rosidl_typesupport_c*.so"))
    assert not list(tmp_path.rglob("*.c"))


def test_an_installed_package_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "distribution/tf2_msgs"
    installed.mkdir(parents=True)
    monkeypatch.setattr(build_interfaces, "_folder_of", lambda package: installed)
    assert "left alone" in ensure("tf2_msgs", tmp_path / "environment")
    assert not (tmp_path / "environment").exists()


def test_a_foreign_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vision_msgs").mkdir()
    monkeypatch.setattr(build_interfaces, "_folder_of", lambda package: None)
    with pytest.raises(InterfaceError, match="is not ours"):
        ensure("vision_msgs", tmp_path)


def test_a_distribution_without_the_package_names_the_apt_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_interfaces, "_folder_of", lambda package: None)
    monkeypatch.setenv("AMENT_PREFIX_PATH", "/opt/ros/jazzy")
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    with pytest.raises(InterfaceError, match="apt-get install ros-jazzy-vision-msgs"):
        ensure("vision_msgs", tmp_path)


def test_a_missing_compiler_names_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (Path(sys.prefix) / "share/geometry_msgs/msg").is_dir():
        pytest.skip("ROS 2 is not from the wheels: there is nothing to build")
    monkeypatch.setattr(build_interfaces, "_folder_of", lambda package: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InterfaceError, match=r"gcc is missing.*apt-get install gcc"):
        ensure("tf2_msgs", tmp_path)
