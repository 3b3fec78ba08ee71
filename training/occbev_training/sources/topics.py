"""Which topic of a bag holds what: the naming schemes seen in the wild, and mappings given by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from occbev_training.sources.recording import RecordingError

COMPRESSED, RAW = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image"
IMAGE_TYPES = (COMPRESSED, RAW)
INFO, CLOUD = "sensor_msgs/msg/CameraInfo", "sensor_msgs/msg/PointCloud2"
TF_TOPIC, TF_STATIC_TOPIC = "/tf", "/tf_static"
ODOMETRY, POSE = "nav_msgs/msg/Odometry", "geometry_msgs/msg/PoseStamped"


@dataclass(frozen=True)
class BagTopics:
    """Which topics of a bag hold what.

    images, infos: camera -> topic; infos may lack cameras whose calibration comes from a rig file.
    lidar: PointCloud2. odometry: Odometry or PoseStamped; None takes poses from `tf`.
    tf, tf_static: topics of TFMessage. frames: camera -> optical frame, where its messages name another.
    profile: name of the scheme that was recognised. notes: what a user should know of how topics were chosen.
    """

    images: Mapping[str, str]
    infos: Mapping[str, str]
    lidar: str | None = None
    odometry: str | None = None
    profile: str = "given"
    tf: str = TF_TOPIC
    tf_static: str = TF_STATIC_TOPIC
    frames: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        """Every topic that is named."""
        others = [topic for topic in (self.lidar, self.odometry) if topic is not None]
        return [*self.images.values(), *self.infos.values(), *others]


@dataclass(frozen=True)
class Profile:
    """One naming scheme. Patterns match whole topic names in any case; `camera` names the camera.

    info: topic of the calibration with the camera's text put in, None where the scheme has none.
    lidar, odometry: patterns in order of preference. compensated: whether clouds without per-point
    time are already compensated to their stamp, as those of nuScenes are. poses_in_tf: poses are those
    of /tf, and a topic of poses holds something else.
    """

    name: str
    image: str
    info: str | None
    lidar: Sequence[str]
    odometry: Sequence[str] = ()
    compensated: bool = False
    poses_in_tf: bool = False

    def match(self, topics: Mapping[str, str]) -> BagTopics | None:
        """Return the topics (name -> type) of this scheme, or None where no camera follows it."""
        images: dict[str, str] = {}
        infos: dict[str, str] = {}
        for topic in sorted(topics, key=lambda name: topics[name] == COMPRESSED):
            found = re.fullmatch(self.image, topic, re.IGNORECASE)
            if found is None or topics[topic] not in IMAGE_TYPES:
                continue
            text = found["camera"]
            info = None if self.info is None else self.info.format(camera=text)
            if info is not None and topics.get(info) != INFO:
                continue
            name = camera_name(text)
            images[name] = topic  # a compressed image replaces the raw one
            if info is not None:
                infos[name] = info
        if not images:
            return None
        lidar = _first(topics, self.lidar, (CLOUD,))
        odometry = _first(topics, self.odometry, (ODOMETRY, POSE))
        return BagTopics(images, infos, lidar, odometry, self.name)


PROFILES: tuple[Profile, ...] = (
    Profile(
        "occbev",
        r"/(?P<camera>cam_\w+)/image(_raw)?(/compressed)?",
        "/{camera}/camera_info",
        ("/lidar_top/points",),
        ("/odometry",),
        compensated=True,
    ),
    Profile(
        "nuscenes2mcap",
        r"/(?P<camera>cam_\w+)/image_rect_compressed",
        "/{camera}/camera_info",
        ("/lidar_top",),
        (),
        compensated=True,
        poses_in_tf=True,
    ),
    Profile("nuscenes2bag", r"/?(?P<camera>cam_\w+)/raw", None, ("/?lidar_top",), ("/?odom",), compensated=True),
    Profile(
        "ros2_dataset_bridge",
        r"/nuscenes/(?P<camera>cam_\w+)/image",
        "/nuscenes/{camera}/camera_info",
        ("/nuscenes/lidar_top/data",),
        (),
        compensated=True,
    ),
    Profile(
        "autoware",
        r"/sensing/camera/(?P<camera>\w+)/image_(rect_color|raw)(/compressed)?",
        "/sensing/camera/{camera}/camera_info",
        (
            r"/sensing/lidar/top/pointcloud_raw(_ex)?",
            r"/sensing/lidar/top/pointcloud\w*",
            r"/sensing/lidar/\w*top\w*/.*",
            r"/sensing/lidar/(?!concatenated).*",
        ),
        ("/localization/kinematic_state", "/localization/pose_twist_fusion_filter/pose"),
    ),
)
"""The schemes that `detect_topics` knows; see the README for where they are used."""

PROFILE_NAMES = ("auto", *(profile.name for profile in PROFILES))


def camera_name(text: str) -> str:
    """Return a camera's name in a rig: upper case where it begins with "cam_", as nuScenes has it."""
    return text.upper() if text.lower().startswith("cam_") else text


def is_compensated(profile: str) -> bool:
    """Whether clouds of a scheme, where they hold no times, are compensated to their stamp."""
    return any(known.name == profile and known.compensated for known in PROFILES)


def detect_topics(topics: Mapping[str, str], profile: str = "auto") -> BagTopics:
    """Find cameras, LiDAR and odometry among topics (name -> type) by type and by name.

    profile: a scheme of `PROFILES`, or "auto" for the one that fits most cameras; where none fits, a
    camera is any image topic with a `camera_info` beside it, named after their folder.

    Raises:
        RecordingError: no camera is found, or several topics could be the LiDAR or the odometry.
    """
    if profile not in PROFILE_NAMES:
        raise RecordingError(f"profile {profile!r}; known are {', '.join(PROFILE_NAMES)}")
    wanted = [known for known in PROFILES if profile in ("auto", known.name)]
    found = [match for known in wanted if (match := known.match(topics)) is not None]
    if profile != "auto" and not found:
        raise RecordingError(f"no camera of profile {profile}: {wanted[0].image}; topics are {listed(topics)}")
    best = max(found, key=lambda match: len(match.images), default=None)
    if best is None:
        return _by_neighbours(topics)
    lidar = best.lidar or _only(topics, CLOUD, "lidar")
    odometry = best.odometry
    if not any(known.name == best.profile and known.poses_in_tf for known in PROFILES):
        odometry = odometry or _only(topics, ODOMETRY, "odom") or _only(topics, POSE, "pose")
    return BagTopics(best.images, best.infos, lidar, odometry, best.profile)


def _by_neighbours(topics: Mapping[str, str]) -> BagTopics:
    """Take every image topic with a `camera_info` beside it as a camera."""
    images: dict[str, str] = {}
    infos: dict[str, str] = {}
    for topic in sorted(topics, key=lambda name: topics[name] == COMPRESSED):
        folder = topic.removesuffix("/compressed").rpartition("/")[0]
        if topics[topic] not in IMAGE_TYPES or f"{folder}/camera_info" not in topics:
            continue
        name = camera_name(folder.rpartition("/")[2])
        images[name], infos[name] = topic, f"{folder}/camera_info"
    if not images:
        raise RecordingError(f"no image topic with a camera_info beside it; topics are {listed(topics)}")
    odometry = _only(topics, ODOMETRY, "odom") or _only(topics, POSE, "pose")
    return BagTopics(images, infos, _only(topics, CLOUD, "lidar"), odometry, "camera_info beside images")


def _first(topics: Mapping[str, str], patterns: Sequence[str], types: Sequence[str]) -> str | None:
    """Return the topic that fits the earliest pattern; among several, the first by name."""
    for pattern in patterns:
        fitting = sorted(
            name for name, kind in topics.items() if kind in types and re.fullmatch(pattern, name, re.IGNORECASE)
        )
        if fitting:
            return fitting[0]
    return None


def _only(topics: Mapping[str, str], msgtype: str, hint: str) -> str | None:
    """Return the topic of a type; among several, the one whose name holds the hint."""
    found = [name for name, kind in topics.items() if kind == msgtype]
    hinted = [name for name in found if hint in name.lower()]
    choice = found if len(found) < 2 else hinted
    if len(found) > 1 and len(hinted) != 1:
        raise RecordingError(f"several topics of type {msgtype}: {sorted(found)}; name one in a file for --topics")
    return choice[0] if choice else None


def listed(topics: Mapping[str, str]) -> str:
    """Return topics with their types as one line."""
    return ", ".join(f"{name} [{kind}]" for name, kind in sorted(topics.items())) or "none"


def load_topics(path: Path) -> BagTopics:
    """Read a mapping given by hand as YAML: cameras (name -> image, info), lidar, odometry.

    info may be left out where a rig file is given.

    Raises:
        RecordingError: naming the file and the key that is unknown or missing.
    """
    try:
        record: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RecordingError(f"{path}: {error}") from error
    known = {"cameras", "lidar", "odometry"}
    if not isinstance(record, dict) or not record.get("cameras") or set(record) - known:
        raise RecordingError(
            f"{path}: wants the keys {sorted(known)}, cameras with at least one; it has "
            f"{sorted(record) if isinstance(record, dict) else type(record).__name__}"
        )
    images: dict[str, str] = {}
    infos: dict[str, str] = {}
    for name, entry in record["cameras"].items():
        if not isinstance(entry, dict) or "image" not in entry or set(entry) - {"image", "info"}:
            raise RecordingError(f"{path}: cameras.{name} wants image: TOPIC and info: TOPIC; got {entry}")
        images[str(name)] = str(entry["image"])
        if "info" in entry:
            infos[str(name)] = str(entry["info"])
    return BagTopics(images, infos, record.get("lidar"), record.get("odometry"), str(path.name))
