"""One frame set on its way from messages to voxels; every stage of the line adds what it makes to the same job."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import ArrayLike, NDArray

from occbev.results import FrameSet, Perception
from occbev.rig import CameraRig

Arrays = Mapping[str, NDArray[Any]]

MotionToKey = Mapping[str, ArrayLike]
"""Camera name -> (4, 4): ego at that camera's exposure -> ego at the key time."""


@dataclass(eq=False)
class FrameJob:
    """A frame set and what is known of it so far. Fields are in the order in which the stages fill them.

    Synchroniser: stamp_ns, the key time; images, camera -> what the caller pushed, with their stamps_ns; missing,
    camera -> reason; epoch, which counts clock jumps: stamps increase strictly within one; arrival_ns and emitted_ns,
    when the anchor came and when the set left (caller's clock).
    Gather: frame_set and rig; ego2global (4, 4) at the key time, None if unknown; motion, None if unknown, and why in motion_problem ("" where it is switched off); motion_note,
    what is worth knowing of it, such as that it is extrapolated;
    fresh, for the first set since a start or a clock jump, which builds on none before it; decode_ns of the slowest image.
    Prepare: inputs of the graph, and network_rig, the cameras that took these very images.
    wants_ground, whether the ground grid is made: it costs milliseconds, and not everybody needs it.
    Infer: outputs, a function that waits for the graph's outputs. Decode: perception.
    stage_ns: how long each stage took. begun_ns, decoded_ns, published_ns: when (steady clock).
    """

    stamp_ns: int
    images: Mapping[str, Any] = field(default_factory=dict)
    stamps_ns: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    epoch: int = 0
    arrival_ns: int = 0
    emitted_ns: int = 0

    frame_set: FrameSet | None = None
    rig: CameraRig | None = None
    ego2global: NDArray[Any] | None = None
    motion: MotionToKey | None = None
    motion_problem: str = ""
    motion_note: str = ""
    fresh: bool = False
    decode_ns: int = 0

    inputs: Arrays = field(default_factory=dict)
    network_rig: CameraRig | None = None
    wants_ground: bool = True
    outputs: Callable[[], Arrays] | None = None
    perception: Perception | None = None

    stage_ns: dict[str, int] = field(default_factory=dict)
    begun_ns: int = 0
    decoded_ns: int = 0
    published_ns: int = 0
    _lap_ns: int = 0

    def start_clock(self) -> None:
        """Start the clock of the next stage."""
        self._lap_ns = time.perf_counter_ns()

    def end_stage(self, name: str) -> None:
        """Note how long a stage took; the next one begins."""
        now_ns = time.perf_counter_ns()
        self.stage_ns[name] = now_ns - self._lap_ns
        self._lap_ns = now_ns

    @property
    def stages_ms(self) -> dict[str, float]:
        """How long each stage took."""
        return {name: ns / 1e6 for name, ns in self.stage_ns.items()}
