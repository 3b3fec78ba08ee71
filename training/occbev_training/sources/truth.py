"""Ground truth beside a bag: rig, poses, boxes and dense labels of each key frame, to score a run with.

Bags carry what sensors see; the truth stays in a folder of its own that no node reads.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occbev.classes import DETECTION_CLASSES
from occbev.files import read_arrays
from occbev.grid import VoxelGrid
from occbev.results import Boxes3D
from occbev.rig import CameraRig
from occbev.trajectory import Trajectory
from occbev_training.sources.recording import (
    Annotations,
    OccupancyTruth,
    Recording,
    RecordingError,
)

FORMAT = "occbev-truth/1"


@dataclass(frozen=True)
class Truth:
    """The ground truth of a drive: the labels of each key frame, and the poses.

    key_stamp_ns: (K,) int64. lidar2ego: (4, 4). Labels are in base_link at their key stamp.
    """

    folder: Path
    name: str
    rig: CameraRig
    lidar2ego: NDArray[np.float64]
    trajectory: Trajectory
    key_stamp_ns: NDArray[np.int64]

    def annotations(self, key: int) -> Annotations | None:
        """Return the boxes of one key frame, or None where the recording had none."""
        path = self.folder / "boxes" / f"{self.key_stamp_ns[key]}.json"
        return _read_boxes(path) if path.is_file() else None

    def occupancy_truth(self, key: int) -> OccupancyTruth | None:
        """Return the dense labels of one key frame, or None where the recording had none."""
        path = self.folder / "occupancy" / f"{self.key_stamp_ns[key]}.npz"
        if not path.is_file():
            return None
        arrays = read_arrays(path, ("grid", "semantics", "mask_lidar", "mask_camera"))
        grid = VoxelGrid.from_record(json.loads(str(arrays["grid"])))
        masks = {
            name: np.unpackbits(arrays[name], count=grid.size).reshape(grid.shape).astype(bool)
            for name in ("mask_lidar", "mask_camera")
        }
        return OccupancyTruth(arrays["semantics"], grid=grid, **masks)

    def nearest_key(self, stamp_ns: int, tolerance: float = 0.06) -> int | None:
        """Return the key frame nearest to a stamp, or None where none lies within `tolerance` seconds."""
        away = np.abs(self.key_stamp_ns - np.int64(stamp_ns))
        nearest = int(np.argmin(away))
        return nearest if away[nearest] <= tolerance * 1e9 else None


def write_truth(recording: Recording, folder: Path) -> None:
    """Write the truth of a recording; the folder appears only when it is complete.

    Raises:
        RecordingError: the folder is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise RecordingError(f"{folder}: is there already and is not overwritten; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(recording, partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_truth(folder: Path) -> Truth:
    """Open a truth folder; raises RecordingError naming what is missing."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "index.json").read_text())
        if record["format"] != FORMAT:
            raise RecordingError(f"{folder}: format {record['format']!r}, want {FORMAT!r}")
        poses = read_arrays(folder / "trajectory.npz", ("stamp_ns", "ego2global"))
        trajectory = Trajectory(poses["stamp_ns"], poses["ego2global"])
        return Truth(
            folder,
            record["name"],
            CameraRig.load(folder / "rig.yaml"),
            np.array(record["lidar2ego"]),
            trajectory,
            np.array(record["key_stamp_ns"], np.int64),
        )
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise RecordingError(f"{folder}: not a folder of truth, as simulate writes it beside a bag: {error}") from error


def _write(recording: Recording, folder: Path) -> None:
    (folder / "boxes").mkdir(parents=True)
    (folder / "occupancy").mkdir()
    for key, stamp in enumerate(recording.key_stamp_ns):
        annotations, occupancy = recording.annotations(key), recording.occupancy_truth(key)
        if annotations is not None:
            (folder / "boxes" / f"{stamp}.json").write_text(json.dumps(_boxes_record(annotations)))
        if occupancy is not None:
            np.savez_compressed(
                folder / "occupancy" / f"{stamp}.npz",
                semantics=occupancy.semantics,
                mask_lidar=np.packbits(occupancy.mask_lidar),
                mask_camera=np.packbits(occupancy.mask_camera),
                grid=json.dumps(occupancy.grid.as_record()),
            )
    recording.rig.save(folder / "rig.yaml")
    np.savez_compressed(
        folder / "trajectory.npz", stamp_ns=recording.trajectory.stamp_ns, ego2global=recording.trajectory.ego2global
    )
    record = {
        "format": FORMAT,
        "name": recording.name,
        "lidar2ego": np.asarray(recording.lidar2ego).tolist(),
        "key_stamp_ns": [int(stamp) for stamp in recording.key_stamp_ns],
    }
    (folder / "index.json").write_text(json.dumps(record))


def _boxes_record(annotations: Annotations) -> list[dict[str, Any]]:
    """One record per box; an unknown velocity is null, since JSON has no NaN."""
    boxes = annotations.boxes
    return [
        {
            "class": DETECTION_CLASSES[int(boxes.label[i])],
            "instance": annotations.instance[i],
            "lidar_points": int(annotations.lidar_points[i]),
            "box": [float(v) for v in boxes.box[i, :7]],
            "velocity": [float(v) for v in boxes.box[i, 7:]] if np.isfinite(boxes.box[i, 7:]).all() else None,
        }
        for i in range(len(boxes))
    ]


def _read_boxes(path: Path) -> Annotations:
    records = json.loads(path.read_text())
    box = [[*r["box"], *(r["velocity"] or (np.nan, np.nan))] for r in records]
    boxes = Boxes3D(
        np.array(box, np.float32).reshape(-1, 9),
        np.array([DETECTION_CLASSES.index(r["class"]) for r in records], np.int64),
        np.ones(len(records), np.float32),
    )
    points = np.array([r["lidar_points"] for r in records], np.int64)
    return Annotations(boxes, tuple(r["instance"] for r in records), points)
