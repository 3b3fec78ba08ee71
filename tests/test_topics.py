"""The naming schemes of bags in the wild, recognised by their topics, and mappings given by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from occbev.messages.topics import PROFILES, detect_topics, is_compensated, load_topics, topics_record
from occbev.results import RecordingError

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


def info_beside(*images: str, kind: str = RAW) -> dict[str, str]:
    """Topics of cameras whose calibration lies beside their images."""
    return dict.fromkeys(images, kind) | {f"{t.rpartition('/')[0]}/camera_info": INFO for t in images}


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (["/front/color/image_raw", "/left/color/image_raw", "/rear/color/image_raw"], {"front", "left", "rear"}),
        (["/a/left/image", "/a/right/image", "/b/left/image"], {"a_left", "a_right", "b_left"}),
        (["/zed_f/rgb/image", "/zed_r/rgb/image"], {"zed_f", "zed_r"}),
        (["/v/cam_front/image", "/v/cam_back/image"], {"CAM_FRONT", "CAM_BACK"}),
        (["/front/color/image_raw", "/rear/color/image_raw", "/top/image_raw"], {"front_color", "rear_color", "top"}),
    ],
)
def test_cameras_that_are_named_alike_keep_their_number(images: list[str], names: set[str]) -> None:
    found = detect_topics(info_beside(*images))
    assert set(found.images) == names
    assert sorted(found.images.values()) == sorted(images)


def test_names_that_clash_are_an_error_that_names_both_topics() -> None:
    with pytest.raises(RecordingError, match=r"/x/a/b_c/image and /x/a_b/c/image|/x/a_b/c/image and /x/a/b_c/image"):
        detect_topics(info_beside("/x/a_b/c/image", "/x/a/b_c/image", "/y/c/image"))
    with pytest.raises(RecordingError, match="would both be camera 'CAM_FRONT'"):
        detect_topics(info_beside("/cam_front/image", "/CAM_FRONT/image"))


def test_other_forms_of_the_same_images_are_noted_and_depth_is_no_camera() -> None:
    topics = info_beside(
        "/front/image_raw", "/front/image_rect_color", "/front/depth/image_rect_raw", "/rear/image_raw"
    )
    found = detect_topics(topics | {"/front/image_raw/compressed": COMPRESSED})
    assert found.images == {"front": "/front/image_rect_color", "rear": "/rear/image_raw"}
    assert any("/front/image_raw" in note and "shows the same" in note for note in found.notes)
    assert any(note.startswith("/front/depth/image_rect_raw is not read") for note in found.notes)


def test_cameras_beside_those_of_a_scheme_are_not_lost() -> None:
    topics = BAGS["autoware"] | info_beside("/usb_cam/image_raw")
    assert set(detect_topics(topics).images) == {"camera0", "camera1", "usb_cam"}


def test_sensors_that_are_not_read_are_named_with_what_converts_them() -> None:
    packets = {"/velodyne_packets": "velodyne_msgs/msg/VelodyneScan", "/livox": "livox_ros_driver2/msg/CustomMsg"}
    notes = " ".join(detect_topics(info_beside("/front/image") | packets).notes)
    assert "/velodyne_packets [velodyne_msgs/msg/VelodyneScan] is not read" in notes
    assert "velodyne_transform_node" in notes
    assert "xfer_format 0" in notes
    with pytest.raises(RecordingError, match=r"/video \[foxglove_msgs/msg/CompressedVideo\] is not read: video"):
        detect_topics({"/video": "foxglove_msgs/msg/CompressedVideo"})


def test_every_topic_can_be_named_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "topics.yaml"
    path.write_text(
        "cameras:\n  front: {image: /f/image, info: /f/info, frame: f_optical}\n"
        "lidar: /points\nodometry: /pose\ntf: /robot/tf\ntf_static: /robot/tf_static\n"
    )
    topics = load_topics(path)
    assert (topics.tf, topics.tf_static, topics.frames) == ("/robot/tf", "/robot/tf_static", {"front": "f_optical"})
    import yaml

    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(topics_record(topics)))
    assert topics_record(load_topics(again)) == topics_record(topics)
    path.write_text("cameras: {a: {image: /f}, b: {image: /f}}\n")
    with pytest.raises(RecordingError, match="cameras a and b both name /f"):
        load_topics(path)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("lidar: [/a, /a]", "lidar is .*: want a topic, or a list of different ones"),
        ("lidar: []", "lidar is .*: want a topic, or a list of different ones"),
        ("lidar: [/a, 3]", "lidar is 3: want the name of a topic"),
        ("lidar: [/a, /b]\nlidar_origin: [0, 0, 1]", "lidar_origin is for one topic"),
    ],
)
def test_a_list_of_lidars_names_different_topics(tmp_path: Path, lines: str, reason: str) -> None:
    path = tmp_path / "topics.yaml"
    path.write_text(f"cameras:\n  front: {{image: /f/image}}\n{lines}\n")
    with pytest.raises(RecordingError, match=reason):
        load_topics(path)


def test_the_cameras_of_a_rig_are_the_topics_with_their_names() -> None:
    """No camera_info is needed; depth images and the node's own clouds are no input."""
    topics = {
        "/camera/Front/color/image_raw": RAW,
        "/camera/Front/color/image_raw/compressed": COMPRESSED,
        "/camera/Front/depth/image": RAW,
        "/rear/image": RAW,
        "/side/image": RAW,
        "/points": CLOUD,
        "/robot/perception/output/occupancy/points": CLOUD,
    }
    found = detect_topics(topics, cameras=("front", "rear"))
    assert found.images == {"front": "/camera/Front/color/image_raw/compressed", "rear": "/rear/image"}
    assert (found.infos, found.lidar) == ({}, "/points")
    with pytest.raises(
        RecordingError, match=r"the rig's camera 'left' as a part, as /left/image_raw has; name the topics"
    ):
        detect_topics(topics, cameras=("front", "left"))
