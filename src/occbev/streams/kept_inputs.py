"""A recorded replay as one bag: what the node read, compressed, what it put out, and the outcome of every key time.

Such a bag shows everything in Foxglove, RViz and `occbev view` without the bag that was played.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from occbev.graph import ACCOUNT, COMPRESSED, DEBUG_TYPE, IMAGE, OUTPUT_TOPICS, resolve
from occbev.messages.bags import BagMessage, BagReader, BagWriter, latched_topics, serialise, type_store
from occbev.messages.readers import MessageError, image_from_message, stamp_to_ns
from occbev.reports.summaries import PROCESSED
from occbev.streams.bag_jobs import topic_roles
from occbev.streams.parameters import PerceptionParameters

JPEG_QUALITY = 90

STAGE, DROPPED, MISSING = f"{ACCOUNT}processing_time/", f"{ACCOUNT}dropped/", f"{ACCOUNT}missing_cameras"
"""Topics of the account: milliseconds of a stage, key times lost so far for a reason, cameras missing from a result."""


def keep_inputs(
    writer: BagWriter,
    bag: BagReader,
    parameters: PerceptionParameters,
    frames: Iterable[Mapping[str, Any]],
    namespace: str = "",
) -> None:
    """Append what the node reads of a bag, and the outcome of each key time at the log time of its anchor image.

    frames: as `occbev.reports.summaries.frames_of` gives them. Raw images are written as JPEG under TOPIC/compressed;
    one that cannot be read stays as it is. Messages that are not in ROS 2's encoding are left out.
    """
    roles = topic_roles(parameters, namespace)
    topics = [topic for topic in roles if topic in bag.topics and bag.encodings[topic] == "cdr"]
    writer.latched |= latched_topics(bag.path)
    fates = defaultdict(list)
    for frame in frames:
        fates[frame["stamp_ns"]].append(frame)
    lost: Counter[str] = Counter()
    for message in bag.messages(topics):
        kept = compress_image(bag, message) if message.type == IMAGE else message
        writer.write(kept)
        if roles[message.topic] == ("image", parameters.anchor_camera):
            for frame in fates.pop(bag.stamp_ns(message), ()):
                for name, value in _account(frame, lost):
                    data = serialise(DEBUG_TYPE, float(value))
                    writer.write(BagMessage(resolve(name, namespace), DEBUG_TYPE, message.log_ns, data))


def compress_image(bag: BagReader, message: BagMessage) -> BagMessage:
    """Return an Image as the CompressedImage that image_transport would make of it; unchanged where it is unreadable."""
    record = bag.decode(message)
    try:
        image = image_from_message(record)
    except MessageError:
        return message
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        return message
    types = type_store().types
    time = types["builtin_interfaces/msg/Time"](*divmod(stamp_to_ns(record.header.stamp), 10**9))
    header = types["std_msgs/msg/Header"](time, record.header.frame_id)
    packed = serialise(COMPRESSED, header, "rgb8; jpeg compressed bgr8", np.asarray(data, np.uint8).reshape(-1))
    return replace(message, topic=f"{message.topic}/compressed", type=COMPRESSED, data=packed)


def latched_outputs(namespace: str = "") -> set[str]:
    """Return the outputs that the node offers to late comers, and /tf_static."""
    topics = [topic for topic in OUTPUT_TOPICS.values() if topic.quality.durability == "transient_local"]
    return {resolve(topic.name, namespace) for topic in topics} | {"/tf_static"}


def _account(frame: Mapping[str, Any], lost: Counter[str]) -> Iterator[tuple[str, float]]:
    """Yield (topic, value) of one key time; `lost` counts those that were not processed."""
    if frame["outcome"] != PROCESSED:
        lost[frame["outcome"]] += 1
        yield f"{DROPPED}{frame['outcome']}", lost[frame["outcome"]]
        return
    for stage, milliseconds in frame["stages_ms"].items():
        yield f"{STAGE}{stage}_ms", milliseconds
    yield MISSING, len(frame["missing"])
