"""One camera's side of the synchroniser: its waiting images, its learned offset and delay, its order, its clock."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Any, NamedTuple

LEARNED_MATCHES = 15
"""Matches over which a camera's offset is the median, and anchor gaps that give the period."""

REMEMBERED_STAMPS = 16
"""Stamps of each camera that are kept to recognise an image that is sent twice."""

LEADS = 8
"""Images over which the lead of a camera's clock is the least; messages that come in bursts seem ahead in turn."""

LEARNED_DELAYS, FEWEST_DELAYS = 30, 5
"""Latest arrivals of a camera that tell how long to wait for it, and how many there must be."""

IN_ORDER_AFTER = 1000
"""Images in order after which a camera is believed to send all of them so; new ones are."""

DELAY_MARGIN_NS = 20_000_000
"""A camera is waited for at least this much longer than it has taken lately."""


class StampedPayload(NamedTuple):
    """One image as the caller handed it in; `number` orders equal stamps without looking at payloads."""

    stamp_ns: int
    number: int
    payload: Any
    arrival_ns: int


class CameraStream:
    """What is known of one camera: its unmatched images, its offset to the anchor, whether it is alive."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pool: list[StampedPayload] = []
        self.newest_ns: int | None = None
        self.arrival_ns: int | None = None
        self.recent: deque[int] = deque(maxlen=REMEMBERED_STAMPS)
        self.matches: deque[int] = deque()
        self.ordered: list[int] = []
        self.offset_ns = 0
        self.misses = 0
        self.awaited = True
        self.suspects: list[StampedPayload] = []
        self.leads: deque[int] = deque(maxlen=LEADS)
        self.delays: deque[int] = deque(maxlen=LEARNED_DELAYS)
        self.clock_problem = ""
        self.in_order = IN_ORDER_AFTER

    @property
    def locked(self) -> bool:
        """Whether the offset to the anchor is known."""
        return bool(self.matches)

    def learn(self, offset_ns: int) -> None:
        """Take the offset of one more match."""
        ordered = self.ordered
        if len(ordered) == LEARNED_MATCHES:
            del ordered[bisect_left(ordered, self.matches.popleft())]
        self.matches.append(offset_ns)
        insort(ordered, offset_ns)
        self.offset_ns = ordered[len(ordered) // 2]

    def unlearn(self) -> None:
        """Forget the offset."""
        self.matches.clear()
        self.ordered.clear()
        self.offset_ns = 0

    def patience_ns(self, timeout_ns: int) -> int:
        """How long after the anchor's arrival an image of this camera can still come."""
        if len(self.delays) < FEWEST_DELAYS:
            return timeout_ns
        latest = max(self.delays)
        if min(self.delays) > timeout_ns:
            return 0  # it always comes too late
        return min(timeout_ns, max(0, latest) + max(DELAY_MARGIN_NS, latest - min(self.delays)))

    def take_nearest(self, expected_ns: int, window_ns: int) -> StampedPayload | None:
        """Remove and return the waiting image nearest to `expected_ns`, if one is within the window."""
        pool = self.pool
        best = bisect_left(pool, (expected_ns,))
        if best == len(pool) or (best and expected_ns - pool[best - 1].stamp_ns <= pool[best].stamp_ns - expected_ns):
            best -= 1
        if not pool or abs(pool[best].stamp_ns - expected_ns) > window_ns:
            return None
        return pool.pop(best)
