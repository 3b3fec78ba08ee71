"""Past key frames of a sample: which ones, and what they say to networks with a memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from occbev.config import ModelConfig
from occbev.inference.reference_points import EgoMotion, can_bus, motion_tables
from occbev_training.data.samples import Samples
from occbev_training.models.geometry import Geometry, make_geometry
from occbev_training.models.queries.bevformer import BevFormerViews

BEVFORMER_HISTORY = 2
"""Past frames of a BEVFormer where the config names no number: its tiny and small recipes."""


@dataclass(frozen=True)
class View:
    """One instant of a sample, augmented.

    images: (N, h, w, 3) uint8. camera_valid: (N,). intrinsic: (N, 3, 3). cam2ego: (N, 4, 4) at the instant's key
    time. ego2global: (4, 4), or None where it is not known and not needed.
    """

    images: NDArray[np.uint8]
    camera_valid: NDArray[np.bool_]
    intrinsic: NDArray[np.float64]
    cam2ego: NDArray[np.float64]
    ego2global: NDArray[np.float64] | None


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
    """One past instant of a batch. images: (B, N, 3, h, w) uint8. camera_valid: (B, N). motion: of a BEVFormer."""

    images: Tensor
    camera_valid: Tensor
    geometry: Geometry
    motion: MotionTables | None = None

    def to(self, device: torch.device) -> PastFrames:
        """Move every tensor."""
        motion = None if self.motion is None else self.motion.to(device)
        return PastFrames(self.images.to(device), self.camera_valid.to(device), self.geometry.to(device), motion)


def history_length(model: ModelConfig, asked: int = -1) -> int:
    """Return how many past frames a sample of the network has; `asked` as `TrainingConfig.history`."""
    if model.past_frames == 0:
        return 0
    if asked >= 0:
        return asked
    return BEVFORMER_HISTORY if model.family == "bevformer" else model.past_frames


def past_indices(
    samples: Samples, index: int, length: int, family: str, rng: np.random.Generator | None = None
) -> list[int | None]:
    """Choose the past frames of a sample, newest first; None before its drive begins.

    rng: lets a BEVFormer in training leave one of the `length` + 1 frames before out, so that it learns unequal
        steps (Li et al. 2022, section 3.6); None takes consecutive frames.
    """
    drive = samples.drive(index)
    steps = list(range(1, length + 1))
    if family == "bevformer" and length and rng is not None:
        steps = list(range(1, length + 2))
        steps.pop(int(rng.integers(len(steps))))
    places = [index - step for step in steps]
    return [place if place >= 0 and samples.drive(place) == drive else None for place in places]


def lift_history(
    windows: Sequence[Sequence[View | None]], keys: Sequence[View], model: ModelConfig
) -> tuple[PastFrames, ...]:
    """Return the past frames of a batch for Lift-Splat, newest first, lifted into the key frame's BEV.

    The key frame stands in for what is missing, as published.
    """
    frames = []
    for step in range(len(windows[0])):
        views = [window[step] or key for window, key in zip(windows, keys, strict=True)]
        poses = [
            view.cam2ego if view is key else _into(key, view) @ view.cam2ego
            for view, key in zip(views, keys, strict=True)
        ]
        frames.append(_frame(views, poses, model))
    return tuple(frames)


def bevformer_history(
    windows: Sequence[Sequence[View | None]], keys: Sequence[View], model: ModelConfig
) -> tuple[tuple[PastFrames, ...], MotionTables | None, Tensor]:
    """Return a BEVFormer's past frames, oldest first, the key frame's motion, and its can_bus (B, 18)."""
    steps: list[Sequence[View | None]] = [*zip(*[w[::-1] for w in windows], strict=True), keys]
    frames: list[PastFrames] = []
    before: list[View | None] = [None] * len(keys)
    motion, signals = None, torch.zeros(0)
    for views in steps:
        motions = [_motion(b, v) for b, v in zip(before, views, strict=True)]
        motion, signals = _tables(motions, model), _can_bus(views, motions)
        if views is not keys:
            filled = [view or key for view, key in zip(views, keys, strict=True)]
            frame = _frame(filled, [view.cam2ego for view in filled], model)
            assert isinstance(frame.geometry, BevFormerViews)
            geometry = BevFormerViews(frame.geometry.hits, signals)
            frames.append(PastFrames(frame.images, frame.camera_valid, geometry, motion))
        before = list(views)
    return tuple(frames), motion if frames else None, signals


def _motion(before: View | None, now: View | None) -> EgoMotion | None:
    if before is None or now is None or before.ego2global is None or now.ego2global is None:
        return None
    return EgoMotion.between(before.ego2global, now.ego2global)


def _tables(motions: Sequence[EgoMotion | None], model: ModelConfig) -> MotionTables:
    former = model.bevformer
    assert former is not None
    each = [motion_tables(m, model.bev, former.turn_centre, former.reference_quirks) for m in motions]
    joined = (
        torch.from_numpy(np.concatenate([t[name] for t in each]))
        for name in ("state_known", "table_align", "table_shift")
    )
    return MotionTables(*joined)


def _can_bus(views: Sequence[View | None], motions: Sequence[EgoMotion | None]) -> Tensor:
    poses = [np.eye(4) if v is None or v.ego2global is None else v.ego2global for v in views]
    return torch.from_numpy(np.stack([can_bus(p, m) for p, m in zip(poses, motions, strict=True)]))


def _into(key: View, view: View) -> NDArray[np.float64]:
    """Return ego of a past instant -> ego of the key frame; products in float64, as global positions are large."""
    assert key.ego2global is not None
    assert view.ego2global is not None
    ego2ego: NDArray[np.float64] = np.linalg.inv(key.ego2global) @ view.ego2global
    return ego2ego


def _frame(views: Sequence[View], cam2ego: Sequence[NDArray[np.float64]], model: ModelConfig) -> PastFrames:
    valid = np.stack([view.camera_valid for view in views])
    geometry = make_geometry(model, [v.intrinsic for v in views], list(cam2ego), valid)
    images = torch.from_numpy(np.stack([view.images for view in views])).permute(0, 1, 4, 2, 3)
    return PastFrames(images, torch.from_numpy(valid).float(), geometry)
