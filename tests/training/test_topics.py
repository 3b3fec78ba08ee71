"""The naming schemes of bags in the wild, recognised by their topics, and mappings given by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from occbev_training.sources.recording import RecordingError
from occbev_training.sources.topics import PROFILES, detect_topics, is_compensated, load_topics

COMPRESSED, RAW = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image"
INFO, CLOUD = "sensor_msgs/msg/CameraInfo", "sensor_msgs/msg/PointCloud2"
ODOMETRY, POSE, TF = (
    "nav_msgs/msg/Odometry",
    "geometry_msgs/msg/PoseStamped",
    "tf2_msgs/msg/TFMessage",
)

BAGS = {
    "nuscenes2mcap": {
        "/cam_front/image_rect_compressed": COMPRESSED,
        "/cam_front/camera_info": INFO,
        "/cam_back/image_rect_compressed": COMPRESSED,
        "/cam_back/camera_info": INFO,
        "/lidar_top": CLOUD,
        "/radar_front": CLOUD,
        "/tf": TF,
        "/semantic_map": CLOUD,
        "/pose": POSE,
    },
    "nuscenes2bag": {
        "cam_front/raw": RAW,
        "cam_back/raw": RAW,
        "lidar_top": CLOUD,
        "/odom": ODOMETRY,
        "/tf": TF,
    },
    "ros2_dataset_bridge": {
        "/nuscenes/CAM_FRONT/image": RAW,
        "/nuscenes/CAM_FRONT/camera_info": INFO,
        "/nuscenes/CAM_BACK/image": RAW,
        "/nuscenes/CAM_BACK/camera_info": INFO,
        "/nuscenes/LIDAR_TOP/data": CLOUD,
        "/tf": TF,
    },
    "autoware": {
        "/sensing/camera/camera0/image_rect_color/compressed": COMPRESSED,
        "/sensing/camera/camera0/camera_info": INFO,
        "/sensing/camera/camera0/image_rect_color": RAW,
        "/sensing/camera/camera1/image_raw": RAW,
        "/sensing/camera/camera1/camera_info": INFO,
        "/sensing/lidar/concatenated/pointcloud": CLOUD,
        "/sensing/lidar/left/pointcloud_raw": CLOUD,
        "/sensing/lidar/top/pointcloud_raw_ex": CLOUD,
        "/perception/obstacles": CLOUD,
        "/localization/kinematic_state": ODOMETRY,
        "/other/odom": ODOMETRY,
    },
}


@pytest.mark.parametrize("profile", BAGS)
@pytest.mark.parametrize("asked", ["auto", "by name"])
def test_each_scheme_is_recognised(profile: str, asked: str) -> None:
    found = detect_topics(BAGS[profile], "auto" if asked == "auto" else profile)
    assert found.profile == profile
    if profile == "autoware":
        assert found.images == {
            "camera0": "/sensing/camera/camera0/image_rect_color/compressed",
            "camera1": "/sensing/camera/camera1/image_raw",
        }
        assert found.lidar == "/sensing/lidar/top/pointcloud_raw_ex", "one sensor, with times"
        assert found.odometry == "/localization/kinematic_state"
        assert not is_compensated(found.profile)
        return
    assert set(found.images) == {"CAM_FRONT", "CAM_BACK"}
    assert set(found.infos) == (set() if profile == "nuscenes2bag" else set(found.images))
    assert found.lidar in BAGS[profile]
    assert "lidar" in found.lidar.lower()
    assert found.odometry == ("/odom" if profile == "nuscenes2bag" else None)
    assert is_compensated(found.profile)


def test_names_match_in_any_case() -> None:
    upper = {name.upper() if name != "/tf" else name: kind for name, kind in BAGS["nuscenes2bag"].items()}
    assert detect_topics(upper).images["CAM_FRONT"] == "CAM_FRONT/RAW"


def test_other_schemes_go_by_the_camera_info_beside() -> None:
    topics = {"/front/image_raw": RAW, "/front/camera_info": INFO, "/points": CLOUD, "/pose": POSE}
    found = detect_topics(topics)
    assert (found.images, found.lidar, found.odometry) == (
        {"front": "/front/image_raw"},
        "/points",
        "/pose",
    )
    with pytest.raises(RecordingError, match=r"several topics .*--topics"):
        detect_topics({**topics, "/others": CLOUD})


def test_a_scheme_that_is_not_there_is_named() -> None:
    with pytest.raises(RecordingError, match="no camera of profile autoware"):
        detect_topics(BAGS["nuscenes2bag"], "autoware")
    with pytest.raises(RecordingError, match="known are auto, occbev, nuscenes2mcap"):
        detect_topics({}, "other")
    assert [profile.name for profile in PROFILES][1:] == list(BAGS)


def test_a_mapping_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "topics.yaml"
    path.write_text(
        "cameras:\n  left: {image: /a/image, info: /a/info}\n  right: {image: /b/image}\n"
        "lidar: /points\nodometry: /pose\n"
    )
    topics = load_topics(path)
    assert topics.images == {"left": "/a/image", "right": "/b/image"}
    assert topics.infos == {"left": "/a/info"}
    assert topics.all == ["/a/image", "/b/image", "/a/info", "/points", "/pose"]
    for text in (
        "cameras: {}",
        "lidars: /x\ncameras: {a: {image: /a}}",
        "cameras: {a: {img: /a}}",
        "3",
    ):
        path.write_text(text)
        with pytest.raises(RecordingError, match=r"topics.yaml"):
            load_topics(path)
