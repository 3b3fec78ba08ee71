"""A short bag of pictures, played forth and back at any rate for as long as wanted: the load of a live benchmark.

It has the part of the interface of `BagReader` that the player uses. Only the stamps of the messages change.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from occbev.graph import CAMERA_INFO, COMPRESSED
from occbev.messages.bags import TF_TYPE, BagError, BagMessage, BagReader
from occbev.messages.readers import header_stamp

LEAD_NS = 300_000_000
"""Poses begin this long before the first image and end as long after the last one."""

ODOMETRY_TYPE = "nav_msgs/msg/Odometry"
STATIC_TYPE_PLACE = 8
"""Where the first transform's stamp begins in a TFMessage: after the encapsulation and the number of transforms."""


class PacedBag:
    """The image sets of a bag in the order 0 1 2 1 0 1 ..., one every `1 / rate` seconds, with the poses between them.

    The vehicle drives forth and back: poses and images belong together, and no pose jumps. Its speed grows with the
    rate. Cameras fire as far apart as in the bag.
    """

    def __init__(self, bag: BagReader, rate: float, sets: int) -> None:
        """Read the bag, which needs as many images of each camera. rate: image sets a second. sets: how many are played.

        Raises:
            BagError: cameras have different numbers of images, or fewer than two.
        """
        self.path: Path = bag.path
        self.notes: list[str] = []
        self._bag_messages = [m for m in bag.messages() if m.type in (COMPRESSED, CAMERA_INFO, ODOMETRY_TYPE, TF_TYPE)]
        self.topics: Mapping[str, str] = {m.topic: m.type for m in self._bag_messages}
        self.encodings: Mapping[str, Literal["cdr"]] = dict.fromkeys(self.topics, "cdr")
        self._frames = {t: self._of(t) for t, kind in self.topics.items() if kind in (COMPRESSED, CAMERA_INFO)}
        counts = {topic: len(messages) for topic, messages in self._frames.items()}
        if not counts or len(set(counts.values())) > 1 or min(counts.values()) < 2:
            raise BagError(f"{bag.path}: every camera needs the same number of images, at least two; it has {counts}")
        first = next(iter(self._frames.values()))
        self._keys_ns = [_stamp(message) for message in first]
        self._period_ns, self._sets = round(1e9 / rate), sets
        self._begin_ns = self._keys_ns[0]
        self.span_ns = (self._begin_ns - LEAD_NS, self._begin_ns + (sets - 1) * self._period_ns + LEAD_NS)

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Yield the messages of the named topics, or of all, in the order of their stamps."""
        wanted = set(self.topics if topics is None else topics)
        streams = [self._images(topic) for topic in self._frames if topic in wanted]
        streams += [self._poses(topic) for topic in self.topics if topic in wanted and topic not in self._frames]
        return heapq.merge(*streams, key=lambda message: message.log_ns)

    def _of(self, topic: str) -> list[BagMessage]:
        return [message for message in self._bag_messages if message.topic == topic]

    def _images(self, topic: str) -> Iterator[BagMessage]:
        messages = self._frames[topic]
        offset_ns = _stamp(messages[0]) - self._keys_ns[0]
        for number in range(self._sets):
            message = messages[fold(number, len(messages) - 1)]
            yield _restamp(message, self._begin_ns + number * self._period_ns + offset_ns)

    def _poses(self, topic: str) -> Iterator[BagMessage]:
        """Yield fixed transforms once, and the poses of one way between first and last image, forth and back."""
        messages = self._of(topic)
        if len(messages) == 1:
            yield _restamp(messages[0], self.span_ns[0])
            return
        first_ns, last_ns = self._keys_ns[0], self._keys_ns[-1]
        way = [message for message in messages if first_ns <= _stamp(message) <= last_ns]
        way_ns = self._period_ns * (len(self._keys_ns) - 1)
        scale = way_ns / (last_ns - first_ns)
        passed = -(-LEAD_NS // way_ns)
        for number in range(-passed, 2 + (self._sets * self._period_ns + LEAD_NS) // way_ns):
            start_ns = self._begin_ns + number * way_ns
            for message in way if number % 2 == 0 else reversed(way):
                along = _stamp(message) - first_ns if number % 2 == 0 else last_ns - _stamp(message)
                stamp_ns = start_ns + round(along * scale)
                if along < last_ns - first_ns and self.span_ns[0] <= stamp_ns <= self.span_ns[1]:
                    yield _restamp(message, stamp_ns)


def fold(number: int, last: int) -> int:
    """Return the place of step `number` on the way 0 1 ... last ... 1 0 1 ..."""
    place = number % (2 * last)
    return min(place, 2 * last - place)


def _place(message: BagMessage) -> int:
    return STATIC_TYPE_PLACE if message.type == TF_TYPE else 4


def _stamp(message: BagMessage) -> int:
    return header_stamp(message.data, _place(message))


def _restamp(message: BagMessage, stamp_ns: int) -> BagMessage:
    """Return the message with another stamp, of a TFMessage the first transform's."""
    order, at = "<" if message.data[1] & 1 else ">", _place(message)
    stamp = struct.pack(order + "iI", *divmod(stamp_ns, 1_000_000_000))
    return replace(message, log_ns=stamp_ns, data=message.data[:at] + stamp + message.data[at + 8 :])
