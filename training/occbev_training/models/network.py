"""The network as one line: images, view transform, BEV encoder, and the heads of the stage.

Pre-training and fine-tuning differ in which heads are present and in nothing else. Networks of every family
are called as `network(images, camera_valid, geometry)` and answer with a `NetworkOutput`; what calibration
has to say to each is made by `occbev_training.models.geometry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from occbev.inference.backend import FACTORS
from occbev_training.models.heads.occupancy_head import OccupancyDecoder
from occbev_training.models.lift_splat.lift_splat import BatchedPoints, Splatter
from occbev_training.models.lift_splat.stereo import Matching
from occbev_training.models.lift_splat.temporal import TemporalFusion


@dataclass(frozen=True)
class NetworkOutput:
    """What a network of any family says; a head that is not there leaves None.

    depth_logits: (B, N, D, h, w), of Lift-Splat. reconstruction_logits: (B, 2, Z, Y, X), free and occupied.
    occupancy_logits: (B, K, Z, Y, X). heatmap: (B, K, Y, X) logits. box: (B, 10, Y, X).
    class_logits: (L, B, Q, K) and box_codes: (L, B, Q, 10) of every layer of a decoder of object queries, see
    `occbev_training.models.heads.query_head`. bev: (B, C, Y, X), what the next frame may remember.
    """

    depth_logits: Tensor | None = None
    reconstruction_logits: Tensor | None = None
    occupancy_logits: Tensor | None = None
    heatmap: Tensor | None = None
    box: Tensor | None = None
    class_logits: Tensor | None = None
    box_codes: Tensor | None = None
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


class OccBevNetwork(nn.Module):
    """Images and geometry to occupancy and boxes."""

    def __init__(
        self,
        image_encoder: nn.Module,
        view_transform: Splatter,
        bev_encoder: nn.Module,
        occupancy_decoder: nn.Module | None = None,
        occupancy_head: nn.Module | None = None,
        detection_head: nn.Module | None = None,
        temporal: TemporalFusion | None = None,
    ) -> None:
        """temporal: joins the BEV of past frames to that of the key frame; None without a memory."""
        super().__init__()
        self.image_encoder = image_encoder
        self.view_transform = view_transform
        self.bev_encoder = bev_encoder
        self.occupancy_decoder = occupancy_decoder
        self.occupancy_head = occupancy_head
        self.detection_head = detection_head
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
            bev = self.temporal(bev, self._history(past, older[1:]))
        return NetworkOutput(logits.unflatten(0, images.shape[:2]), **self.heads(bev))

    @torch.no_grad()
    def _history(self, past: Sequence[Frame], older: Sequence[Tensor | None]) -> list[Tensor]:
        history = []
        for frame, match in zip(past, older, strict=True):
            if frame.points is not None:
                history.append(self.frame_bev(frame, match)[0])
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

    def heads(self, bev: Tensor) -> dict[str, Tensor | None]:
        """Encode the splatted BEV (B, C, Y, X) and run the heads; the fields of `NetworkOutput`."""
        bev = self.bev_encoder(bev)
        return {
            "reconstruction_logits": self.occupancy_decoder(bev) if self.occupancy_decoder else None,
            "occupancy_logits": self.occupancy_head(bev) if self.occupancy_head else None,
            **self.centres(bev),
        }

    def factored_heads(self, bev: Tensor) -> dict[str, Tensor | None]:
        """Run the heads of fine-tuning as `heads` does, and say of voxels what `OccupancyDecoder.factors` says.

        Returns: `reconstruction_logits`, `occupancy_logits`, `occupied`, `kind`, `class_probability`, `heatmap`, `box`.
        """
        bev = self.bev_encoder(bev)
        answers: dict[str, Tensor | None] = self.centres(bev)
        answers["reconstruction_logits"] = self.occupancy_decoder(bev) if self.occupancy_decoder else None
        if self.occupancy_head is not None:
            assert isinstance(self.occupancy_head, OccupancyDecoder), "only our own heads answer in factors"
            cells = self.occupancy_head.cells(bev)
            answers |= dict(zip(FACTORS, self.occupancy_head.factors(cells), strict=True))
            answers["occupancy_logits"] = self.occupancy_head.logits(cells)
        return answers

    def centres(self, bev: Tensor) -> dict[str, Tensor | None]:
        """Run the detection head on the encoded BEV; `heatmap` and `box`."""
        heatmap, box = self.detection_head(bev) if self.detection_head else (None, None)
        return {"heatmap": heatmap, "box": box}
