"""Simulated drives as training samples: a choice of drives, four classes, and the occupancy that an arm learns."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.geometry import transform_points
from occbev_training.data.cache import SAMPLE_SUFFIX, CachedSample, CacheInfo, Moment, read_sample
from occbev_training.experiment.network import CLASSES, GRID, MODEL
from occbev_training.experiment.plan import WorldPlan
from occbev_training.simulator.drive import SimulatedDrive

LARGE = ("truck", "bus", "trailer", "construction_vehicle")
"""Classes of the simulator that are `truck` here. Other classes than those of `CLASSES` and these have no labels."""

LABELS = ("measured", "published", "wrong_drive", "unweighted")
"""What phase 1 learns: our labels, published ones, ours of another drive, ours without weights."""

_CLASS_OF = np.array(
    [
        CLASSES.index("truck" if name in LARGE else name) if name in CLASSES or name in LARGE else -1
        for name in DETECTION_CLASSES
    ]
)


@dataclass(frozen=True)
class Pool:
    """Key frames of some drives of one split, kept in memory after they are read; implements `Samples`.

    numbers: which drives of the split. labels: one of `LABELS`.
    """

    root: Path
    split: str
    world: WorldPlan
    numbers: tuple[int, ...]
    labels: str = "measured"
    seed: int = 0
    _kept: dict[int, CachedSample] = field(default_factory=dict, repr=False, compare=False)

    @property
    def info(self) -> CacheInfo:
        """What the samples were made for."""
        return CacheInfo(MODEL.image, tuple(f"camera_{number}" for number in range(4)), GRID)

    @property
    def drives(self) -> tuple[str, ...]:
        """Names of the drives."""
        return tuple(self._folder(number).name for number in self.numbers)

    @property
    def keys(self) -> int:
        """Key frames of a drive."""
        return self.world.keys_of(self.split)

    @property
    def hash(self) -> str:
        """Sixteen hex digits over the content of the drives."""
        digest = hashlib.sha256(self.labels.encode())
        for number in self.numbers:
            digest.update((self._folder(number) / "done.json").read_bytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.numbers) * self.keys

    def __getitem__(self, index: int) -> CachedSample:
        if index not in self._kept:
            number, key = self._place(index)
            self._kept[index] = self._relabel(read_in_classes(self._file(number, key)), number, key)
        return self._kept[index]

    def name(self, index: int) -> str:
        """Drive and key of one sample."""
        number, key = self._place(index)
        return f"{self._folder(number).name}/{key:04d}"

    def drive(self, index: int) -> str:
        """Drive of one sample."""
        return self._folder(self._place(index)[0]).name

    def moment(self, index: int) -> Moment:
        """Refuse: the network has no memory, so poses are not kept."""
        raise NotImplementedError("samples of an experiment hold no poses")

    def read(self, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read some arrays of one sample."""
        sample = self[index]
        return {name: getattr(sample, name) for name in names}

    def _place(self, index: int) -> tuple[int, int]:
        place, key = divmod(index, self.keys)
        return self.numbers[place], key

    def _folder(self, number: int) -> Path:
        return drive_folder(self.root, self.split, number, self.world)

    def _file(self, number: int, key: int) -> Path:
        return sample_file(self._folder(number), key)

    def _relabel(self, sample: CachedSample, number: int, key: int) -> CachedSample:
        """Replace the occupancy of a sample by the one that the arm learns."""
        if self.labels == "published":
            state = np.load(self._folder(number) / "published.npy", allow_pickle=False)[key]
            return replace(sample, state=state)
        if self.labels == "wrong_drive":
            other = read_in_classes(self._file(self._other_drive(number), key))
            names = ("state", "camera_visible", "hit_sweeps", "pass_sweeps")
            return replace(sample, **{name: getattr(other, name) for name in names})
        if self.labels == "unweighted":
            full = np.full(GRID.shape, 255, np.uint8)
            return replace(sample, camera_visible=full, hit_sweeps=full)
        return sample

    def _other_drive(self, number: int) -> int:
        """Return the drive whose labels a drive gets: every drive's go to another one, as the seed says."""
        order = np.random.default_rng((self.seed, 11)).permutation(len(self.numbers))
        place = int(np.flatnonzero(order == self.numbers.index(number))[0])
        return self.numbers[int(order[(place + 1) % len(order)])]


def whole_pool(root: Path, split: str, world: WorldPlan, labels: str = "measured", seed: int = 0) -> Pool:
    """Return every drive of a split."""
    return Pool(root, split, world, tuple(range(world.count(split))), labels, seed)


def labelled_pool(root: Path, world: WorldPlan, percent: float, seed: int) -> Pool:
    """Return the drives with boxes: the first ones of the seed's order, so that a smaller share is part of a larger."""
    split = world.labelled_split
    return Pool(root, split, world, labelled_drives(world.count(split), percent, seed))


def labelled_drives(drives: int, percent: float, seed: int) -> tuple[int, ...]:
    """Return which of `drives` training drives have boxes."""
    count = max(1, math.ceil(drives * percent / 100 - 1e-9))
    order = np.random.default_rng((seed, 10)).permutation(drives)
    return tuple(sorted(int(number) for number in order[:count]))


def drive_folder(folder: Path, split: str, number: int, world: WorldPlan) -> Path:
    """Folder of one drive, or of one block of a recording."""
    if split not in world.simulated:
        return folder / split / f"block-{number:03d}"
    return folder / split / SimulatedDrive.name_of(getattr(world, split).seeds[number])


def sample_file(drive: Path, key: int) -> Path:
    """File of one key frame in the folder of its drive."""
    return drive / f"{key:04d}{SAMPLE_SUFFIX}"


def read_in_classes(path: Path) -> CachedSample:
    """Read a sample with the boxes of the experiment: its four classes, centres inside the BEV."""
    sample = read_sample(path)
    label = _CLASS_OF[sample.labels]
    centre = sample.boxes[:, :2]
    inside = ((centre >= GRID.lo[:2]) & (centre < GRID.hi[:2])).all(1)
    kept = inside & (label >= 0)
    return replace(
        sample, boxes=sample.boxes[kept], labels=label[kept].astype(np.int64), lidar_points=sample.lidar_points[kept]
    )


def turn_sample(sample: CachedSample, quarters: int) -> CachedSample:
    """Turn the whole scene about the vehicle by quarters of a circle, counter-clockwise, without interpolation.

    Camera poses, boxes and every volume turn together; pictures and LiDAR pixels stay as they are.
    """
    cosine, sine = np.round([np.cos(np.pi / 2 * quarters), np.sin(np.pi / 2 * quarters)])
    turn = np.eye(4)
    turn[:2, :2] = [[cosine, -sine], [sine, cosine]]
    boxes = sample.boxes.copy()
    boxes[:, :3] = transform_points(turn, boxes[:, :3])
    boxes[:, 6] = np.pi - np.mod(np.pi - (boxes[:, 6] + np.pi / 2 * quarters), 2 * np.pi)
    boxes[:, 7:9] = boxes[:, 7:9] @ turn[:2, :2].T
    volumes = ("state", "camera_visible", "hit_sweeps", "pass_sweeps", "semantics", "mask_camera")
    turned = {name: np.rot90(getattr(sample, name), quarters, (0, 1)).copy() for name in volumes}
    return replace(sample, cam2ego=turn @ sample.cam2ego, boxes=boxes, **turned)
