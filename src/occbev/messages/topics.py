"""Which topic of a bag holds what: the naming schemes seen in the wild, and files in which all topics are named.

One such file serves `occbev-train bag-check`, `pairs` and `prepare`, `occbev overlay` and the node's parameter `topics`;
`occbev rig BAG` writes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from occbev.files import read_yaml
from occbev.graph import is_output
from occbev.messages.readers import is_rectified
from occbev.results import RecordingError

COMPRESSED, RAW = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image"
IMAGE_TYPES = (COMPRESSED, RAW)
INFO, CLOUD = "sensor_msgs/msg/CameraInfo", "sensor_msgs/msg/PointCloud2"
TF_TOPIC, TF_STATIC_TOPIC = "/tf", "/tf_static"
ODOMETRY, POSE = "nav_msgs/msg/Odometry", "geometry_msgs/msg/PoseStamped"
POSE_TYPES = (ODOMETRY, POSE, "geometry_msgs/msg/PoseWithCovarianceStamped")
"""Types of messages that tell where the vehicle is."""


Place = tuple[float, float, float]


@dataclass(frozen=True)
class LidarSensor:
    """One sensor of a merged cloud: the points whose field holds values from `first` to `last`.

    origin: where it stands in the vehicle's frame, or the name of its own frame.
    """

    first: float
    last: float
    origin: Place | str


@dataclass(frozen=True)
class BagTopics:
    """Which topics of a bag hold what.

    images, infos: camera -> topic; infos may lack cameras whose calibration comes from a rig file.
    lidar: PointCloud2. other_lidars: those of further LiDARs, whose clouds are joined to its.
    odometry: Odometry, PoseStamped or PoseWithCovarianceStamped; None takes poses from `tf`.
    tf, tf_static: topics of TFMessage. frames: camera -> optical frame, where its messages name another.
    lidar_origin: where the sensor of clouds in the vehicle's own frame stands in it, in metres. lidar_field, sensors: the
    field that tells the sensors of a merged cloud apart, and each of them.
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
    lidar_origin: Place | None = None
    lidar_field: str = ""
    sensors: tuple[LidarSensor, ...] = ()
    notes: tuple[str, ...] = ()
    other_lidars: tuple[str, ...] = ()

    @property
    def lidars(self) -> list[str]:
        """The topics of all LiDARs."""
        return [*([] if self.lidar is None else [self.lidar]), *self.other_lidars]

    @property
    def all(self) -> list[str]:
        """Every topic that is named."""
        poses = [] if self.odometry is None else [self.odometry]
        return [*self.images.values(), *self.infos.values(), *self.lidars, *poses]


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
        found: list[_Seen] = []
        for topic, kind in topics.items():
            match = re.fullmatch(self.image, topic, re.IGNORECASE)
            if match is None or kind not in IMAGE_TYPES:
                continue
            text = match["camera"]
            info = None if self.info is None else self.info.format(camera=text)
            if info is None or topics.get(info) == INFO:
                found.append(_Seen(topic, kind, info, text))
        if not found:
            return None
        images, infos, notes = _one_topic_each(found, {seen.place: camera_name(seen.place) for seen in found})
        lidar = _first(topics, self.lidar, (CLOUD,))
        odometry = _first(topics, self.odometry, (ODOMETRY, POSE))
        return BagTopics(images, infos, lidar, odometry, self.name, notes=notes)


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


def front_camera(names: Sequence[str]) -> str:
    """Return the camera that looks straight ahead by its name, or the first."""
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    ahead = [name for name in names if words[name] & {"front", "forward"} and not words[name] & {"left", "right"}]
    return (ahead or list(names))[0]


def is_compensated(profile: str) -> bool:
    """Whether clouds of a scheme, where they hold no times, are compensated to their stamp."""
    return any(known.name == profile and known.compensated for known in PROFILES)


def detect_topics(topics: Mapping[str, str], profile: str = "auto", cameras: Sequence[str] = ()) -> BagTopics:
    """Find cameras, LiDAR and odometry among topics (name -> type) by type and by name; occbev's own outputs are no input.

    profile: a scheme of `PROFILES`, or "auto" for the one that fits most cameras; where none fits, a
    camera is any image topic with a `camera_info` beside it, named after their folder.
    cameras: names of a rig file, which needs no `camera_info`: a camera is the image topic with its name as a part.

    Raises:
        RecordingError: no camera is found, or several topics could be the LiDAR or the odometry.
    """
    topics = {topic: kind for topic, kind in topics.items() if not is_output(topic)}
    if profile not in PROFILE_NAMES:
        raise RecordingError(f"profile {profile!r}; known are {', '.join(PROFILE_NAMES)}")
    wanted = [known for known in PROFILES if profile in ("auto", known.name)]
    found = [match for known in wanted if (match := known.match(topics)) is not None]
    if profile != "auto" and not found:
        raise RecordingError(f"no camera of profile {profile}: {wanted[0].image}; topics are {listed(topics)}")
    best = max(found, key=lambda match: len(match.images), default=None)
    if cameras:
        best = _by_names(best or BagTopics({}, {}, profile="cameras of the rig"), topics, cameras)
    elif best is None:
        best = _by_neighbours(topics)
    elif profile == "auto":
        best = _with_neighbours(best, topics)
    lidar = best.lidar or _only(topics, CLOUD, "lidar")
    odometry = best.odometry
    if not any(known.name == best.profile and known.poses_in_tf for known in PROFILES):
        odometry = odometry or _only(topics, ODOMETRY, "odom") or _only(topics, POSE, "pose")
    return replace(best, lidar=lidar, odometry=odometry, notes=(*best.notes, *unread_topics(topics)))


@dataclass(frozen=True)
class _Seen:
    """An image topic with its calibration's; place: what its camera is named after."""

    topic: str
    kind: str
    info: str | None
    place: str

    @property
    def rank(self) -> tuple[bool, bool, bool, str]:
        """Preference among the topics of one camera: rectified, in colour, compressed."""
        return bool(is_rectified(self.topic)), "color" in self.topic, self.kind == COMPRESSED, self.topic


def _one_topic_each(
    found: Sequence[_Seen], names: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Return one image topic of each camera, its calibration, and notes on other forms of the same images.

    names: place -> name of its camera. Raises RecordingError where two places get one name.
    """
    images: dict[str, str] = {}
    infos: dict[str, str] = {}
    notes: list[str] = []
    places: dict[str, str] = {}
    for seen in sorted(found, key=lambda seen: seen.rank, reverse=True):
        name = names[seen.place]
        if places.setdefault(name, seen.place) != seen.place:
            raise RecordingError(
                f"{images[name]} and {seen.topic} would both be camera {name!r}; give them names in a file for --topics"
            )
        if name not in images:
            images[name] = seen.topic
            infos |= {} if seen.info is None else {name: seen.info}
        elif _base_topic(seen.topic) != _base_topic(images[name]):
            notes.append(f"camera {name} is {images[name]}; {seen.topic} shows the same and is not read")
    return dict(sorted(images.items())), infos, tuple(notes)


def _base_topic(topic: str) -> str:
    return topic.removesuffix("/compressed")


def _by_neighbours(topics: Mapping[str, str]) -> BagTopics:
    """Take every image topic with a `camera_info` beside it as a camera, but for depth images."""
    found, notes = _neighbours(topics)
    if not found:
        more = "".join(f"; {note}" for note in (*notes, *unread_topics(topics)))
        if any(kind in IMAGE_TYPES for kind in topics.values()):
            more += "; without camera_info, a rig file has the calibration: occbev rig BAG --rig RIG.yaml --out vehicle"
        raise RecordingError(f"no image topic with a camera_info beside it; topics are {listed(topics)}{more}")
    images, infos, others = _one_topic_each(found, name_places([seen.place for seen in found]))
    return BagTopics(images, infos, None, None, "camera_info beside images", notes=(*notes, *others))


def _with_neighbours(best: BagTopics, topics: Mapping[str, str]) -> BagTopics:
    """Add the cameras that a scheme does not know, so that none is lost."""
    known = set(best.infos.values())
    found = [seen for seen in _neighbours(topics)[0] if seen.info not in known and best.infos]
    if not found:
        return best
    images, infos, notes = _one_topic_each(found, name_places([seen.place for seen in found]))
    both = sorted(set(images) & set(best.images))
    if both:
        raise RecordingError(
            f"{best.images[both[0]]} and {images[both[0]]} would both be camera {both[0]!r}; "
            "give them names in a file for --topics"
        )
    return replace(best, images={**best.images, **images}, infos={**best.infos, **infos}, notes=(*best.notes, *notes))


def _by_names(best: BagTopics, topics: Mapping[str, str], cameras: Sequence[str]) -> BagTopics:
    """Take as each camera the image topic that has its name as a part, in any case; depth images are none."""
    found, notes = _pictures(topics)
    named = [(seen, name) for seen in found for name in cameras if name.lower() in seen.topic.lower().split("/")]
    absent = sorted(set(cameras) - {name for _, name in named})
    if absent:
        raise RecordingError(
            f"no image topic has the name of the rig's camera {absent[0]!r} as a part, as /{absent[0]}/image_raw has; "
            f"name the topics in a file for --topics, or rename the camera in the rig; topics are {listed(topics)}"
        )
    images, infos, others = _one_topic_each([seen for seen, _ in named], {seen.place: name for seen, name in named})
    return replace(best, images=images, infos=infos, notes=(*notes, *others))


def _neighbours(topics: Mapping[str, str]) -> tuple[list[_Seen], list[str]]:
    """Return the image topics with a `camera_info` beside them, and notes on those that hold no pictures."""
    beside = {topic: kind for topic, kind in topics.items() if topics.get(_info_beside(topic)) == INFO}
    found, notes = _pictures(beside)
    return [replace(seen, info=_info_beside(seen.topic)) for seen in found], notes


def _pictures(topics: Mapping[str, str]) -> tuple[list[_Seen], list[str]]:
    """Return the image topics, and notes on those that hold no pictures."""
    found, notes = [], []
    for topic, kind in sorted(topics.items()):
        if kind not in IMAGE_TYPES:
            continue
        if any(word in NO_PICTURES for word in re.split("[/_]", topic.lower())) or topic.endswith("compressedDepth"):
            notes.append(f"{topic} is not read: its name says that it holds no pictures")
            continue
        found.append(_Seen(topic, kind, None, _base_topic(topic).rpartition("/")[0]))
    return found, notes


def _info_beside(topic: str) -> str:
    return f"{_base_topic(topic).rpartition('/')[0]}/camera_info"


NO_PICTURES = frozenset({"depth", "disparity", "confidence", "aligned", "theora"})
"""Words in topics of images that are no pictures of a camera."""


def name_places(places: Sequence[str]) -> dict[str, str]:
    """Name cameras after the folders of their topics: the last part where that tells them apart.

    Else what differs: /front/color and /rear/color are front and rear, /a/left and /b/left are a and b.
    """
    paths = {place: tuple(part for part in place.split("/") if part) or (place,) for place in places}
    last = {place: path[-1] for place, path in paths.items()}
    if len({name.lower() for name in last.values()}) == len(last):
        return {place: camera_name(name) for place, name in last.items()}
    head = _count_common(list(paths.values()))
    tail = _count_common([path[head:][::-1] for path in paths.values()])
    return {place: camera_name("_".join(path[head : len(path) - tail]) or path[-1]) for place, path in paths.items()}


def _count_common(paths: Sequence[tuple[str, ...]]) -> int:
    """Return with how many parts all paths begin alike."""
    return next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths)))


UNREAD = {
    r".*/FFMPEGPacket|.*/CompressedVideo|.*/H26[45].*": "video; decode it to images, with `ros2 run image_transport "
    "republish ffmpeg raw` of ffmpeg_image_transport",
    r"theora_image_transport/msg/Packet": "video; `ros2 run image_transport republish theora compressed` makes images",
    r"velodyne_msgs/.*": "packets of a Velodyne; velodyne_pointcloud's velodyne_transform_node makes PointCloud2",
    r"ouster_(sensor_)?msgs/.*": "packets of an Ouster; ouster_ros's os_cloud makes PointCloud2",
    r"(pandar|hesai_ros_driver)(_msgs)?/.*": "packets of a Hesai; its driver or nebula makes PointCloud2",
    r"nebula_msgs/.*": "packets for nebula, which makes PointCloud2 of them",
    r"(rslidar|robosense|rslidar_msg)(_msgs)?/.*": "packets of a RoboSense; rslidar_sdk makes PointCloud2",
    r"livox_(ros_driver2?|interfaces)/.*Custom.*": "Livox's own messages; record with xfer_format 0, or convert them "
    "with livox_to_pointcloud2",
    r"point_cloud_interfaces/.*": "compressed clouds; `ros2 run point_cloud_transport republish` makes PointCloud2",
}
"""Types of sensor messages that are not read -> what they are and what converts them."""


def unread_topics(topics: Mapping[str, str]) -> tuple[str, ...]:
    """Return a line for each topic of a sensor that is not read, with the tool that converts it."""
    return tuple(
        f"{topic} [{kind}] is not read: {advice}"
        for topic, kind in sorted(topics.items())
        for pattern, advice in UNREAD.items()
        if re.fullmatch(pattern, kind)
    )


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
        several = ", or all of them as a list" if msgtype == CLOUD else ""
        raise RecordingError(
            f"several topics of type {msgtype}: {sorted(found)}; name one{several} in a file for --topics"
        )
    return choice[0] if choice else None


def listed(topics: Mapping[str, str]) -> str:
    """Return topics with their types as one line."""
    return ", ".join(f"{name} [{kind}]" for name, kind in sorted(topics.items())) or "none"


def load_topics(path: Path) -> BagTopics:
    """Read a file in which all topics are named.

    cameras:                                   # as many as there are; the names are the rig's
      front: {image: /front/color/image_raw, info: /front/color/camera_info, frame: front_optical}
    lidar: /points                             # PointCloud2, or a list of them; leave it out for a vehicle without
    odometry: /odom                            # Odometry or a stamped pose; left out: poses come from tf
    tf: /tf
    tf_static: /tf_static
    lidar_origin: [1.2, 0.0, 1.9]              # only for clouds in base_link itself: where the sensor stands, metres
    lidar_sensors:                             # or, for a cloud that several sensors measured, each of them
      field: ring                              # what tells them apart
      sensors:
        - {from: 0, to: 63, origin: [1.2, 0.0, 1.9]}
        - {from: 64, to: 95, origin: left_lidar}   # or a frame of tf_static

    info may be left out where a rig file is given, frame where the messages name the optical frame, tf and tf_static
    where they have these names.

    Raises:
        RecordingError: naming the file and the key that is unknown or missing.
    """
    try:
        record: Any = read_yaml(path)
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path}: {error}") from error
    known = {"cameras", "lidar", "lidar_origin", "lidar_sensors", *_PLAIN_KEYS}
    if not isinstance(record, dict) or not isinstance(record.get("cameras"), dict) or set(record) - known:
        found = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise RecordingError(f"{path}: wants the keys {sorted(known)}, cameras with at least one; it has {found}")
    if not record["cameras"]:
        raise RecordingError(f"{path}: cameras names none")
    parts: dict[str, dict[str, str]] = {"image": {}, "info": {}, "frame": {}}
    for name, entry in record["cameras"].items():
        if not isinstance(entry, dict) or "image" not in entry or set(entry) - set(parts):
            raise RecordingError(
                f"{path}: cameras.{name} wants image: TOPIC, info: TOPIC and, if need be, frame: NAME; got {entry}"
            )
        for key, value in entry.items():
            parts[key][str(name)] = _as_text(path, f"cameras.{name}.{key}", value)
    others = {key: _as_text(path, key, record[key]) for key in _PLAIN_KEYS if record.get(key) is not None}
    _refuse_shared(path, parts["image"])
    lidar, *other_lidars = _read_lidars(path, record)
    return BagTopics(
        parts["image"],
        parts["info"],
        lidar,
        others.get("odometry"),
        path.name,
        others.get("tf", TF_TOPIC),
        others.get("tf_static", TF_STATIC_TOPIC),
        parts["frame"],
        None if record.get("lidar_origin") is None else _as_place(path, "lidar_origin", record["lidar_origin"]),
        *_read_sensors(path, record.get("lidar_sensors")),
        other_lidars=tuple(str(topic) for topic in other_lidars),
    )


def _read_lidars(path: Path, record: Mapping[str, Any]) -> list[str | None]:
    """Return the topics of LiDARs, the one whose clouds are the sweeps first; it alone is None without any."""
    given = record.get("lidar")
    if given is None:
        return [None]
    topics = [_as_text(path, "lidar", topic) for topic in (given if isinstance(given, list) else [given])]
    if not topics or len(set(topics)) < len(topics):
        raise RecordingError(f"{path}: lidar is {given!r}: want a topic, or a list of different ones")
    both = [key for key in ("lidar_origin", "lidar_sensors") if record.get(key) is not None]
    if len(topics) > 1 and both:
        raise RecordingError(f"{path}: {both[0]} is for one topic; of several LiDARs tf tells where each stands")
    return list(topics)


def _as_place(path: Path, key: str, value: Any) -> Place:
    numbers = isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
    if not numbers or not all(map(math.isfinite, value)):
        raise RecordingError(f"{path}: {key} is {value!r}: want x, y and z in metres")
    return float(value[0]), float(value[1]), float(value[2])


def _read_sensors(path: Path, record: Any) -> tuple[str, tuple[LidarSensor, ...]]:
    if record is None:
        return "", ()
    wanted = "want field: NAME and sensors: [{from, to, origin}, ...]"
    if not isinstance(record, dict) or set(record) != {"field", "sensors"} or not isinstance(record["sensors"], list):
        raise RecordingError(f"{path}: lidar_sensors is {record!r}: {wanted}")
    found = []
    for number, entry in enumerate(record["sensors"]):
        key = f"lidar_sensors.sensors[{number}]"
        if not isinstance(entry, dict) or set(entry) != {"from", "to", "origin"}:
            raise RecordingError(f"{path}: {key} is {entry!r}: {wanted}")
        origin = entry["origin"]
        place = origin if isinstance(origin, str) else _as_place(path, f"{key}.origin", origin)
        found.append(LidarSensor(float(entry["from"]), float(entry["to"]), place))
    if not found:
        raise RecordingError(f"{path}: lidar_sensors names none: {wanted}")
    return _as_text(path, "lidar_sensors.field", record["field"]), tuple(found)


_PLAIN_KEYS = ("odometry", "tf", "tf_static")


def _as_text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RecordingError(f"{path}: {key} is {value!r}: want the name of a topic or frame")
    return value


def _refuse_shared(path: Path, images: Mapping[str, str]) -> None:
    for name, topic in images.items():
        other = next(other for other, known in images.items() if known == topic)
        if other != name:
            raise RecordingError(f"{path}: cameras {other} and {name} both name {topic}")


def topics_record(topics: BagTopics) -> dict[str, Any]:
    """Return what `load_topics` reads."""
    cameras = {
        name: {"image": image}
        | ({"info": topics.infos[name]} if name in topics.infos else {})
        | ({"frame": topics.frames[name]} if name in topics.frames else {})
        for name, image in topics.images.items()
    }
    record: dict[str, Any] = {key: getattr(topics, key) for key in _PLAIN_KEYS if getattr(topics, key) is not None}
    if topics.lidars:
        record = {"lidar": topics.lidars if topics.other_lidars else topics.lidar} | record
    if topics.lidar_origin is not None:
        record["lidar_origin"] = list(topics.lidar_origin)
    if topics.sensors:
        record["lidar_sensors"] = {"field": topics.lidar_field, "sensors": [_sensor_record(s) for s in topics.sensors]}
    return {"cameras": cameras, **record}


def _sensor_record(sensor: LidarSensor) -> dict[str, Any]:
    origin = sensor.origin if isinstance(sensor.origin, str) else list(sensor.origin)
    return {"from": sensor.first, "to": sensor.last, "origin": origin}
