"""The viewer beside a running node joins images with the results of the same key time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("vision_msgs", reason="needs vision_msgs, which the set-up builds")

from occbev.classes import OCCUPIED_STATE
from occbev.reports.moments import Moment
from occbev.ros.executor import SparingExecutor
from occbev.ros.view_node import ViewNode
from occbev.streams.parameters import parameters_from_record

pytestmark = pytest.mark.ros

CAMERAS = ("CAM_FRONT", "CAM_LEFT", "CAM_RIGHT")


def test_images_and_results_of_a_running_node_become_moments(make_bench: Callable[..., Any]) -> None:
    bench, moments, ended = make_bench().ready(), list[Moment](), threading.Event()
    parameters = parameters_from_record({"cameras": {"names": list(CAMERAS)}, "frozen_after": 0})
    viewer = ViewNode(parameters, bench.pipeline.grid, moments.append, context=bench.node.context)
    executor = SparingExecutor(context=bench.node.context)
    executor.add_node(viewer)

    def spin() -> None:
        while not ended.is_set():
            executor.spin_once()

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        deadline, start_ns = time.monotonic() + 60, 10**9
        while not any(
            m.boxes is not None and len(m.images) == 3 and m.rig is not None and m.latency_ms for m in moments
        ):
            assert time.monotonic() < deadline, [(m.stamp_ns, list(m.images), m.missing) for m in moments]
            bench.vehicle.calibrate()
            bench.vehicle.drive(4, start_ns=start_ns)
            start_ns += 4 * 50_000_000
    finally:
        ended.set()
        thread.join()
        executor.shutdown()
        viewer.destroy_node()
    whole = next(m for m in reversed(moments) if m.boxes is not None and len(m.images) == 3 and m.rig is not None)
    np.testing.assert_allclose(whole.boxes.box[0, :3], [10, 0, 1])  # type: ignore[union-attr]
    assert whole.boxes.box[0, 8] == 0  # type: ignore[union-attr]
    assert whole.boxes.box[0, 7] == 3, "velocities come with the markers"  # type: ignore[union-attr]
    assert np.argwhere(whole.occupancy.state == OCCUPIED_STATE).tolist() == [[1, 2, 3]]  # type: ignore[union-attr]
    assert set(whole.rig.names) == set(CAMERAS)  # type: ignore[union-attr]
    assert all(picture.shape == (48, 64, 3) for picture in whole.pictures.values())
    stamps = [m.stamp_ns for m in moments if m.boxes is not None]
    assert stamps == sorted(set(stamps)), "each key time is shown once, in order"
