"""What recordings a path holds: bags, nuScenes tables or seeds of the simulator, opened in any process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from occbev_training.sources.nuscenes import NuscenesRoot, open_nuscenes
from occbev_training.sources.recording import Recording, RecordingError

BAG_SUFFIXES = (".mcap", ".db3")


class Opener(Protocol):
    """A picklable way to a recording."""

    @property
    def name(self) -> str:
        """The recording's name."""
        ...

    def keys(self) -> int:
        """Number of key frames."""
        ...

    def __call__(self) -> Recording:
        """Open the recording."""
        ...


@dataclass(frozen=True)
class OpenBag:
    """Opens a ROS 2 bag."""

    path: Path
    key_interval: float = 0.5

    @property
    def name(self) -> str:
        """The bag's name."""
        return self.path.stem

    def keys(self) -> int:
        """Number of key frames; indexes the bag."""
        return len(self().key_stamp_ns)

    def __call__(self) -> Recording:
        """Index the bag."""
        from occbev_training.sources.bags import BagRecording

        return BagRecording(self.path, key_interval=self.key_interval)


@dataclass(frozen=True)
class OpenScene:
    """Opens one scene of a nuScenes root."""

    root: Path
    scene: str

    @property
    def name(self) -> str:
        """The scene's name."""
        return self.scene

    def keys(self) -> int:
        """Number of key frames whose files are there."""
        return len(self().key_stamp_ns)

    def __call__(self) -> Recording:
        """Open the scene."""
        return _root(self.root).recording(self.scene, available_only=True)


@dataclass(frozen=True)
class Simulate:
    """Makes a simulated drive."""

    seed: int
    frames: int = 20

    @property
    def name(self) -> str:
        """The drive's name."""
        return f"sim-{self.seed:06d}"

    def keys(self) -> int:
        """Number of key frames."""
        return self.frames

    def __call__(self) -> Recording:
        """Build the world."""
        from occbev_training.simulator.drive import DriveConfig, SimulatedDrive

        return SimulatedDrive(self.seed, DriveConfig(keys=self.frames))


@lru_cache(maxsize=2)
def _root(root: Path) -> NuscenesRoot:
    return open_nuscenes(root)


def find_recordings(path: Path, key_interval: float = 0.5) -> list[Opener]:
    """List the recordings of a nuScenes root, of a bag, or of a folder of bags, by name.

    Raises:
        RecordingError: there is none, or two have the same name.
    """
    if path.is_dir() and any(path.glob("v*/scene.json")):
        return [OpenScene(path, scene) for scene in _root(path).scenes]
    found: list[Opener] = [OpenBag(bag, key_interval) for bag in _bags(path)]
    if not found:
        raise RecordingError(
            f"{path}: neither a nuScenes root (a folder with v*/scene.json) nor a bag "
            f"(a folder with metadata.yaml, or a file ending in {' or '.join(BAG_SUFFIXES)})"
        )
    names = [opener.name for opener in found]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordingError(
            f"{path}: two bags are named {twice!r}; a name is the key of its samples"
        )
    return found


def _bags(path: Path) -> Iterator[Path]:
    """Yield bags at or below a path: folders with metadata before single files."""
    if (path / "metadata.yaml").is_file() or (path.is_file() and path.suffix in BAG_SUFFIXES):
        yield path
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() or child.suffix in BAG_SUFFIXES:
                yield from _bags(child)
