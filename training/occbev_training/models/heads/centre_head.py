"""CenterPoint head of the published Lift-Splat networks: tasks of classes, six branches each (Yin et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from occbev_training.models.heads.detection_head import BOX_CHANNELS
from occbev_training.models.heads.record import Head
from occbev_training.models.layers import conv_bn_relu

TASKS = Head("detection_head", ("heatmap", "box"), "tasks", "boxes")
"""Logits of centres (B, K, Y, X) and a box of every task and cell (B, tasks * 10, Y, X)."""

BOX_BRANCHES = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
"""Branches whose outputs, one after the other, are the box channels of the detection head."""


class CentreHead(nn.Module):
    """Heat maps of every class, and one box per task in every cell."""

    def __init__(self, inputs: int, tasks: Sequence[int], width: int = 64) -> None:
        """tasks: number of classes of each task, in class order."""
        super().__init__()
        self.classes = tuple(tasks)
        self.shared = conv_bn_relu(inputs, width, 3)
        self.tasks = nn.ModuleList(_task(width, classes) for classes in tasks)

    def forward(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        """Turn (B, C, Y, X) into heat map logits (B, K, Y, X) and boxes (B, tasks * 10, Y, X)."""
        shared = self.shared(bev)
        tasks = [task for task in self.tasks if isinstance(task, nn.ModuleDict)]
        heatmap = torch.cat([task["heatmap"](shared) for task in tasks], 1)
        box = torch.cat([task[name](shared) for task in tasks for name in BOX_BRANCHES], 1)
        return heatmap, box


def _task(width: int, classes: int) -> nn.ModuleDict:
    branches = nn.ModuleDict()
    for name, outputs in (*BOX_BRANCHES.items(), ("heatmap", classes)):
        hidden, last = conv_bn_relu(width, width, 3), nn.Conv2d(width, outputs, 3, padding=1)
        if name == "heatmap":
            assert last.bias is not None
            nn.init.constant_(last.bias, -2.19)  # as in `detection_head`
        branches[name] = nn.Sequential(hidden, last)
    return branches


def split_tasks(heatmap: Tensor, box: Tensor, tasks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return (heat map, box (B, 10, Y, X)) of every task."""
    boxes = box.split(BOX_CHANNELS, 1)
    return list(zip(heatmap.split(list(tasks), 1), boxes, strict=True))
