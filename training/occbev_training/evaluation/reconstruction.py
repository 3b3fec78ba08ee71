"""Predictions of stage 1 for single samples: its occupied voxels beside the label's, as a score and as a picture."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import OCCUPIED_STATE, UNOBSERVED_STATE
from occbev.grid import VoxelGrid, xyz_from_volume
from occbev.reports.rendering import Picture, beside, camera_mosaic, stack_pictures
from occbev_training.data.cache import CachedSample
from occbev_training.evaluation.frames import Prediction
from occbev_training.metrics.occupancy import binary_counts, binary_iou

_PAPER, _BOTH, _MISSED, _WRONG = (28, 28, 32), (70, 190, 110), (60, 120, 230), (230, 90, 60)
_LOW, _HIGH = np.array([40, 70, 140]), np.array([250, 220, 90])


@dataclass(frozen=True)
class Reconstruction:
    """One sample's voxels, (X, Y, Z) bool each. scored: observed and seen by a camera."""

    label: NDArray[np.bool_]
    answer: NDArray[np.bool_]
    scored: NDArray[np.bool_]

    @property
    def iou(self) -> float:
        """IoU of occupied voxels among those that are scored."""
        return binary_iou(binary_counts(self.label, self.answer, self.scored))


def reconstruct(sample: CachedSample, prediction: Prediction) -> Reconstruction:
    """Compare what a pre-trained network predicts for a sample with the sample's label."""
    logits = prediction.reconstruction
    assert logits is not None, "only stage 1 reconstructs"
    answer = xyz_from_volume(logits[1] > logits[0])
    scored = (sample.camera_visible != 0) & (sample.state != UNOBSERVED_STATE)
    return Reconstruction(sample.state == OCCUPIED_STATE, answer, scored)


def reconstruction_picture(
    name: str, sample: CachedSample, found: Reconstruction, grid: VoxelGrid, width: int = 1500
) -> Picture:
    """Draw a sample: its images; label and answer from above by height, and where they agree; forward is up."""
    size = width // 3 - 16
    views = {
        f"{name}: label, height of the top voxel": _heights(found.label & found.scored),
        "reconstruction, height of the top voxel": _heights(found.answer & found.scored),
        f"green both, blue missed, red invented: IoU {found.iou:.3f}": _agreement(found),
    }
    sides = {
        "label, seen from the left, forward to the right": _side(found.label & found.scored),
        "reconstruction": _side(found.answer & found.scored),
    }
    images = {
        f"camera {i}": image
        for i, (image, valid) in enumerate(zip(sample.images, sample.camera_valid, strict=True))
        if valid
    }
    extent = grid.shape[1] / grid.shape[0]
    above = {title: _scale(view, size, round(size / extent)) for title, view in views.items()}
    half, height = width // 2 - 16, round(width / 2 * grid.shape[2] / grid.shape[0])
    across = {title: _scale(view, half, height) for title, view in sides.items()}
    return stack_pictures([camera_mosaic(images, width), beside(above), beside(across)])


def _heights(occupied: NDArray[np.bool_]) -> Picture:
    """Colour each column by its highest voxel; x points up, y to the left."""
    top = occupied.shape[2] - 1 - np.argmax(occupied[:, :, ::-1], axis=2)
    share = (top / max(1, occupied.shape[2] - 1))[..., None]
    colour = np.where(np.any(occupied, axis=2)[..., None], _LOW + share * (_HIGH - _LOW), _PAPER)
    return np.ascontiguousarray(colour.astype(np.uint8)[::-1, ::-1])


def _agreement(found: Reconstruction) -> Picture:
    """Colour each column by what most of its voxels are: found, missed or invented."""
    parts = (
        found.label & found.answer,
        found.label & ~found.answer,
        ~found.label & found.answer,
    )
    counts = np.stack([(part & found.scored).sum(2) for part in parts])
    colours = np.array([_BOTH, _MISSED, _WRONG], np.uint8)[counts.argmax(0)]
    colours = np.where(np.any(counts, axis=0)[..., None], colours, np.array(_PAPER, np.uint8))
    return np.ascontiguousarray(colours[::-1, ::-1])


def _side(occupied: NDArray[np.bool_]) -> Picture:
    """Brightness by how many voxels lie behind each other, x to the right and z up."""
    count = occupied.sum(1).T[::-1]  # (Z, X)
    share = (count / max(1, count.max()))[..., None] ** 0.5
    return (np.array(_PAPER) + share * (_HIGH - _PAPER)).astype(np.uint8)


def _scale(picture: Picture, width: int, height: int) -> Picture:
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
