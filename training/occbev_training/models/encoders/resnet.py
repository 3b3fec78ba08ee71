"""Residual networks as image encoders and BEV trunks, under torchvision's weight names.

The blocks are torchvision's; the caffe style and deformable stages are small changes to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck

from occbev_training.models.checkpoint_files import read_recorded
from occbev_training.models.checkpoints import CheckpointError
from occbev_training.models.encoders.deformable_conv import DeformableConv2d

_BLOCKS: Mapping[int, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    14: (Bottleneck, [1, 1, 1, 1]),
    18: (BasicBlock, [2, 2, 2, 2]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
}
"""Depth -> kind of block, blocks of each stage; the shallowest is for checks."""

RESNET_STAGES = 4

BACKBONE_PREFIXES = ("img_backbone.", "backbone.")
"""What the names of image backbones begin with in checkpoints of detectors."""

OPTIONAL_WEIGHTS = ("conv_offset", "num_batches_tracked")
"""Weights that a file may lack: networks for ImageNet have no offsets, and older files do not count batches."""


class ResNet(nn.Module):
    """The stem and four stages of a residual network (He et al. 2016)."""

    def __init__(
        self,
        depth: int = 50,
        outputs: Sequence[int] = (3, 4),
        caffe_style: bool = False,
        deformable_stages: Sequence[int] = (),
        frozen_stages: int = 0,
        frozen_norms: bool = False,
    ) -> None:
        """Build with random weights.

        depth: 14, 18, 50 or 101. outputs: stages (1..4) whose maps are returned, at strides 4 to 32.
        caffe_style: a stage's stride is on its first 1x1 convolution, not on the 3x3.
        deformable_stages: stages whose 3x3 convolutions are modulated deformable ones.
        frozen_stages: 0 = all is trained, 1 = not the stem, n = not the stem and n - 1 stages.
        frozen_norms: no batch norm is trained or gathers statistics.
        """
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"ResNet depth {depth}: must be one of {sorted(_BLOCKS)}")
        model = resnet.ResNet(*_BLOCKS[depth])
        self.conv1, self.bn1, self.relu, self.maxpool = (
            model.conv1,
            model.bn1,
            model.relu,
            model.maxpool,
        )
        for stage in range(1, RESNET_STAGES + 1):
            blocks = getattr(model, f"layer{stage}")
            for block in blocks:
                _alter(block, caffe_style, stage in deformable_stages)
            setattr(self, f"layer{stage}", blocks)
        self.outputs, self.frozen_norms = tuple(outputs), frozen_norms
        self.frozen = [self.conv1, self.bn1] if frozen_stages else []
        self.frozen += [getattr(self, f"layer{stage}") for stage in range(1, frozen_stages)]
        self.widths = tuple(_width(getattr(self, f"layer{stage}")) for stage in self.outputs)
        self.train()

    def train(self, mode: bool = True) -> ResNet:
        """Switch the mode; what is frozen stays in eval mode and takes no gradient."""
        super().train(mode)
        for part in self.frozen:
            part.eval().requires_grad_(False)
        if self.frozen_norms:
            for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.eval().requires_grad_(False)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn (M, 3, H, W) into the maps of the stages `outputs`, finest first."""
        x, maps = self.maxpool(self.relu(self.bn1(self.conv1(images)))), []
        for stage in range(1, max(self.outputs) + 1):
            x = getattr(self, f"layer{stage}")(x)
            if stage in self.outputs:
                maps.append(x)
        return maps

    def load_imagenet(self, path: Path) -> tuple[str, ...]:
        """Load weights under torchvision's names, see `take_weights`."""
        return self.take_weights(read_recorded(path), str(path))

    def take_weights(self, state: Mapping[str, Tensor], source: str) -> tuple[str, ...]:
        """Take weights under torchvision's names: bare, or those of the image backbone in the checkpoint of a detector.

        Offsets that they lack begin at zero. source: what an error calls them.
        Returns: the names that the network has no use for.
        Raises: CheckpointError naming the first weight that is missing or has another shape.
        """
        prefix = next((p for p in BACKBONE_PREFIXES if any(name.startswith(p) for name in state)), "")
        found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        own = self.state_dict()
        needed = [name for name in own if not any(part in name for part in OPTIONAL_WEIGHTS)]
        wrong = [n for n in own if (found[n].shape != own[n].shape if n in found else n in needed)]
        if wrong:
            raise CheckpointError(
                f"{source}: not the weights of this ResNet: {len(wrong)} of {len(own)} are missing or of"
                f" another shape; first {wrong[0]}"
            )
        self.load_state_dict({name: found[name] for name in own if name in found}, strict=False)
        return tuple(sorted(name for name in state if name.removeprefix(prefix) not in own))


def basic_stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Return a stage of basic blocks; the first has a 1x1 skip where the shape changes."""
    skip = None
    if stride != 1 or inputs != outputs:
        skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    rest = [BasicBlock(outputs, outputs) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride, skip), *rest)


def _alter(block: nn.Module, caffe_style: bool, deformable: bool) -> None:
    if caffe_style and isinstance(block, Bottleneck):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    if deformable:
        if not isinstance(block, Bottleneck):
            raise ValueError("deformable stages need bottleneck blocks: depth 14, 50 or 101")
        plain = block.conv2
        block.conv2 = DeformableConv2d(plain.in_channels, plain.out_channels, plain.stride[0])


def _width(stage: nn.Sequential) -> int:
    last = stage[-1]
    assert isinstance(last, (BasicBlock, Bottleneck))
    return last.conv3.out_channels if isinstance(last, Bottleneck) else last.conv2.out_channels
