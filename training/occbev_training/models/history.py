"""Past frames of a batch, as networks with a memory are shown them in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from occbev.ego_signals import EgoSignals
from occbev.inference.tables import Augmentation
from occbev_training.models.geometry import Geometry
from occbev_training.models.lift_splat.stereo import Matching


@dataclass(frozen=True)
class View:
    """One instant of a sample, augmented.

    images: (N, h, w, 3) uint8. camera_valid: (N,). intrinsic: (N, 3, 3). cam2ego: (N, 4, 4) at the instant's key
    time. ego2global: (4, 4), or None where it is not known and not needed. stamp_ns: 0 where no past is asked for.
    signals: what the vehicle said of its motion, None where it did not.
    """

    images: NDArray[np.uint8]
    camera_valid: NDArray[np.bool_]
    intrinsic: NDArray[np.float64]
    cam2ego: NDArray[np.float64]
    ego2global: NDArray[np.float64] | None
    stamp_ns: int = 0
    augmentation: Augmentation | None = None
    signals: EgoSignals | None = None


@dataclass(frozen=True)
class MotionTables:
    """How a batch came from the frame before: known (B,), align (B, Q), shift (B, 2), see `Motion`."""

    known: Tensor
    align: Tensor
    shift: Tensor

    def to(self, device: torch.device) -> MotionTables:
        """Move every tensor."""
        return MotionTables(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class PastFrames:
    """One past instant of a batch. images: (B, N, 3, h, w) uint8. camera_valid: (B, N).

    geometry: None where the frame only serves the newer one for matching. motion: how it came from the next older one.
    """

    images: Tensor
    camera_valid: Tensor
    geometry: Geometry | None
    motion: MotionTables | Matching | None = None

    def to(self, device: torch.device) -> PastFrames:
        """Move every tensor."""
        motion = None if self.motion is None else self.motion.to(device)
        geometry = None if self.geometry is None else self.geometry.to(device)
        return PastFrames(self.images.to(device), self.camera_valid.to(device), geometry, motion)


@dataclass(frozen=True)
class History:
    """What a batch is shown before its key frame.

    past: in the order that `TrainingFamily.run` takes. motion: how the key
    frame came from the newest of them. geometry: of the key frame, with what it knows of the motion.
    """

    past: tuple[PastFrames, ...]
    motion: MotionTables | Matching | None
    geometry: Geometry


def into_key(key: View, view: View) -> NDArray[np.float64]:
    """Return ego of a past instant -> ego of the key frame; products in float64, as global positions are large."""
    assert key.ego2global is not None
    assert view.ego2global is not None
    ego2ego: NDArray[np.float64] = np.linalg.inv(key.ego2global) @ view.ego2global
    return ego2ego


def stack_images(views: Sequence[View]) -> tuple[Tensor, Tensor]:
    """Return images (B, N, 3, h, w) uint8 and camera_valid (B, N)."""
    images = torch.from_numpy(np.stack([view.images for view in views])).permute(0, 1, 4, 2, 3)
    return images, torch.from_numpy(np.stack([view.camera_valid for view in views])).float()
