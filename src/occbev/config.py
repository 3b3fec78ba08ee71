"""Typed configuration: frozen dataclasses are the schema, YAML holds the values, one strict loader joins them.

A field's docstring is its help text. What training fixed (`ModelConfig`) travels in the model package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from occbev.classes import DETECTION_CLASSES, OCCUPANCY_CLASSES
from occbev.files import YamlError, read_yaml
from occbev.grid import GRIDS, BevGrid, VoxelGrid

logger = logging.getLogger(__name__)

T = TypeVar("T")


MAX_CAMERAS = 32
"""Cameras that any graph takes at most."""


BACKBONES = (
    *(f"tf_efficientnet_lite{size}" for size in range(5)),
    *(f"tf_efficientnet_b{size}" for size in range(8)),
    *(f"tf_efficientnetv2_{size}" for size in ("b0", "b1", "b2", "b3", "s", "m", "l")),
)
"""Backbones of our own image encoder."""

MIN_CHANNELS = 16
"""Least channels of the image features: with 8 of them oneDNN, which torch runs on CPUs, corrupts the heap."""

RESNET_DEPTHS = (14, 18, 50, 101)
"""Depths of the residual networks that published networks have as image encoders."""


class ConfigError(ValueError):
    """A configuration value that cannot be used, named by its dotted path."""


def brief(value: Any) -> str:
    """Return a value as an error shows it: on one line and not longer than that."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def bounded(default: Any, low: float, high: float, live: bool = False) -> Any:
    """Make a field with a range for the node's parameters; `live` ones may be set while it runs."""
    return field(default=default, metadata={"range": (low, high), "live": live})


def formerly(default: Any, name: str) -> Any:
    """Make a field that had another name; the old name works for one more version, with a warning."""
    return field(default=default, metadata={"formerly": name})


@dataclass(frozen=True)
class ImageConfig:
    """Network input."""

    width: int = 352
    """Input width in pixels."""
    height: int = 128
    """Input height in pixels; the source is scaled to the width and fitted to the height as `fit` says."""
    mean: tuple[float, float, float] = (127.0, 127.0, 127.0)
    """Subtracted from RGB values 0..255; the default is what EfficientNet-Lite was trained with."""
    std: tuple[float, float, float] = (128.0, 128.0, 128.0)
    """Divides RGB values after the mean was subtracted."""
    channel_order: str = "rgb"
    """Order of the channels that the network was trained on: rgb, or bgr_swapped for BEVDet checkpoints."""
    fit: str = "cover"
    """cover (a tall image is cut to the lower rows, or to those around the horizon where they lack it) or pad (rows of
    the mean colour below, as BEVFormer has it)."""
    lens: str = "rectify"
    """rectify (images become those of a pinhole) or keep (geometry follows the lens, so that a fisheye keeps its field)."""

    oversampling: float = field(default=2.0, compare=False)  # prepared images of either serve the same network
    """A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves so many pixels for each of the network's, along
    each axis. 2 is nearer to a full decode, 1 is faster."""

    def __post_init__(self) -> None:
        if not self.oversampling >= 1:
            raise ConfigError(f"image.oversampling {self.oversampling}: must be at least 1")
        if self.fit not in ("cover", "pad"):
            raise ConfigError(f"image.fit {self.fit!r}: must be cover or pad")
        if self.lens not in ("rectify", "keep"):
            raise ConfigError(f"image.lens {self.lens!r}: must be rectify or keep")
        if self.width % 32 or self.height % 32 or min(self.width, self.height) <= 0:
            raise ConfigError(f"image size {self.width}x{self.height}: both must be positive multiples of 32")
        if self.channel_order not in ("rgb", "bgr_swapped"):
            raise ConfigError(f"image.channel_order {self.channel_order!r}: must be rgb or bgr_swapped")


@dataclass(frozen=True)
class DepthConfig:
    """Depth bins of the lift: bin i covers [lo + i * step, lo + (i + 1) * step) and is lifted to its centre."""

    lo: float = 1.0
    """Depth of the first bin in metres."""
    hi: float = 45.0
    """Upper end in metres, exclusive."""
    step: float = 1.0
    """Bin width in metres."""
    spacing: str = "uniform"
    """uniform, or log for as many bins that widen with depth."""

    def __post_init__(self) -> None:
        if self.spacing not in ("uniform", "log"):
            raise ConfigError(f"depth.spacing {self.spacing!r}: must be uniform or log")
        if not 0 < self.lo < self.hi or self.step <= 0:
            raise ConfigError(f"depth bins [{self.lo}, {self.hi}) step {self.step}: need 0 < lo < hi and step > 0")

    @property
    def bins(self) -> int:
        """Number of bins."""
        return int(round((self.hi - self.lo) / self.step))


@dataclass(frozen=True)
class LiftConfig:
    """Lift-Splat view transform."""

    stride: int = 16
    """Pixels of the input image per feature cell."""
    channels: int = 64
    """Context channels that are lifted."""
    depth: DepthConfig = field(default_factory=DepthConfig)
    """Depth bins."""
    z_range: tuple[float, float] = (-5.0, 3.0)
    """Lifted points outside these heights (base_link, metres) are dropped."""
    max_points: int = 49152
    """Capacity of the splat tables in kept frustum points, dummy included; a rig that needs more is an error."""
    max_cells: int = 0
    """Capacity of the gather form in cells that hold points, 0 for all cells; fewer make a faster graph."""
    height_bins: int = 1
    """Cells along z within z_range; more than one makes a volume."""
    canonical_focal: float = 0.0
    """Focal length in pixels of the network's images at which depth bins are metres; those of a camera with another one
    grow with it. An image alone tells how far something is in units of the focal length: one network then serves
    cameras of any. 0: bins are metres for every camera."""
    reference_quirks: bool = False
    """Geometry as BEVDet's published weights know it: feature cells spread from first to last pixel, bins
    lifted to their near edge, cell indices truncated towards zero."""


@dataclass(frozen=True)
class EncoderConfig:
    """Image encoder."""

    backbone: str = "tf_efficientnet_lite0"
    """Backbone name, as timm spells it: one of `BACKBONES`."""
    stages: int = 6
    """Leading stages of the backbone that are used; later ones would add parameters at the same stride."""
    channels: int = 128
    """Channels of the neck's output."""
    frozen_stages: int = 4
    """Leading parts that are not trained (1 = stem, 4 = stem and three stages), their norms folded in."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ConfigError(f"backbone {self.backbone!r}: must be one of {BACKBONES}")
        if self.channels < MIN_CHANNELS:
            raise ConfigError(
                f"channels {self.channels}: must be at least {MIN_CHANNELS}; narrower ones end the process on CPUs"
            )


@dataclass(frozen=True)
class BevEncoderConfig:
    """BEV encoder: a small residual U-shaped CNN."""

    channels: tuple[int, ...] = (64, 96, 128)
    """Width at full, half and quarter BEV resolution."""
    blocks: tuple[int, ...] = (1, 2, 2)
    """Residual blocks at each resolution."""
    out_channels: int = 96
    """Width of the BEV map handed to the heads."""
    knows_place: bool = False
    """Whether cells know in which direction and how far from the vehicle they are: images tell headings relative to the
    line of sight, boxes have them relative to the vehicle."""


@dataclass(frozen=True)
class OccupancyHeadConfig:
    """Occupancy decoder: resample the BEV to the voxel grid's plane, then channels to height."""

    channels: int = 64
    """Width of the plane before it is unfolded into heights."""
    height_channels: int = 16
    """Features of each height in the 3D part of the decoder, at half resolution along x and y."""
    cell_channels: int = 32
    """Features of each cell of 2 x 2 voxels, from which the head predicts which of them are occupied, and by what."""
    min_free: float = 0.0
    """Smallest probability of free for a voxel to be decoded as free; 0 takes the likeliest class, 0.5 calls
    a voxel occupied as soon as all other classes together are likelier than free."""


@dataclass(frozen=True)
class DetectionHeadConfig:
    """Centre-based detection head."""

    channels: int = 64
    """Width of the shared convolution."""
    reach: int = 0
    """Cells on each side of an object's own that learn its box as well, and have a say in the box of a peak."""


@dataclass(frozen=True)
class ModelConfig:
    """A network, and all that its weights fix: it travels with them and no launch file overrides it.

    These are the keys of every family; `occbev.inference.families` has a subclass with the keys of each.
    """

    name: str = ""
    """Name of the model."""
    family: str = ""
    """View transform, a key of `occbev.inference.families.FAMILIES`."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Network input."""
    bev: BevGrid = BevGrid((-51.2, -51.2), (1.024, 1.024), (100, 100))
    """Grid of the BEV features and of the detection head."""
    grid: VoxelGrid = GRIDS["occ3d"]
    """Grid of the occupancy output."""
    occupancy: OccupancyHeadConfig = field(default_factory=OccupancyHeadConfig)
    """Occupancy decoder of pre-training and semantic occupancy head; of published heads only `min_free`."""
    detection_classes: tuple[str, ...] = DETECTION_CLASSES
    """Names of the heat map's channels."""
    occupancy_classes: tuple[str, ...] = OCCUPANCY_CLASSES
    """Names of the occupancy logits' channels; the last is free."""

    def __post_init__(self) -> None:
        if not self.family or self.family != type(self).family:
            raise ConfigError(f"family {self.family!r}: a {type(self).__name__} has the family {type(self).family!r}")

    @property
    def max_cameras(self) -> int:
        """Cameras that a graph of it takes at most."""
        return MAX_CAMERAS

    @property
    def past_frames(self) -> int:
        """Frames before this one that the network builds on; a BEVFormer's one holds all before it."""
        return 0


def load_config(path: Path, schema: type[T]) -> T:
    """Read a YAML file into a dataclass; a `base:` key names one file to lay this one over.

    Raises:
        ConfigError: with the file, the dotted path of the key and the nearest known name.
    """
    try:
        return from_record(schema, read_record(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def save_config(path: Path, config: Any) -> None:
    """Write a dataclass as YAML that `load_config` reads back to an equal value."""
    path.write_text(yaml.safe_dump(to_record(config), sort_keys=False))


def to_record(value: Any) -> Any:
    """Turn a dataclass tree into plain YAML values."""
    if isinstance(value, VoxelGrid):
        return value.as_record()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_record(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): to_record(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_record(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def from_record(schema: type[T], record: Any, where: str = "") -> T:
    """Build a dataclass from plain values, strictly; missing keys keep their defaults."""
    return typing.cast(T, _convert(schema, record, where))


def read_record(path: Path) -> dict[str, Any]:
    """Read a YAML file with its base laid under it; raises ConfigError without the file's name."""
    try:
        record = read_yaml(path) or {}
    except FileNotFoundError as error:
        raise ConfigError("no such file") from error
    except YamlError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(record, dict):
        raise ConfigError(f"holds a {type(record).__name__}, want keys and values")
    base = record.pop("base", None)
    return record if base is None else _merge(read_record(path.parent / base), record)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_dicts else value
    return merged


def _convert(schema: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(schema), typing.get_args(schema)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if schema is VoxelGrid and isinstance(value, str):
        if value not in GRIDS:
            raise ConfigError(f"{where}: grid {value!r} is unknown, presets are {sorted(GRIDS)}")
        return GRIDS[value]
    if dataclasses.is_dataclass(schema):
        return _convert_dataclass(schema, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: want a list, got {brief(value)}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(arguments):
            raise ConfigError(f"{where}: want {len(arguments)} values, got {brief(value)}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: want keys and values, got {brief(value)}")
        return {key: _convert(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    return _convert_scalar(schema, value, where)


def _convert_dataclass(schema: Any, value: Any, where: str) -> Any:
    if isinstance(value, schema):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{where or schema.__name__}: want keys and values, got {brief(value)}")
    hints = typing.get_type_hints(schema)
    known = {f.name for f in dataclasses.fields(schema) if f.init}
    former = {f.metadata["formerly"]: f.name for f in dataclasses.fields(schema) if "formerly" in f.metadata}
    arguments = {}
    for key, entry in value.items():
        dotted = f"{where}.{key}" if where else str(key)
        if schema is VoxelGrid and key == "axis_order":
            if entry != "xyz":
                raise ConfigError(f"{dotted}: {brief(entry)}, only 'xyz' is supported")
            continue
        if key in former:
            logger.warning("%s is now called %s; the old name works for one version more", dotted, former[key])
            key = former[key]
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {sorted(known)}"
            raise ConfigError(f"{dotted}: unknown key{hint}")
        arguments[key] = _convert(hints[key], entry, dotted)
    try:
        return schema(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where or schema.__name__}: {error}") from error


def _convert_scalar(schema: Any, value: Any, where: str) -> Any:
    if schema is Any:
        return value
    if schema is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 2e-4 as text
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is not finite")
    if schema is Path and isinstance(value, str):
        return Path(value)
    if isinstance(schema, type) and isinstance(value, schema) and not (schema is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: want {getattr(schema, '__name__', schema)}, got {brief(value)}")
