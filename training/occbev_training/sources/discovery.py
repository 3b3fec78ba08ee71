"""What recordings a path holds: bags, nuScenes tables or seeds of the simulator, opened in any process."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from occbev.messages.bags import split_order
from occbev_training.sources.infos import InfoRecording, read_drives
from occbev_training.sources.lidar_files import COLUMNS
from occbev_training.sources.nuscenes import NuscenesRoot, RootOptions, find_tables, open_nuscenes
from occbev_training.sources.recording import Recording, RecordingError, leave_out

if TYPE_CHECKING:
    from occbev_training.sources.bag_index import BagOptions
    from occbev_training.sources.bags import BagRecording

BAG_SUFFIXES = (".mcap", ".db3")


class Opener(Protocol):
    """Opens a recording, in any process; it is picklable."""

    @property
    def name(self) -> str:
        """The recording's name."""
        ...

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits: a hash of the contents and of the options, whatever the folder."""
        ...

    def keys(self) -> int:
        """Number of key frames."""
        ...

    def __call__(self) -> Recording:
        """Open the recording."""
        ...


def _fingerprint(how: object, files: Iterable[Path] = ()) -> str:
    """Hash how a recording is read, and its files by name and content."""
    contents = sorted((path.name, _content_hash(path)) for path in files if path.is_file())
    return hashlib.sha256(json.dumps([how, contents], sort_keys=True).encode()).hexdigest()[:12]


def _content_hash(path: Path) -> str:
    return _hash_once(path, *_status(path))


def _status(path: Path) -> tuple[int, int, int]:
    """Return what changes as soon as a file does: size, time and inode."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@lru_cache(maxsize=65536)
def _hash_once(path: Path, *status: int) -> str:
    """Return the hash of a file's content; this process keeps it while size, time and inode of the file stay the same."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _bag_options() -> BagOptions:
    from occbev_training.sources.bag_index import BagOptions

    return BagOptions(key_interval=0.5)


@dataclass(frozen=True)
class OpenBag:
    """Opens a part of a ROS 2 bag. check_clocks: "refuse", "fix" or "ignore" wrong clocks."""

    path: Path
    options: BagOptions = field(default_factory=_bag_options)
    check_clocks: str = "refuse"

    @property
    def name(self) -> str:
        """The bag's name, or its folder's where it is just "bag"; with its part where that is not the first."""
        part = self.options.part
        return self._whole + (f"-part{part}" if part else "")

    @property
    def _whole(self) -> str:
        """The name of all parts together."""
        path = _unpacked_name(self.path)
        path = path.with_suffix("") if path.suffix in BAG_SUFFIXES else path
        return path.absolute().parent.name if path.name == "bag" else path.name

    @property
    def fingerprint(self) -> str:
        """Options, corrected clocks, calibration, and the bag's files."""
        rig = self.options.rig
        how = asdict(replace(self.options, rig=None)) | {"rig": rig.hash if rig else None}
        return _fingerprint(how, self._files)

    def parts(self) -> list[OpenBag]:
        """Return an opener for each part of the bag; raises RecordingError where its clocks are refused."""
        from occbev_training.sources.bag_check import refuse_bad_clocks
        from occbev_training.sources.bag_index import IndexedBag

        if self.check_clocks == "refuse":
            refuse_bad_clocks(self.path, self.options)
        bag = IndexedBag(self.path, self.options)
        bag.close()
        return [replace(self, options=replace(self.options, part=i)) for i in range(bag.parts)]

    def checked(self) -> OpenBag:
        """Return this opener, with corrected clocks if `check_clocks` is "fix"; each part has offsets of its own.

        Raises RecordingError where an offset cannot be measured with confidence.
        """
        from occbev_training.sources.bag_check import fix_clocks

        fix = self.check_clocks == "fix"
        options = fix_clocks(self.path, self.options) if fix else self.options
        return replace(self, options=options, check_clocks="ignore")

    def keys(self) -> int:
        """Number of key frames; indexes the bag."""
        return len(self().key_stamp_ns)

    def __call__(self) -> BagRecording:
        """Index the bag; this process keeps it open for the next call."""
        from occbev_training.sources.bags import BagRecording

        state = tuple((path, _status(path)) for path in self._files)
        for opener, known, recording in _OPEN_BAG:
            if (opener, known) == (self, state):
                return recording
        while _OPEN_BAG:  # forgotten before the next is opened, which may fail
            _OPEN_BAG.pop()[-1].close()
        recording = BagRecording(self.path, self.options)
        recording.name, recording.location = self.name, self._whole
        _OPEN_BAG.append((self, state, recording))
        return recording

    @property
    def _files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else sorted(path for path in self.path.iterdir() if path.is_file())


_OPEN_BAG: list[tuple[OpenBag, object, BagRecording]] = []
"""The bag that was opened last: indexing reads all of it."""


@dataclass(frozen=True)
class OpenInfos:
    """Opens one drive of a converted info file of mmdet3d.

    root: data root of its files. lidar_columns: number of float32 values of a LiDAR point.
    """

    infos: Path
    root: Path
    drive: str
    lidar_columns: int = COLUMNS

    @property
    def name(self) -> str:
        """The drive's name."""
        return self.drive

    @property
    def fingerprint(self) -> str:
        """The info file, the drive's files, and how they are read."""
        return _fingerprint(["infos", self.lidar_columns], [self.infos, *self._recording().files])

    def keys(self) -> int:
        """Number of key frames of which an image is there."""
        return len(self().key_stamp_ns)

    def __call__(self) -> Recording:
        """Open the drive."""
        return self._recording()

    def _recording(self) -> InfoRecording:
        return InfoRecording(self.drive, read_drives(self.infos)[self.drive], self.root, self.lidar_columns)


@dataclass(frozen=True)
class OpenScene:
    """Opens one scene of a nuScenes-like root."""

    root: Path
    scene: str
    options: RootOptions = field(default_factory=RootOptions)

    @property
    def name(self) -> str:
        """The scene's name."""
        return self.scene

    @property
    def fingerprint(self) -> str:
        """The tables, the files of this scene, and how they are read."""
        root = _root(self.root, self.options)
        how = ["nuscenes", asdict(self.options)]
        return _fingerprint(how, [*root.folder.glob("*.json"), *root.recording(self.scene).files])

    def keys(self) -> int:
        """Number of key frames whose files are there."""
        return len(self().key_stamp_ns)

    def __call__(self) -> Recording:
        """Open the scene."""
        return _root(self.root, self.options).recording(self.scene, available_only=True)


@dataclass(frozen=True)
class Simulate:
    """Makes a simulated drive."""

    seed: int
    frames: int = 20

    @property
    def name(self) -> str:
        """The drive's name."""
        return f"sim-{self.seed:06d}"

    @property
    def fingerprint(self) -> str:
        """The seed and the length: a longer drive is another one."""
        return _fingerprint([self.seed, self.frames])

    def keys(self) -> int:
        """Number of key frames."""
        return self.frames

    def __call__(self) -> Recording:
        """Build the world."""
        from occbev_training.simulator.drive import DriveConfig, SimulatedDrive

        return SimulatedDrive(self.seed, DriveConfig(keys=self.frames))


@lru_cache(maxsize=2)
def _root(root: Path, options: RootOptions) -> NuscenesRoot:
    return open_nuscenes(root, options=options)


def find_recordings(
    path: Path,
    options: BagOptions | None = None,
    check_clocks: str = "refuse",
    data_root: Path | None = None,
    root_options: RootOptions | None = None,
) -> list[Opener]:
    """List recordings as `search_recordings` does.

    Raises:
        RecordingError: there is none, or one of them cannot be listed.
    """
    found, problems = search_recordings(path, options, check_clocks, data_root, root_options)
    for name, reason in problems.items():
        raise RecordingError(reason if name in reason else f"{name}: {reason}")
    return found


def search_recordings(
    path: Path,
    options: BagOptions | None = None,
    check_clocks: str = "refuse",
    data_root: Path | None = None,
    root_options: RootOptions | None = None,
) -> tuple[list[Opener], dict[str, str]]:
    """List the recordings of a nuScenes-like root, of a converted info file, of a bag, or of a folder of these.

    options: how bags are read. data_root: where the files of an info file are; its folder if None.
    root_options: how nuScenes-like roots are read.
    Returns: the recordings, and places that cannot be listed -> why.
    """
    options, root_options = options or _bag_options(), root_options or RootOptions()
    found: list[Opener] = []
    problems: dict[str, str] = {}
    if path.is_file() and path.suffix == ".json":
        with leave_out(problems, str(path)):
            root, columns = data_root or path.parent, root_options.lidar_columns
            found += [OpenInfos(path, root, drive, columns) for drive in read_drives(path)]
        return found, problems
    for place in _find_places(path, problems):
        with leave_out(problems, str(place)):
            if place.is_dir() and find_tables(place):
                found += [OpenScene(place, scene, root_options) for scene in _root(place, root_options).scenes]
            else:
                found.append(OpenBag(place, options, check_clocks))
    if not found and not problems:
        problems[str(path)] = (
            f"{path}: neither a nuScenes root (a folder with v*/scene.json, or a T4 one with annotation/scene.json), "
            "nor an info file, nor a bag "
            f"(a folder with metadata.yaml, or a file ending in {' or '.join(BAG_SUFFIXES)})"
        )
    return found, problems


def holds_recordings(path: Path) -> bool:
    """Whether a path is, or holds, anything that `search_recordings` or `convert_infos` reads, or has the name of one."""
    return path.suffix in (".pkl", *BAG_SUFFIXES) or bool(_find_places(path, {}))


def _find_places(path: Path, problems: dict[str, str], seen: set[Path] | None = None) -> list[Path]:
    """List roots and bags at or below a path. A root or bag is not searched further, and no folder is searched twice.

    problems: gets the folders that cannot be read.
    """
    seen = set() if seen is None else seen
    with leave_out(problems, str(path)):
        if path.resolve() in seen:
            return []
        seen.add(path.resolve())
        if (
            (path.is_dir() and find_tables(path))
            or (path / "metadata.yaml").is_file()
            or (path.is_file() and _is_bag_file(path))
            or (path.is_dir() and _holds_splits(path))
        ):
            return [path]
        children = sorted(path.iterdir()) if path.is_dir() else []
        below = [child for child in children if child.is_dir() or _is_bag_file(child)]
        return [place for child in below for place in _find_places(child, problems, seen)]
    return []


def _is_bag_file(path: Path) -> bool:
    """Whether a file has the name of a bag's storage, packed or not; bags of ROS 1 are refused with the remedy."""
    return _unpacked_name(path).suffix in (*BAG_SUFFIXES, ".bag")


def _unpacked_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".zstd", ".zst") else path


def _holds_splits(path: Path) -> bool:
    """Whether a folder without metadata.yaml holds the numbered parts of one recording: drive_0.mcap, drive_1.mcap."""
    parts = [split_order(file) for file in path.iterdir() if file.is_file() and _is_bag_file(file)]
    one_name = len({stem for stem, _, _ in parts}) == 1
    return len(parts) > 1 and one_name and sorted(number for _, number, _ in parts) == list(range(len(parts)))


def read_names(path: Path) -> tuple[str, ...]:
    """Read names of drives, one a line; empty lines and those that begin with # are left out.

    Raises:
        RecordingError: no such file, or no name in it.
    """
    try:
        lines = [line.strip() for line in _read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(f"{path}: no list of drives: {error}") from error
    names = tuple(line for line in lines if line and not line.startswith("#"))
    if not names:
        raise RecordingError(f"{path}: names no drive; want one name a line")
    return names


def _read_text(path: Path) -> str:
    """Read text in UTF-8, or in UTF-16 where a byte order mark says so; the mark is no part of it."""
    data = path.read_bytes()
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


def chosen_names(found: Sequence[str], wanted: Sequence[str] | None, where: Path) -> list[str]:
    """Return the names that are wanted, in the order found; all by default.

    Raises:
        RecordingError: a wanted one is not there.
    """
    missing = sorted(set(wanted or ()) - set(found))
    if missing:
        raise RecordingError(
            f"{where}: {len(missing)} of the drives asked for are not among its {len(found)}: {missing[:3]}"
        )
    return [name for name in found if wanted is None or name in set(wanted)]
