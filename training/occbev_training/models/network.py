"""The network as one line: images, view transform, BEV encoder, and the heads of the stage.

Pre-training and fine-tuning differ in which heads are present and in nothing else. Networks of every family
are called as `network(images, camera_valid, geometry)` and answer with a `NetworkOutput`; what calibration
has to say to each is made by `occbev_training.models.geometry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from occbev.inference.backend import FACTORS
from occbev_training.models.heads.occupancy_head import SEMANTICS, OccupancyDecoder
from occbev_training.models.heads.record import HeadedNetwork, Heads, heads_of
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, Splatter
from occbev_training.models.lift_splat.stereo import Matching
from occbev_training.models.lift_splat.temporal import TemporalFusion


@dataclass(frozen=True)
class NetworkOutput:
    """What a network of any family says.

    answers: output of a head -> tensor; the records in `occbev_training.models.heads` say which there are, of which shape.
    depth_logits: (B, N, D, h, w), of Lift-Splat. bev: (B, C, Y, X), what the next frame may remember.
    """

    answers: Mapping[str, Tensor]
    depth_logits: Tensor | None = None
    bev: Tensor | None = None


@dataclass(frozen=True)
class Frame:
    """One past instant of a batch, as Lift-Splat networks with a memory see it.

    images: (B, N, 3, H, W) normalised. camera_valid: (B, N).
    points: where its frusta fall in the key frame's BEV.
    matching: where its cameras saw things in the next older frame, of networks with stereo.
        points None: the frame serves only as the older one of a pair.
    """

    images: Tensor
    camera_valid: Tensor
    points: BatchedPoints | None
    matching: Matching | None = None


class OccBevNetwork(HeadedNetwork):
    """Images and geometry to occupancy and boxes."""

    def __init__(
        self,
        image_encoder: nn.Module,
        view_transform: Splatter,
        bev_encoder: nn.Module,
        heads: Heads,
        temporal: TemporalFusion | None = None,
    ) -> None:
        """temporal: joins the BEV of past frames to that of the key frame; None without a memory."""
        super().__init__()
        self.image_encoder = image_encoder
        self.view_transform = view_transform
        self.bev_encoder = bev_encoder
        self.add_heads(heads)
        self.temporal = temporal

    def forward(
        self,
        images: Tensor,
        camera_valid: Tensor,
        points: BatchedPoints,
        past: Sequence[Frame] = (),
        matching: Matching | None = None,
    ) -> NetworkOutput:
        """Run every part that is there.

        images: (B, N, 3, H, W) normalised. camera_valid: (B, N), 0 where a camera is missing.
        past: newest first; they take no gradient, and the key frame stands in for those that lack.
        matching: of the key frame, see `Frame`. With stereo the last past frame may serve for matching alone.
        """
        key = Frame(images, camera_valid, points, matching=matching)
        older = [self.matching_map(frame) for frame in past] + [None]
        bev, logits = self.frame_bev(key, older[0])
        if self.temporal is not None:
            bev = self.temporal(bev, self._history(past, older[1:], bev))
        return NetworkOutput(self.run_heads(bev), logits.unflatten(0, images.shape[:2]))

    @torch.no_grad()
    def _history(self, past: Sequence[Frame], older: Sequence[Tensor | None], key: Tensor) -> list[Tensor]:
        """Return the refined BEVs of past frames, each like that of the key frame; zero where no camera saw anything."""
        history = []
        for frame, match in zip(past, older, strict=True):
            if frame.points is None:
                continue
            seen = frame.camera_valid.amax(1)
            bev = self.frame_bev(frame, match)[0] if seen.any() else torch.zeros_like(key)
            history.append(bev * seen.view(-1, *[1] * (bev.ndim - 1)))
        return history

    def frame_bev(self, frame: Frame, older: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return one frame's BEV, refined as a memory keeps it, and its depth logits (B * N, D, h, w)."""
        assert frame.points is not None
        features = self.image_encoder(frame.images.flatten(0, 1))
        bev, logits = self.view_transform(features, frame.camera_valid, frame.points)
        return (bev if self.temporal is None else self.temporal.refine(bev)), logits

    def matching_map(self, frame: Frame) -> Tensor | None:
        """Return what a stereo network matches the next newer frame with; None here."""
        return None

    def run_heads(self, bev: Tensor) -> dict[str, Tensor]:
        """Encode the splatted BEV (B, C, Y, X) and run the heads; returns their outputs by name."""
        return self.answer({"bev": self.bev_encoder(bev)})

    def run_factored_heads(self, bev: Tensor) -> dict[str, Tensor]:
        """Run the heads as `run_heads` does, and say of voxels what `OccupancyDecoder.factors` says as well."""
        bev = self.bev_encoder(bev)
        answers: dict[str, Tensor] = {}
        for head in heads_of(self):
            part = getattr(self, head.part)
            if head != SEMANTICS:
                answers |= head.name_outputs(part(bev))
                continue
            assert isinstance(part, OccupancyDecoder), "only our own heads answer in factors"
            cells = part.cells(bev)
            answers |= dict(zip(FACTORS, part.factors(cells), strict=True)) | head.name_outputs(part.logits(cells))
        return answers
