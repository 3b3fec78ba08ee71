"""Pictures of a stored pair, to be looked at: images with returns, label from above and in slices, evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import FREE, OCCUPANCY_CLASSES, OCCUPIED_STATE
from occbev.geometry import transform_points
from occbev.grid import VoxelGrid
from occbev.inference.preprocess import decode_image
from occbev.reports.moments import Moment, fit_rig
from occbev.reports.rendering import Picture, beside, camera_mosaic, draw_points, stack_pictures
from occbev.results import Occupancy
from occbev.rig import Camera, CameraRig
from occbev_training.data.shards import PairSample
from occbev_training.occupancy.paper import FORWARD2LIDAR, PAPER_GRID

OTHERS = OCCUPANCY_CLASSES.index("others")

_UNOBSERVED, _FREE, _HIDDEN, _SEEN = (28, 28, 32), (232, 236, 240), (196, 140, 70), (30, 100, 200)


def grid_of(sample: PairSample) -> VoxelGrid:
    """Return the grid that a sample's label was made on; raises ValueError if its hash disagrees."""
    grid = VoxelGrid.from_record(dict(sample.meta["grid"]))
    if grid.hash != sample.label.grid_hash:
        raise ValueError(f"{sample.key}: label of grid {sample.label.grid_hash}, record of {grid.hash}")
    return grid


def pair_moment(sample: PairSample) -> Moment:
    """Return a pair as a moment: its label as the truth, without classes, and the stored returns as a cloud.

    A label of the published recipe, whose grid stands on the LiDAR, is shown by the centres of its cells.
    """
    grid, images = grid_of(sample), dict(sample.images)
    names = [name for name in sample.calibration["order"] if name in images]
    cameras = tuple(_camera_at_key(sample.calibration["cameras"][name]) for name in names)
    clouds = {} if sample.lidar is None else {"returns": sample.lidar}
    occupancy = None
    if grid.frame == PAPER_GRID.frame:
        clouds["occupied_cells"] = _hit_centres(sample, grid).astype(np.float32)
    else:
        state = sample.label.state
        label = np.where(state == OCCUPIED_STATE, OTHERS, FREE).astype(np.uint8)
        occupancy = Occupancy(label, (state > 0).astype(np.float32), state, grid, has_classes=False)
    return Moment(
        int(sample.key.rsplit("/", 1)[-1]),
        images=images,
        rig=fit_rig(CameraRig(cameras), images) if cameras else None,
        true_occupancy=occupancy,
        clouds=clouds,
        missing={name: "not in the pair" for name in sample.calibration["order"] if name not in images},
    )


def pair_picture(sample: PairSample, width: int = 1500) -> Picture:
    """Draw one pair: cameras with returns over them, then the label from above, in slices, and its evidence."""
    parts = []
    if sample.images:
        parts.append(_cameras(sample, width))
    label = sample.label
    size = width // 3 - 16
    views = {
        "occupied, seen by a camera blue, by LiDAR alone brown": _state_above(sample),
        "height of the highest occupied cell": _height_above(sample),
        "cameras that see a column": _heat(_count_bits(label.camera_visible).max(axis=2), 3),
    }
    parts.append(beside({name: _scale(view, size) for name, view in views.items()}))
    evidence = {
        "sweeps that hit a column": _heat(label.hit_sweeps.max(axis=2), 21),
        "sweeps that passed a column": _heat(label.pass_sweeps.max(axis=2), 21),
        "what stands 0.2 to 1 m above the road": _low_above(sample),
    }
    parts.append(beside({name: _scale(view, size) for name, view in evidence.items()}))
    grid = grid_of(sample)
    layers = np.linspace(1, grid.shape[2] - 1, 6).astype(int)
    slices = {
        f"z {grid.lo[2] + (z + 0.5) * grid.pitch[2]:.1f} m": _scale(_layer(sample, z), width // 6 - 14)
        for z in dict.fromkeys(layers.tolist())
    }
    parts.append(beside(slices))
    parts.append(beside({"cut along the drive, forward to the right": _scale(_side(sample), width - 16)}))
    return stack_pictures(parts)


def _cameras(sample: PairSample, width: int) -> Picture:
    """Lay the images out with the stored returns, or the hit cells' centres where none are stored."""
    pictures: dict[str, Picture] = {}
    grid = grid_of(sample)
    points = _hit_centres(sample, grid) if sample.lidar is None else sample.lidar
    for name in sample.calibration["order"]:
        if name in sample.images:
            picture = decode_image(sample.images[name], name)
            camera = _camera_at_key(sample.calibration["cameras"][name])
            pictures[name] = draw_points(picture, camera, points)
    return camera_mosaic(pictures, width)


def _hit_centres(sample: PairSample, grid: VoxelGrid) -> NDArray[np.floating[Any]]:
    """Return the centres (M, 3) of occupied cells, in ego at the key time."""
    occupied = sample.label.state == OCCUPIED_STATE
    if grid.frame == PAPER_GRID.frame:  # the published recipe's grid stands on the LiDAR
        lidar2ego = np.array(sample.calibration["lidar2ego"])
        return transform_points(lidar2ego @ FORWARD2LIDAR, grid.centres(np.argwhere(occupied)))
    return grid.centres(np.argwhere(occupied & (sample.label.hit_sweeps > 0)))


def _camera_at_key(record: Mapping[str, Any]) -> Camera:
    """Return a camera as it stood at its own exposure, in ego at the key time."""
    camera = Camera.from_record(dict(record))
    return Camera(
        camera.name,
        camera.width,
        camera.height,
        camera.intrinsic,
        np.array(record["cam2ego_at_key"]),
        camera.distortion_model,
        camera.distortion,
    )


def _upright(plane: NDArray[Any]) -> NDArray[Any]:
    """Turn an [x, y, ...] plane so that x points up and y to the left."""
    return np.ascontiguousarray(plane[::-1, ::-1])


def _scale(picture: Picture, width: int) -> Picture:
    height = round(picture.shape[0] * width / picture.shape[1])
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def _count_bits(volume: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.unpackbits(volume[..., None], axis=-1).sum(axis=-1, dtype=np.uint8)


def _colours(state: NDArray[np.uint8], visible: NDArray[np.uint8]) -> Picture:
    """Colour cells: unobserved dark, free light, occupied blue if a camera sees it, else brown."""
    picture = np.empty((*state.shape, 3), np.uint8)
    picture[state == 0], picture[state == 1] = _UNOBSERVED, _FREE
    picture[(state == 2) & (visible == 0)] = _HIDDEN
    picture[(state == 2) & (visible > 0)] = _SEEN
    return picture


def _state_above(sample: PairSample) -> Picture:
    """A column is what its cells above the lowest quarter hold: occupied before free before unobserved."""
    low = sample.label.state.shape[2] // 4
    upper = sample.label.state[:, :, low:]
    seen = np.where(upper == 2, sample.label.camera_visible[:, :, low:], 0).max(axis=2)
    return _upright(_colours(upper.max(axis=2), seen))


def _low_above(sample: PairSample) -> Picture:
    """What stands on the ground: the cells between about 0.2 m and 1 m above the vehicle's road."""
    grid, label = grid_of(sample), sample.label
    first = max(0, int(np.ceil((0.2 - grid.lo[2]) / grid.pitch[2])))
    part = slice(first, max(first + 1, int((1.0 - grid.lo[2]) / grid.pitch[2]) + 1))
    seen = np.where(label.state[:, :, part] == 2, label.camera_visible[:, :, part], 0).max(axis=2)
    return _upright(_colours(label.state[:, :, part].max(axis=2), seen))


def _height_above(sample: PairSample) -> Picture:
    occupied = sample.label.state == 2
    top = np.where(occupied.any(axis=2), occupied.shape[2] - np.argmax(occupied[:, :, ::-1], axis=2), 0)
    return _heat(top, occupied.shape[2])


def _heat(plane: NDArray[Any], top: float) -> Picture:
    """Colour a plane of counts, zero dark, `top` and more bright."""
    level = np.clip(plane.astype(np.float64) / top * 255, 0, 255).astype(np.uint8)
    picture = cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    picture[plane == 0] = _UNOBSERVED
    return _upright(picture)


def _layer(sample: PairSample, z: int) -> Picture:
    return _upright(_colours(sample.label.state[:, :, z], sample.label.camera_visible[:, :, z]))


def _side(sample: PairSample) -> Picture:
    """Cut along the drive: forward to the right, up upwards, cells twice as high as wide."""
    middle = sample.label.state.shape[1] // 2
    cut = _colours(sample.label.state[:, middle], sample.label.camera_visible[:, middle])  # (X, Z, 3)
    return np.repeat(np.ascontiguousarray(np.swapaxes(cut, 0, 1)[::-1]), 2, axis=0)
