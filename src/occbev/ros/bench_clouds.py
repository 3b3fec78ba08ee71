"""30,000 labelled voxels to a PointCloud2: ours beside the two ways that ROS users know."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from occbev.benchmarks import Options, Report, run_interleaved
from occbev.classes import FREE, OCCUPANCY_COLOURS, OCCUPIED_STATE
from occbev.grid import GRIDS, xyz_from_volume
from occbev.results import Occupancy

VOXELS = 30_000


def run(options: Options) -> Report:
    """Time the cloud writers; needs ROS."""
    from occbev.ros.outputs import POINT_FIELDS, CloudWriter, header_at, shown_voxels

    occupancy, header = make_labelled_volume(VOXELS), header_at(1, "base_link")
    writer = CloudWriter()
    dtype = np.dtype(
        {
            "names": [name for name, _, _ in POINT_FIELDS],
            "formats": ["<f4", "<f4", "<f4", "<u4", "<f4", "u1"],
            "offsets": [offset for _, offset, _ in POINT_FIELDS],
            "itemsize": 24,
        }
    )
    chosen = shown_voxels(occupancy)
    timings = run_interleaved(
        {
            "ours": lambda: writer.message(occupancy, header),
            "structured": lambda: _write_structured(occupancy, dtype, header),
            "ours_of_chosen": lambda: writer.message_of(occupancy, *chosen, header),
        },
        options.rounds,
    )
    values = {
        "cloud_ms": round(timings["ours_of_chosen"].cpu_ms, 3),
        "volume_to_cloud_ms": round(timings["ours"].cpu_ms, 3),
        "structured_create_cloud_ms": round(timings["structured"].cpu_ms, 3),
        "voxels": len(chosen[0]),
    }
    ratio = timings["structured"].cpu_ms / timings["ours"].cpu_ms
    return Report("clouds", values, {"vs_structured_create_cloud": round(ratio, 2)})


def make_labelled_volume(count: int) -> Occupancy:
    """Make an Occ3D volume with `count` occupied voxels, in memory as the pipeline gives it."""
    grid, rng = GRIDS["occ3d"], np.random.default_rng(0)
    state = np.ones(grid.size, np.uint8)
    state[rng.choice(grid.size, count, replace=False)] = 2
    label = np.where(state == 2, rng.integers(0, FREE, grid.size), FREE).astype(np.uint8)
    confidence = rng.random(grid.size, np.float32)
    shape = grid.shape[::-1]
    label, confidence, state = (xyz_from_volume(array.reshape(shape)) for array in (label, confidence, state))
    return Occupancy(label, confidence, state, grid)


def _write_structured(occupancy: Occupancy, dtype: np.dtype[Any], header: Any) -> Any:
    """The usual way: fill a structured array field by field, then make a message of its bytes."""
    from sensor_msgs.msg import PointCloud2, PointField

    from occbev.ros.outputs import POINT_FIELDS

    indices = np.argwhere(occupancy.state == OCCUPIED_STATE)
    chosen = tuple(indices.T)
    points = np.zeros(len(indices), dtype)
    points["x"], points["y"], points["z"] = occupancy.grid.centres(indices).T
    r, g, b = OCCUPANCY_COLOURS[occupancy.label[chosen]].astype(np.uint32).T
    points["rgb"] = (r << 16) | (g << 8) | b
    points["confidence"], points["label"] = occupancy.confidence[chosen], occupancy.label[chosen]
    fields = [PointField(name=n, offset=o, datatype=t, count=1) for n, o, t in POINT_FIELDS]
    cloud = PointCloud2(
        header=header,
        height=1,
        width=len(points),
        is_dense=True,
        fields=fields,
        point_step=dtype.itemsize,
        row_step=dtype.itemsize * len(points),
    )
    cloud.data = array("B", points.tobytes())
    return cloud
