"""What the robot knows of a family of networks: the record that each family fills in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from occbev.config import ModelConfig
from occbev.ego_signals import EgoSignals
from occbev.inference.capacity import Tables
from occbev.inference.postprocess import BoxDecoding
from occbev.results import Boxes3D
from occbev.rig import CameraRig

Model = TypeVar("Model", bound=ModelConfig)
Arrays = dict[str, NDArray[Any]]
Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Moment:
    """When and from where a frame set was seen.

    ego2global: (4, 4) at the key time, None where it is not known. rig: network-size cameras at the key time.
    signals: what the vehicle itself says of its motion, None where it does not.
    """

    stamp_ns: int
    ego2global: NDArray[np.float64] | None
    rig: CameraRig
    signals: EgoSignals | None = None


class Family(Generic[Model]):
    """A family: its configuration, its geometry tables, its memory and the decoding of its boxes.

    config: the class of its configurations.
    """

    config: ClassVar[type[ModelConfig]]

    def tables(self, model: Model, rig: CameraRig, alive: NDArray[np.bool_], form: str) -> Tables:
        """Return the inputs of a graph that depend on the rig.

        rig: network-size cameras. alive: (N,), False where a camera delivers no image. form: see `occbev.inference.tables.FORMS`.
        """
        raise NotImplementedError

    def describe_cameras(self, model: Model, rig: CameraRig) -> str:
        """Say which camera takes which place of the training rig; empty if the order does not matter."""
        return ""

    def first_state(self, model: Model, cameras: int) -> Arrays:
        """Return the `state_in_*` inputs of a first frame; none without a memory."""
        return {}

    def motion(self, model: Model, now: Moment, before: Moment | None) -> Arrays:
        """Return the inputs of a graph that say how the vehicle moved.

        before: the frame that the state is of, None in a first frame; where it is given both poses are known.
        """
        return {}

    def decode_boxes(
        self, model: Model, outputs: Outputs, decoding: BoxDecoding, cameras: tuple[str, ...] = ()
    ) -> Boxes3D | None:
        """Decode the boxes of one frame into base_link, best first; None where the network predicts none.

        Raises: OutputError if they are not finite or do not fit the configuration.
        """
        raise NotImplementedError
