"""One interface over what a network can be trained on, and the order in which samples are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from occbev.config import ModelConfig
from occbev_training.data.cache import CachedSample, CacheError, CacheInfo, Moment, open_cache
from occbev_training.data.shards import INDEX_NAME


class Samples(Protocol):
    """Key frames at network size, by time within each drive: a sample cache or pair shards."""

    @property
    def root(self) -> Path:
        """Folder that they are read from."""
        ...

    @property
    def info(self) -> CacheInfo:
        """What they were made for."""
        ...

    @property
    def drives(self) -> tuple[str, ...]:
        """Names of the drives, sorted."""
        ...

    @property
    def hash(self) -> str:
        """Sixteen hex digits over the content."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CachedSample: ...

    def name(self, index: int) -> str:
        """Drive and key of one sample, for messages."""
        ...

    def drive(self, index: int) -> str:
        """Drive of one sample."""
        ...

    def moment(self, index: int) -> Moment:
        """When and where one sample was taken."""
        ...

    def read(self, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read some arrays of one sample."""
        ...


@dataclass(frozen=True)
class JoinedSamples:
    """Samples of several folders one after the other: of one input size and grid, of rigs that may differ."""

    parts: tuple[Samples, ...]

    def __post_init__(self) -> None:
        first = self.parts[0].info
        for part in self.parts[1:]:
            if (part.info.image, part.info.grid) != (first.image, first.grid):
                raise CacheError(f"{part.root}: made with {part.info}, {self.parts[0].root} with {first}")

    @property
    def root(self) -> Path:
        """Folder of the first part."""
        return self.parts[0].root

    @property
    def info(self) -> CacheInfo:
        """What the first part was made for."""
        return self.parts[0].info

    @property
    def drives(self) -> tuple[str, ...]:
        """Names of the drives, sorted."""
        return tuple(sorted({drive for part in self.parts for drive in part.drives}))

    @property
    def hash(self) -> str:
        """Sixteen hex digits over the content."""
        return hashlib.sha256("".join(part.hash for part in self.parts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> CachedSample:
        part, place = self._place(index)
        return part[place]

    def name(self, index: int) -> str:
        """Drive and key of one sample, for messages."""
        part, place = self._place(index)
        return part.name(place)

    def drive(self, index: int) -> str:
        """Drive of one sample."""
        part, place = self._place(index)
        return part.drive(place)

    def moment(self, index: int) -> Moment:
        """When and where one sample was taken."""
        part, place = self._place(index)
        return part.moment(place)

    def read(self, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read some arrays of one sample."""
        part, place = self._place(index)
        return part.read(place, names)

    def _place(self, index: int) -> tuple[Samples, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


def open_samples(
    root: Path,
    model: ModelConfig,
    stage: str,
    split: str,
    drives: Sequence[str] | None = None,
    kept: Path | None = None,
) -> Samples:
    """Open pair shards or a sample cache, told apart by the index of the shards.

    split: "train" or "validation", of pair shards. kept: where decoded pairs are kept.
    Raises:
        CacheError: neither, or pairs where boxes and semantics are needed.
    """
    if not (root / INDEX_NAME).exists():
        if not any(root.glob("*/drive.json")):
            raise CacheError(f"{root}: {_describe_absent(stage)}")
        return open_cache(root, drives, labelled=stage == "pretrain")
    if stage != "pretrain":
        raise CacheError(f"{root}: pairs hold no boxes; fine-tune on a cache made by 'occbev-train prepare'")
    from occbev_training.data.pair_samples import open_pairs

    return open_pairs(root, model.image, model.grid, split, drives, kept)


def _describe_absent(stage: str) -> str:
    """Say what a folder lacks that holds no samples for a stage, and what makes them."""
    if stage == "pretrain":
        return (
            f"no pairs ({INDEX_NAME}) and no sample cache (*/drive.json); 'occbev-train pairs' or 'prepare' makes one"
        )
    return "no sample cache (*/drive.json); 'occbev-train prepare' makes one"


def require_boxes(samples: Samples) -> None:
    """Refuse samples without any box that a detection head could learn: one with a LiDAR return.

    Raises:
        CacheError: there is none; the head would learn that nothing is ever there.
    """
    boxes = 0
    for index in range(len(samples)):
        points = samples.read(index, ("lidar_points",))["lidar_points"]
        if np.any(points > 0):
            return
        boxes += len(points)
    what = f"{boxes} boxes, none of them with a LiDAR return" if boxes else "no box"
    raise CacheError(
        f"{samples.root}: {len(samples)} samples and {what}, so that no detection head can be trained on it; "
        "'occbev-train prepare' lists the categories that have no class, 'occbev-train labels' takes your own boxes"
    )


def balanced_order(samples: Samples, classes: int, seed: int) -> NDArray[np.int64]:
    """Return sample indices drawn so that every class is seen alike often (CBGS, Zhu et al. 2019, section 3.2).

    Each of the classes gets about 1 / classes of all (sample, class) pairs, drawn with replacement from
    the samples that hold it; samples without any box are not drawn.
    Raises:
        CacheError: no sample holds a box.
    """
    holders: list[list[int]] = [[] for _ in range(classes)]
    for index in range(len(samples)):
        arrays = samples.read(index, ("labels", "lidar_points"))
        for label in np.unique(arrays["labels"][arrays["lidar_points"] > 0]):
            holders[int(label)].append(index)
    total = sum(len(holder) for holder in holders)
    if total == 0:
        raise CacheError(f"{samples.root}: no sample holds a box, so that none can be balanced")
    rng = np.random.default_rng([seed, classes])
    drawn = [
        rng.choice(holder, int(total / classes), replace=True)  # len * (1 / classes) / (len / total)
        for holder in holders
        if holder
    ]
    return np.concatenate(drawn).astype(np.int64)
