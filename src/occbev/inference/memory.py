"""What a network remembers of the frame before: its state, and how the vehicle moved since.

State is explicit: an exported graph takes `state_in_bev` and gives `state_out_bev`, and this module carries it
from one frame to the next. It is forgotten where the past cannot be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.config import ModelConfig
from occbev.geometry import frame2ego, invert_transform
from occbev.inference.reference_points import EgoMotion, can_bus, motion_tables, warp_table

MAX_GAP_S = 2.0
"""A frame that is older than this is no frame before."""

MAX_SPEED = 70.0
"""Metres per second; a pose that moves faster has jumped."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Past:
    """One frame: its key time, ego2global (4, 4) and the state that the network gave."""

    stamp_ns: int
    ego2global: NDArray[np.float64]
    state: NDArray[np.float32]


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
        """Begin anew: the next frame is a first one."""
        self._past = None

    def inputs(self, stamp_ns: int, ego2global: NDArray[np.float64] | None) -> Arrays:
        """Return the graph's inputs that depend on the frame before; none without a memory.

        ego2global: (4, 4) at the key time, None where it is not known: then nothing is remembered.
        """
        if not self.active:
            return {}
        if not self._continues(stamp_ns, ego2global):
            self.forget()
        past = self._past
        state = first_state(self._model) if past is None else past.state
        poses = None if past is None or ego2global is None else (past.ego2global, ego2global)
        return {"state_in_bev": state, **motion_inputs(self._model, ego2global, poses)}

    def keep(self, outputs: Arrays, stamp_ns: int, ego2global: NDArray[np.float64] | None) -> None:
        """Remember what the network said of this frame; outputs: the graph's, whose buffers may be reused."""
        if self.active:
            state = np.array(outputs["state_out_bev"], np.float32)
            self._past = None if ego2global is None else _Past(stamp_ns, ego2global, state)

    def _continues(self, stamp_ns: int, ego2global: NDArray[np.float64] | None) -> bool:
        if self._past is None or ego2global is None:
            return False
        seconds = (stamp_ns - self._past.stamp_ns) / 1e9
        moved = float(np.linalg.norm(ego2global[:3, 3] - self._past.ego2global[:3, 3]))
        return 0 < seconds <= MAX_GAP_S and moved <= MAX_SPEED * seconds


def first_state(model: ModelConfig) -> NDArray[np.float32]:
    """Return the state of a first frame (1, C, Y, X): nothing."""
    columns, rows = model.bev.shape
    if model.family == "bevformer":
        assert model.bevformer is not None
        channels = model.bevformer.channels
    else:
        channels = model.lift.channels * model.past_frames
    return np.zeros((1, channels, rows, columns), np.float32)


def motion_inputs(
    model: ModelConfig,
    ego2global: NDArray[np.float64] | None,
    poses: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
) -> Arrays:
    """Return a graph's inputs that say how the vehicle moved.

    ego2global: (4, 4) of this frame, None if unknown. poses: ego2global of the frame before and of this one,
        None in a first frame.
    Returns: state_known (1,) and table_warp (1, Y, X, 2); for a BEVFormer can_bus (1, 18), state_known,
        table_align (1, Q) and table_shift (1, 2).
    """
    if model.family == "bevformer":
        former = model.bevformer
        assert former is not None
        motion = None if poses is None else EgoMotion.between(*poses)
        quirks, pose = former.reference_quirks, np.eye(4) if ego2global is None else ego2global
        tables = motion_tables(motion, model.bev, former.turn_centre, quirks)
        return {"can_bus": can_bus(pose, motion)[None], **tables}
    key2past = np.eye(4) if poses is None else invert_transform(poses[0]) @ poses[1]
    to_ego = frame2ego(model.bev.frame)
    key2past = invert_transform(to_ego) @ key2past @ to_ego
    warp = warp_table(key2past, model.bev, model.lift.reference_quirks)
    return {
        "state_known": np.array([float(poses is not None)], np.float32),
        "table_warp": warp[None],
    }
