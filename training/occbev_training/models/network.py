"""The network as one line: images, view transform, BEV encoder, and the heads of the stage.

Pre-training and fine-tuning differ in which heads are present and in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from occbev_training.models.bev_encoder import BevEncoder
from occbev_training.models.detection_head import DetectionHead
from occbev_training.models.image_encoder import ImageEncoder
from occbev_training.models.lift_splat import BatchedPoints, LiftSplat
from occbev_training.models.occupancy_head import OccupancyDecoder


@dataclass(frozen=True)
class NetworkOutput:
    """What the network says; a head that is not there leaves None.

    depth_logits: (B, N, D, h, w). reconstruction_logits: (B, 2, Z, Y, X), free and occupied.
    occupancy_logits: (B, K, Z, Y, X). heatmap: (B, K, Y, X) logits. box: (B, 10, Y, X).
    """

    depth_logits: Tensor
    reconstruction_logits: Tensor | None
    occupancy_logits: Tensor | None
    heatmap: Tensor | None
    box: Tensor | None


class OccBevNetwork(nn.Module):
    """Images and geometry to occupancy and boxes."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        view_transform: LiftSplat,
        bev_encoder: BevEncoder,
        occupancy_decoder: OccupancyDecoder | None = None,
        occupancy_head: OccupancyDecoder | None = None,
        detection_head: DetectionHead | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.view_transform = view_transform
        self.bev_encoder = bev_encoder
        self.occupancy_decoder = occupancy_decoder
        self.occupancy_head = occupancy_head
        self.detection_head = detection_head

    def forward(self, images: Tensor, camera_valid: Tensor, points: BatchedPoints) -> NetworkOutput:
        """Run every part that is there.

        images: (B, N, 3, H, W) normalised. camera_valid: (B, N), 0 where a camera is missing.
        """
        features = self.image_encoder(images.flatten(0, 1))
        bev, depth_logits = self.view_transform(features, camera_valid, points)
        return NetworkOutput(depth_logits.unflatten(0, images.shape[:2]), **self.heads(bev))

    def heads(self, bev: Tensor) -> dict[str, Tensor | None]:
        """Encode the splatted BEV (B, C, Y, X) and run the heads; the fields of `NetworkOutput`."""
        bev = self.bev_encoder(bev)
        heatmap, box = self.detection_head(bev) if self.detection_head else (None, None)
        return {
            "reconstruction_logits": self.occupancy_decoder(bev)
            if self.occupancy_decoder
            else None,
            "occupancy_logits": self.occupancy_head(bev) if self.occupancy_head else None,
            "heatmap": heatmap,
            "box": box,
        }
