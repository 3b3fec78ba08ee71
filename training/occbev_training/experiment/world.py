"""The drives of an experiment: streets seen by four small cameras and a sparse LiDAR, with both kinds of labels.

Labels of phase 1 come from LiDAR and poses alone: no box is given to the label builder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE_STATE, OCCUPIED_STATE
from occbev.files import replace_file
from occbev.geometry import make_transform, rotation_from_rpy, transform_points
from occbev.inference.preprocess import Preprocessor
from occbev.results import FrameSet
from occbev.rig import Camera, CameraRig
from occbev_training.data.cache import write_sample
from occbev_training.data.shards import LabelVolumes
from occbev_training.experiment.network import GRID, MODEL
from occbev_training.experiment.plan import PlanError, WorldPlan
from occbev_training.experiment.pool import drive_folder, sample_file
from occbev_training.experiment.recorded import make_blocks, rig_file
from occbev_training.occupancy.labels import LabelBuilder, LabelConfig
from occbev_training.occupancy.paper import FORWARD2LIDAR, paper_label
from occbev_training.occupancy.prepare import PrepareConfig, make_sample
from occbev_training.simulator.drive import DriveConfig, SimulatedDrive
from occbev_training.simulator.lidar import LidarConfig
from occbev_training.sources.recording import Annotations, OccupancyTruth
from occbev_training.workers import KILLED, TaskRunner


@dataclass(frozen=True)
class VehicleType:
    """How a vehicle carries its four cameras. first_yaw_deg: heading of the first, to the left; the others are 90 degrees
    apart. pitch_deg: downwards. height: metres above the ground."""

    first_yaw_deg: float
    pitch_deg: float
    height: float


VEHICLES = (VehicleType(45.0, 0.0, 1.5), VehicleType(0.0, 2.0, 1.5), VehicleType(20.0, 4.0, 1.4))
"""Vehicles of training, development and test drives, in turn."""

UNSEEN_VEHICLE = VehicleType(67.0, 5.0, 1.8)
"""The vehicle of the split `unseen_rig`."""

FOCAL = 48.0
"""Focal length in pixels: 90 degrees across 96."""

_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def rig_of(vehicle: VehicleType, rng: np.random.Generator) -> CameraRig:
    """Mount four cameras; calibration is off by up to one pixel and half a degree between drives."""
    width, height = MODEL.image.width, MODEL.image.height
    cameras = []
    for number in range(4):
        yaw = np.deg2rad(vehicle.first_yaw_deg + 90 * number + rng.uniform(-0.5, 0.5))
        centre = np.array([width / 2, height / 2 - 3]) + rng.uniform(-1, 1, 2)
        intrinsic = np.array([[FOCAL, 0, centre[0]], [0, FOCAL, centre[1]], [0, 0, 1]])
        rotation = rotation_from_rpy(0.0, np.deg2rad(vehicle.pitch_deg), yaw) @ _OPTICAL
        place = [1.0 + 0.8 * np.cos(yaw), 0.6 * np.sin(yaw), vehicle.height]
        cameras.append(Camera(f"camera_{number}", width, height, intrinsic, make_transform(rotation, place)))
    return CameraRig(tuple(cameras))


def open_drive(
    split: str, number: int, world: WorldPlan, rig: CameraRig | None = None, zoom: int = 1
) -> SimulatedDrive:
    """Build the street of a split's drive and its vehicle.

    rig: cameras in place of those of the vehicle type. zoom: how much larger pictures are, for people to look at.
    """
    seed = getattr(world, split).seeds[number]
    vehicle = UNSEEN_VEHICLE if split == "unseen_rig" else VEHICLES[number % len(VEHICLES)]
    rig = _enlarge(rig or rig_of(vehicle, np.random.default_rng((seed, 7))), zoom)
    lidar = LidarConfig(rings=world.rings, columns=world.columns)
    config = DriveConfig(world.keys, world.key_rate, lidar=lidar, rig=rig, world=world.version, grid=GRID)
    return SimulatedDrive(seed, config)


def _enlarge(rig: CameraRig, zoom: int) -> CameraRig:
    return CameraRig(
        tuple(one.resize(zoom, zoom, (0.0, 0.0), (zoom * one.width, zoom * one.height)) for one in rig.cameras)
    )


def make_world(
    folder: Path, world: WorldPlan, workers: int, recording: Path | None = None
) -> Iterator[tuple[int, int]]:
    """Make every drive that is not there yet, each in a worker process; yields (drives done, drives in all).

    recording: bag of the real drive, of a plan with one.
    Raises:
        PlanError: the folder holds drives of another plan, or a drive cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker, record = folder / "world.json", json.loads(json.dumps(world.as_record()))
    if marker.exists() and json.loads(marker.read_text()) != record:
        raise PlanError(f"{folder}: holds the drives of another plan; name another folder with --out")
    marker.write_text(json.dumps(record, indent=1))
    if world.recorded is not None:
        make_blocks(folder, world, recording)
    every = [(split, number) for split in world.simulated for number in range(world.count(split))]
    wanted = [job for job in every if not drive_folder(folder, *job, world).joinpath("done.json").exists()]
    work = partial(_make_drive, folder=folder, world=world)
    results = map(work, wanted) if workers <= 1 else TaskRunner(work, _report_death).run(wanted, workers)
    for done, problem in enumerate(results, len(every) - len(wanted) + 1):
        if problem:
            raise PlanError(f"{folder}: {problem}")
        yield done, len(every)


class _Recorded:
    """A simulated drive as a `Recording`; it has dense truth only `with_truth`."""

    def __init__(self, drive: SimulatedDrive, with_truth: bool) -> None:
        self.name, self.rig, self.lidar2ego, self.trajectory = drive.name, drive.rig, drive.lidar2ego, drive.trajectory
        self.key_stamp_ns, self.sweep_stamp_ns = drive.key_stamp_ns, drive.sweep_stamp_ns
        self.sweep, self.frame_set = drive.sweep, drive.frame_set
        self._drive, self._with_truth = drive, with_truth

    def annotations(self, key: int) -> Annotations:
        return self._drive.annotations(key)

    def occupancy_truth(self, key: int) -> OccupancyTruth | None:
        return self._drive.occupancy_truth(key) if self._with_truth else None


def _make_drive(job: tuple[str, int], folder: Path, world: WorldPlan) -> str:
    """Write the samples of one drive; returns what went wrong, "" if nothing."""
    split, number = job
    target = drive_folder(folder, split, number, world)
    target.mkdir(parents=True, exist_ok=True)
    rig = None if world.recorded is None else CameraRig.load(rig_file(folder))
    recording = _Recorded(open_drive(split, number, world, rig), with_truth=split != "train")
    config, preprocessor = PrepareConfig(MODEL.image, GRID), Preprocessor(MODEL.image)
    builder = LabelBuilder(recording, LabelConfig(), GRID)

    def label(key: int, frames: FrameSet) -> LabelVolumes:
        return builder.build(key, frames).volumes

    hashes = []
    for key in range(world.keys):
        frames = recording.frame_set(key)
        sample, broken = make_sample(recording, key, config, preprocessor, label, frames)
        if broken:
            return f"{recording.name} key {key}: {broken}"
        hashes.append(write_sample(sample_file(target, key), sample))
    if split == "train":
        published = np.stack([_published_state(recording, key) for key in range(world.keys)])
        with replace_file(target / "published.npy") as temporary, temporary.open("wb") as file:
            np.save(file, published)
    with replace_file(target / "done.json") as temporary:
        temporary.write_text(json.dumps(hashes))
    return ""


def _published_state(recording: _Recorded, key: int) -> NDArray[np.uint8]:
    """Label one key frame as published and bring it onto our grid, (X, Y, Z): free wherever it is not occupied.

    A voxel is occupied if the centre of an occupied one of the published grid lies in it. The frame is ours:
    the published frame differs between phases, which no arm copies.
    """
    label = paper_label(recording, key)
    centres = label.grid.centres(np.argwhere(label.state == OCCUPIED_STATE))
    cells, inside = GRID.indices(transform_points(recording.lidar2ego @ FORWARD2LIDAR, centres))
    state = np.full(GRID.shape, FREE_STATE, np.uint8)
    state[tuple(cells[inside].T)] = OCCUPIED_STATE
    return state


def _report_death(job: tuple[str, int]) -> str:
    return f"drive {job[1]} of {job[0]}: {KILLED}"
