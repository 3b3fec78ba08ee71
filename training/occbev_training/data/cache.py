"""The sample cache: every key frame of some recordings, decoded and labelled once, ready to be trained on.

It stands between the recordings and the trainer; `occbev_training.occupancy.prepare` makes it. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from occbev.config import ImageConfig, from_record
from occbev.ego_signals import EgoSignals
from occbev.files import ArraysError, file_hash, one_line, read_arrays
from occbev.grid import GRIDS, VoxelGrid

FORMAT = 1

MIN_LIDAR_DEPTH = 0.5
"""LiDAR returns nearer to a camera than this, in metres, are not stored as depth labels."""


class CacheError(ValueError):
    """A sample cache that cannot be used, saying which file and what would be right."""


@dataclass(frozen=True)
class CachedSample:
    """One key frame at network size, everything in base_link at the key time.

    images: (N, h, w, 3) uint8 RGB; camera_valid: (N,) bool.
    intrinsic: (N, 3, 3), cam2ego: (N, 4, 4), each camera moved from its own capture time.
    lidar_camera: (P,) uint8, lidar_pixel: (P, 2) float32, lidar_depth: (P,) float32: returns in each image.
    state, camera_visible, hit_sweeps, pass_sweeps: (X, Y, Z) uint8, the LiDAR-made label.
    boxes: (M, 9) float32, labels: (M,) int64, lidar_points: (M,) int64.
    semantics: (X, Y, Z) uint8, mask_camera: (X, Y, Z) bool; all free and False without dense truth.
    """

    images: NDArray[np.uint8]
    camera_valid: NDArray[np.bool_]
    intrinsic: NDArray[np.float64]
    cam2ego: NDArray[np.float64]
    lidar_camera: NDArray[np.uint8]
    lidar_pixel: NDArray[np.float32]
    lidar_depth: NDArray[np.float32]
    state: NDArray[np.uint8]
    camera_visible: NDArray[np.uint8]
    hit_sweeps: NDArray[np.uint8]
    pass_sweeps: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    lidar_points: NDArray[np.int64]
    semantics: NDArray[np.uint8]
    mask_camera: NDArray[np.bool_]


@dataclass(frozen=True)
class CacheInfo:
    """What a cache was made with; two caches that differ in it do not mix."""

    image: ImageConfig
    cameras: tuple[str, ...]
    grid: VoxelGrid = GRIDS["occ3d"]
    format: int = FORMAT


@dataclass(frozen=True)
class Moment:
    """When and where a sample was taken. ego2global: (4, 4) at the key time.

    signals: what the vehicle said of its motion, None where it did not.
    """

    drive: str
    stamp_ns: int
    ego2global: NDArray[np.float64]
    signals: EgoSignals | None = None


@dataclass(frozen=True)
class SampleCache:
    """An opened cache: `samples` are (drive, file) pairs in a fixed order, by time within a drive.

    moments: one per sample, or none of caches from before they were kept.
    """

    root: Path
    info: CacheInfo
    samples: tuple[tuple[str, str], ...]
    moments: tuple[Moment, ...] = ()
    cameras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Drive -> its cameras, of drives whose rig differs from that of `info`."""

    def cameras_of(self, index: int) -> tuple[str, ...]:
        """Names of the cameras of one sample."""
        return self.cameras.get(self.drive(index), self.info.cameras)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> CachedSample:
        return read_sample(self.path(index))

    def __iter__(self) -> Iterator[CachedSample]:
        return (self[i] for i in range(len(self)))

    def path(self, index: int) -> Path:
        """File of one sample."""
        return self.root.joinpath(*self.samples[index])

    def name(self, index: int) -> str:
        """Drive and key of one sample, for messages."""
        drive, file = self.samples[index]
        return f"{drive}/{Path(file).stem}"

    def drive(self, index: int) -> str:
        """Drive of one sample."""
        return self.samples[index][0]

    def moment(self, index: int) -> Moment:
        """When and where one sample was taken; raises CacheError where the cache does not know."""
        if not self.moments:
            raise CacheError(f"{self.root}: holds no poses, which past frames need; prepare it again")
        return self.moments[index]

    @property
    def drives(self) -> tuple[str, ...]:
        """Names of the drives, sorted."""
        return tuple(sorted({drive for drive, _ in self.samples}))

    @property
    def hash(self) -> str:
        """Sixteen hex digits over the content of every sample, for the record of a training run."""
        digest = hashlib.sha256()
        for drive in self.drives:
            digest.update((self.root / drive / "drive.json").read_bytes())
        return digest.hexdigest()[:16]

    def read(self, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read some arrays of one sample, without the rest."""
        return read_sample_arrays(self.path(index), names)


def open_cache(root: Path, drives: Sequence[str] | None = None, labelled: bool = False) -> SampleCache:
    """Open the finished drives of a cache, or some of them; `labelled`: only those with three-state labels.

    Raises:
        CacheError: the folder is no cache, holds no finished drive, or mixes two ways of making samples or labels.
    """
    records = {path.parent.name: json.loads(path.read_text()) for path in sorted(root.glob("*/drive.json"))}
    if drives is not None:
        missing = sorted(set(drives) - set(records))
        if missing:
            raise CacheError(f"{root}: drives {missing} are not in this cache; it has {len(records)}")
        records = {name: records[name] for name in sorted(drives)}
    if labelled:
        records = {name: record for name, record in records.items() if record["labels"]}
    if not records:
        raise CacheError(
            f"{root}: no finished drive{' with labels' if labelled else ''}; make one with 'occbev-train prepare'"
        )
    infos = {name: record["info"] for name, record in records.items()}
    first = next(iter(infos))
    for name, info in infos.items():
        if {**info, "cameras": 0} != {**infos[first], "cameras": 0}:
            raise CacheError(f"{root}: drive {name} was made with {info}, drive {first} with {infos[first]}")
    if labelled:
        _require_one_kind_of_labels(root, records)
    if infos[first]["format"] != FORMAT:
        raise CacheError(f"{root}: cache format {infos[first]['format']}, this code reads {FORMAT}; prepare it again")
    samples = tuple((name, file) for name, record in records.items() for file in record["files"])  # by time
    moments = [m for name, record in records.items() for m in _moments(name, record)]
    known = tuple(moments) if len(moments) == len(samples) else ()
    cameras = {name: tuple(info["cameras"]) for name, info in infos.items()}
    return SampleCache(root, from_record(CacheInfo, infos[first]), samples, known, cameras)


def _require_one_kind_of_labels(root: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    first, *others = records
    for name in others:
        if records[name]["labels"] != records[first]["labels"]:
            raise CacheError(
                f"{root}: labels of drive {name} were made with {records[name]['labels']}, "
                f"those of {first} with {records[first]['labels']}"
            )


def _moments(drive: str, record: Mapping[str, Any]) -> list[Moment]:
    stamps, poses = record.get("stamp_ns", []), record.get("ego2global", [])
    signals = record.get("signals", [None] * len(stamps))  # caches from before they were kept have none
    return [
        Moment(drive, stamp, np.array(pose), None if values is None else EgoSignals.of(values))
        for stamp, pose, values in zip(stamps, poses, signals, strict=True)
    ]


SAMPLE_SUFFIX = ".sample"
"""Ending of a sample's file: a safetensors file whose volumes are packed, see `write_sample`."""

PACKED = ("state", "camera_visible", "hit_sweeps", "pass_sweeps", "semantics", "mask_camera")
"""Arrays that are stored as frames of LZ4, which unpacks them six times as fast as deflate did."""

_SHAPE = "shape"
_TYPES: Mapping[str, type[np.generic]] = {"mask_camera": np.bool_}  # others of them are bytes


def read_sample(path: Path) -> CachedSample:
    """Read one sample; raises CacheError naming the file."""
    return CachedSample(**read_sample_arrays(path, [f.name for f in fields(CachedSample)]))


def read_sample_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read some arrays of one sample, without the rest; raises CacheError naming the file."""
    try:
        if path.suffix != SAMPLE_SUFFIX:  # .npz files of older caches
            return read_arrays(path, names)
        with safe_open(path, framework="numpy") as file:
            shape = tuple(json.loads(file.metadata()[_SHAPE]))
            return {name: _read_array(file, name, shape) for name in names}
    except ArraysError as error:
        raise CacheError(str(error)) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path}: not a whole sample: {one_line(error)}") from error


def _read_array(file: Any, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    stored: NDArray[Any] = file.get_tensor(name)
    if name not in PACKED:
        return stored
    size = lz4.frame.get_frame_info(stored.data)["content_size"]
    if size != math.prod(shape):
        raise ValueError(f"{name} unpacks to {size} bytes, want {math.prod(shape)}")
    return np.frombuffer(lz4.frame.decompress(stored.data), _TYPES.get(name, np.uint8)).reshape(shape)


def write_sample(path: Path, sample: CachedSample) -> str:
    """Write one sample atomically; returns the SHA-256 of the file.

    Label volumes are packed; images are stored as they are, since they would hardly shrink. The same sample gives the
    same bytes on every run.
    """
    arrays = {f.name: np.ascontiguousarray(getattr(sample, f.name)) for f in fields(CachedSample)}
    shape = json.dumps(arrays["state"].shape)
    for name in PACKED:
        data = lz4.frame.compress(arrays[name].data)
        arrays[name] = np.frombuffer(data, np.uint8)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may write the same one
    save_file(arrays, temporary, {_SHAPE: shape})
    digest = file_hash(temporary)
    os.replace(temporary, path)
    return digest
