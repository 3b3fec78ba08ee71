"""Pair shards as training samples: images decoded to network size, the stored label, depth from the LiDAR.

What was decoded is kept, so that every later epoch reads it back instead of decoding it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, OCCUPIED_STATE
from occbev.config import ImageConfig
from occbev.files import read_arrays
from occbev.geometry import transform_points
from occbev.grid import VoxelGrid
from occbev.inference.preprocess import Preprocessor, network_camera
from occbev.results import CameraFrame
from occbev.rig import Camera, CameraRig
from occbev_training.data.cache import (
    MIN_LIDAR_DEPTH,
    SAMPLE_SUFFIX,
    CachedSample,
    CacheError,
    CacheInfo,
    Moment,
    read_sample,
    write_sample,
)
from occbev_training.data.shards import PairSample, ShardError, ShardReader, camera_bit

KEPT_BYTES = 4_000_000
"""Decoded images of a sample are kept up to this size; above it decoding again costs less than the disk."""


@dataclass(frozen=True)
class PairSamples:
    """The pairs of a folder of shards, of one split, in the order of the index.

    pairs: drive and key of each. hash: sixteen hex digits over the content. kept: folder for decoded samples,
        or None to decode every time. taught: folder of boxes that a network found in them, or None for none.
    """

    root: Path
    info: CacheInfo
    pairs: tuple[tuple[str, str], ...]
    hash: str
    kept: Path | None = None
    taught: Path | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> CachedSample:
        sample = self._decoded(index)
        return sample if self.taught is None else with_boxes(sample, taught_path(self.taught, self.pairs[index][1]))

    def _decoded(self, index: int) -> CachedSample:
        path = None if self.kept is None else self.kept / f"{self.pairs[index][1]}{SAMPLE_SUFFIX}"
        if path is not None and path.exists():
            return read_sample(path)
        sample = pair_to_sample(self._reader.sample(self.pairs[index][1]), self.info)
        if path is not None and sample.images.nbytes <= KEPT_BYTES:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sample(path, sample)
        return sample

    def name(self, index: int) -> str:
        """Drive and stamp of one sample, for messages."""
        return self.pairs[index][1]

    def drive(self, index: int) -> str:
        """Drive of one sample."""
        return self.pairs[index][0]

    def moment(self, index: int) -> Moment:
        """When and where one sample was taken."""
        drive, key = self.pairs[index]
        pair = self._reader.sample(key)
        return Moment(drive, pair.meta["stamp_ns"], np.array(pair.calibration["ego2global"]))

    @property
    def stamp_ns(self) -> NDArray[np.int64]:
        """Key times (M,)."""
        return np.array([self._reader.row(key)["stamp_ns"] for _, key in self.pairs], np.int64)

    def network_rig(self) -> CameraRig:
        """Return the cameras of the first pair as the network sees through them."""
        pair = self._reader.sample(self.pairs[0][1])
        records = (dict(pair.calibration["cameras"][name]) for name in pair.calibration["order"])
        own = ({k: v for k, v in record.items() if k not in ("stamp_ns", "cam2ego_at_key")} for record in records)
        return CameraRig(tuple(network_camera(Camera.from_record(record), self.info.image) for record in own))

    def only(self, indices: NDArray[np.int64]) -> PairSamples:
        """Return some of the pairs, by number; decoded ones are shared."""
        return replace(self, pairs=tuple(self.pairs[i] for i in indices))

    @property
    def drives(self) -> tuple[str, ...]:
        """Names of the drives, sorted."""
        return tuple(sorted({drive for drive, _ in self.pairs}))

    def read(self, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read some arrays of one sample."""
        sample = self[index]
        return {name: getattr(sample, name) for name in names}

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(self.root)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the opened index behind: every worker process opens its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}


def open_pairs(
    root: Path,
    image: ImageConfig,
    grid: VoxelGrid,
    split: str | None = None,
    drives: Sequence[str] | None = None,
    kept: Path | None = None,
) -> PairSamples:
    """Open pair shards for networks of one input size and grid.

    split: "train" or "validation"; None takes all. drives: only these.
    Raises:
        CacheError: no such samples, or labels on another grid.
    """
    reader = ShardReader(root)
    rows = [row for row in reader.rows if split in (None, row["split"])]
    if drives is not None:
        rows = [row for row in rows if row["drive"] in set(drives)]
        missing = sorted(set(drives) - {row["drive"] for row in rows})
        if missing:
            raise CacheError(f"{root}: drives {missing} are not among these pairs")
    if not rows:
        raise CacheError(
            f"{root}: no pair of split {split!r} among {len(reader)}; "
            "'occbev-train pairs --out OUT --join --validation SHARE' splits them anew"
        )
    first = reader.sample(rows[0]["key"])
    found = VoxelGrid.from_record(dict(first.meta["grid"]))
    if found != grid:
        raise CacheError(
            f"{root}: labels are on grid {found.as_record()}, the model predicts {grid.as_record()}; "
            "make the pairs with --grid of the model"
        )
    info, digest = CacheInfo(image, tuple(first.calibration["order"]), grid), _rows_hash(rows)
    if kept is not None:
        kept = kept / hashlib.sha256(repr((image, grid.hash, digest)).encode()).hexdigest()[:12]
    return PairSamples(root, info, tuple((row["drive"], row["key"]) for row in rows), digest, kept)


def _rows_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash where samples are stored and what was measured of them; what other samples do to a row does not count."""
    own = [{name: row[name] for name in sorted(row) if name not in _SHARED} for row in rows]
    return hashlib.sha256(json.dumps(own, default=str).encode()).hexdigest()[:16]


_SHARED = ("split", "previous", "next")


def taught_path(folder: Path, key: str) -> Path:
    """Return the file of the boxes that were found in a pair."""
    return folder / f"{key}.npz"


def with_boxes(sample: CachedSample, path: Path) -> CachedSample:
    """Return a sample with the boxes of a file; nobody knows how fast they are."""
    found = read_arrays(path, ("box", "label"))
    box = found["box"].astype(np.float32)
    box[:, 7:] = np.nan
    return replace(sample, boxes=box, labels=found["label"].astype(np.int64), lidar_points=np.ones(len(box), np.int64))


def pair_to_sample(pair: PairSample, info: CacheInfo) -> CachedSample:
    """Decode one pair to network size.

    Depth comes from the stored returns; pairs without them take the hit cells that a camera sees, whose
    centres are within half a cell of a return.
    Raises:
        ShardError: the label is on another grid.
    """
    if pair.label.grid_hash != info.grid.hash:
        raise ShardError(f"{pair.key}: label of grid {pair.label.grid_hash}, want {info.grid.hash}")
    cameras = [_camera(pair, name) for name in pair.calibration["order"]]
    preprocessor = Preprocessor(info.image)
    shape = (len(cameras), info.image.height, info.image.width, 3)
    images, valid, fitted = np.zeros(shape, np.uint8), np.zeros(len(cameras), bool), []
    for index, camera in enumerate(cameras):
        if camera.name in pair.images:
            frame = CameraFrame(camera.name, pair.meta["stamp_ns"], pair.images[camera.name], None)
            decoded = preprocessor.decode(frame, camera).image
            images[index], network = preprocessor.network_image(np.asarray(decoded), camera)
            valid[index] = True
        else:
            network = network_camera(camera, info.image)
        fitted.append(network)
    label, shape3 = pair.label, info.grid.shape
    return CachedSample(
        images,
        valid,
        CameraRig(tuple(fitted)).lens_matrices,
        np.stack([c.cam2ego for c in fitted]),
        *_returns(pair, fitted, info.grid),
        label.state,
        label.camera_visible,
        label.hit_sweeps,
        label.pass_sweeps,
        np.zeros((0, 9), np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.full(shape3, FREE, np.uint8),
        np.zeros(shape3, bool),
    )


def _camera(pair: PairSample, name: str) -> Camera:
    """Return a camera where it was, seen from ego at the key time, at its own capture time."""
    record = dict(pair.calibration["cameras"][name])
    pose = record.pop("cam2ego_at_key", None)
    record.pop("stamp_ns", None)
    camera = Camera.from_record(record)
    return camera if pose is None else replace(camera, cam2ego=np.array(pose))


def _returns(
    pair: PairSample, cameras: Sequence[Camera], grid: VoxelGrid
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Project returns into every image: camera, pixel and depth of each."""
    found = []
    for index, camera in enumerate(cameras):
        points = _seen_hits(pair, index, grid) if pair.lidar is None else pair.lidar
        pixel, depth = camera.lens.see(transform_points(camera.ego2cam, points))
        inside = (depth > MIN_LIDAR_DEPTH) & np.all((pixel >= 0) & (pixel < (camera.width, camera.height)), axis=-1)
        found.append(
            (
                np.full(np.count_nonzero(inside), index, np.uint8),
                pixel[inside].astype(np.float32),
                depth[inside].astype(np.float32),
            )
        )
    camera_index, pixels, depths = zip(*found, strict=True)
    return np.concatenate(camera_index), np.concatenate(pixels), np.concatenate(depths)


def _seen_hits(pair: PairSample, camera: int, grid: VoxelGrid) -> NDArray[np.floating[Any]]:
    """Return the centres (M, 3) of occupied cells with returns that a camera sees."""
    label = pair.label
    seen = (label.camera_visible >> camera_bit(camera)) & 1
    return grid.centres(np.argwhere((label.state == OCCUPIED_STATE) & (label.hit_sweeps > 0) & (seen > 0)))
