"""The memory of a network: its state after the previous frame, and the vehicle's motion since.

State is explicit: an exported graph takes `state_in_*` and returns `state_out_*`; this module passes them from one
frame to the next. It drops the state after a gap in time or a jump of the pose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.config import ModelConfig
from occbev.ego_signals import EgoSignals
from occbev.inference.families import family_of
from occbev.inference.families.record import Moment
from occbev.rig import CameraRig

MAX_GAP_S = 2.0
"""Largest age in seconds of a previous frame whose state is used."""

MAX_SPEED = 70.0
"""Metres per second; a pose that moves faster has jumped."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Past:
    """One frame, and the state that the network gave, by the names of the inputs that take it."""

    moment: Moment
    state: Arrays


class Memory:
    """The state of one network over a drive. Not thread-safe."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._past: _Past | None = None

    @property
    def active(self) -> bool:
        """Whether the network has a memory at all."""
        return self._model.past_frames > 0

    @property
    def filled(self) -> bool:
        """Whether there is a frame that the next one may build on."""
        return self._past is not None

    def forget(self) -> None:
        """Drop the state: the next frame is a first one."""
        self._past = None

    def inputs(
        self,
        stamp_ns: int,
        ego2global: NDArray[np.float64] | None,
        rig: CameraRig,
        signals: EgoSignals | None = None,
    ) -> Arrays:
        """Return the graph's inputs that depend on the frame before; none without a memory.

        ego2global: (4, 4) at the key time, None where it is not known: then nothing is remembered.
        rig: network-size cameras at the key time. signals: see `FrameSet`.
        """
        if not self.active:
            return {}
        now = Moment(stamp_ns, ego2global, rig, signals)
        family = family_of(self._model)
        first = family.first_state(self._model, len(rig))
        if not (self._continues(now) and self._fits(first)):
            self.forget()
        past = self._past
        if past is None:
            return {**first, **family.motion(self._model, now, None)}
        return {**past.state, **family.motion(self._model, now, past.moment)}

    def keep(self, outputs: Arrays, stamp_ns: int, ego2global: NDArray[np.float64] | None, rig: CameraRig) -> None:
        """Keep the state that the network returned for this frame; outputs: the graph's, whose buffers may be reused."""
        if not self.active:
            return
        names = [name for name in outputs if name.startswith("state_out_")]
        state = {name.replace("out", "in", 1): np.array(outputs[name], np.float32) for name in names}
        self._past = None if ego2global is None else _Past(Moment(stamp_ns, ego2global, rig), state)

    def _continues(self, now: Moment) -> bool:
        past = None if self._past is None else self._past.moment
        if past is None or past.ego2global is None or now.ego2global is None:
            return False
        seconds = (now.stamp_ns - past.stamp_ns) / 1e9
        moved = float(np.linalg.norm(now.ego2global[:3, 3] - past.ego2global[:3, 3]))
        return 0 < seconds <= MAX_GAP_S and moved <= MAX_SPEED * seconds

    def _fits(self, first: Arrays) -> bool:
        """Whether the state is of as many cameras, where that matters."""
        state = {} if self._past is None else self._past.state
        return all(name in state and state[name].shape == array.shape for name, array in first.items())
