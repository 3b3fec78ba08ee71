"""What is logged for a moment: entities where they belong, boxes and voxels projected through each camera's own lens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rerun", reason="needs the extra view")

from occbev.classes import FREE, OCCUPANCY_CLASSES, OCCUPIED_STATE
from occbev.geometry import make_transform
from occbev.grid import BevGrid, VoxelGrid
from occbev.reports.moments import GroundMap, Moment, fit_rig
from occbev.reports.rendering import box_lines, outer_voxels
from occbev.reports.rerun_log import MomentLog, voxel_rows
from occbev.results import Boxes3D, Occupancy
from occbev.rig import Camera, CameraRig

FORWARD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
AHEAD = make_transform(FORWARD, [1.0, 0, 1.5])
PINHOLE = Camera("front", 320, 180, np.array([[160.0, 0, 160], [0, 160, 90], [0, 0, 1]]), AHEAD)
FISHEYE = Camera(
    "wide/angle", 200, 200, np.array([[60.0, 0, 100], [0, 60, 100], [0, 0, 1]]), AHEAD, "equidistant", (0.0,) * 4
)
GRID = VoxelGrid((-8.0, -8.0, -1.0), (0.5, 0.5, 0.5), (60, 32, 6))
CAR = OCCUPANCY_CLASSES.index("car")


def moment(camera: Camera = PINHOLE) -> Moment:
    label, state = np.full(GRID.shape, FREE, np.uint8), np.ones(GRID.shape, np.uint8)
    label[36:40, 14:18, 1:4], state[36:40, 14:18, 1:4] = CAR, OCCUPIED_STATE
    box = np.array([[11, 0, 0.25, 2, 2, 1.5, 0.3, 2, 0], [12, 9, 0.25, 4, 2, 1.5, 0, 0, 0]], np.float32)
    boxes = Boxes3D(box, np.zeros(2, np.int64), np.array([0.9, 0.1], np.float32))
    image = np.full((camera.height, camera.width, 3), 128, np.uint8)
    return Moment(
        1_700_000_000_000_000_000,
        images={camera.name: image},
        rig=CameraRig((camera,)),
        boxes=boxes,
        occupancy=Occupancy(label, np.ones(GRID.shape, np.float32), state, GRID),
        ground=GroundMap(np.zeros((32, 60), np.int8), BevGrid((-8, -8), (0.5, 0.5), (60, 32))),
        clouds={"top": np.ones((4, 3), np.float32)},
        latency_ms={"total": 90.0},
        missing={"rear": "too late"},
    )


class Log(MomentLog):
    """Keeps what is logged: path -> newest entity."""

    def __init__(self, title: str, cameras: list[str], has_truth: bool = False) -> None:
        super().__init__(title, cameras, has_truth)
        self.entities: dict[str, Any] = {}
        stream, entities = self.stream, self.entities

        class Stream:
            def log(self, path: str, *parts: Any, **options: Any) -> None:
                entities[path] = parts[0]
                stream.log(path, *parts, **options)

            def __getattr__(self, name: str) -> Any:
                return getattr(stream, name)

        self.stream = Stream()  # type: ignore[assignment]


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log("test", ["front"])
    yield made
    made.close()


def numbers(batch: Any) -> np.ndarray:
    values = batch.as_arrow_array()
    return np.array(values.to_pylist(), np.float64)


def test_boxes_and_voxels_stand_in_base_link(log: Log) -> None:
    log.log(moment())
    boxes = log.entities["world/prediction/boxes"]
    np.testing.assert_allclose(numbers(boxes.centers), [[11, 0, 0.25]])  # the doubtful one is not drawn
    np.testing.assert_allclose(numbers(boxes.half_sizes), [[1, 1, 0.75]])
    voxels = log.entities["world/prediction/voxels"]
    centres, half = numbers(voxels.centers), numbers(voxels.half_sizes)
    count = 4 * 4 * 3 - 2 * 2 * 1  # what is hidden by others is left out
    np.testing.assert_allclose(np.prod(2 * half, axis=1).sum(), count * 0.5**3)
    assert len(centres) == 4 * 3 + 2, "a row of voxels is one box; the two in the middle are hollow"
    np.testing.assert_allclose([(centres - half).min(0), (centres + half).max(0)], [[10, -1, -0.5], [12, 1, 1]])


def test_rows_of_voxels_end_where_the_class_changes_or_nothing_is() -> None:
    label, state = np.full((8, 2, 1), CAR, np.uint8), np.full((8, 2, 1), OCCUPIED_STATE, np.uint8)
    label[5:, 0], state[2, 1] = CAR + 1, 1
    grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (8, 2, 1))
    first, last = voxel_rows(Occupancy(label, np.ones((8, 2, 1), np.float32), state, grid))
    spans = np.stack([first, last], 1)[:, :, :2].tolist()
    assert spans == [[[0, 0], [4, 0]], [[5, 0], [7, 0]], [[0, 1], [1, 1]], [[3, 1], [7, 1]]]
    nothing = Occupancy(label, np.ones((8, 2, 1), np.float32), np.ones((8, 2, 1), np.uint8), grid)
    assert [part.shape for part in voxel_rows(nothing)] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("camera", [PINHOLE, FISHEYE])
def test_boxes_and_voxels_lie_on_the_object_in_the_image(camera: Camera) -> None:
    log = Log("test", [camera.name])
    log.log(moment(camera))
    path = "world/cameras/" + camera.name.replace("/", "\\/")
    centre = camera.project([[11, 0, 0.25]])[0][0]
    for name, batch in (("boxes", "strips"), ("voxels", "positions")):
        pixels = numbers(getattr(log.entities[f"{path}/{name}"], batch)).reshape(-1, 2)
        assert np.abs(pixels.mean(0) - centre).max() < 5
        assert (pixels >= 0).all()
        assert (pixels <= (camera.width, camera.height)).all()
    log.close()


def test_what_a_later_moment_lacks_is_cleared(log: Log) -> None:
    log.log(moment())
    assert type(log.entities["world/cameras/front/image"]).__name__ == "EncodedImage"
    log.log(Moment(1_700_000_000_100_000_000))
    kinds = {path: type(entity).__name__ for path, entity in log.entities.items()}
    for path in ("world/cameras/front/image", "world/prediction/voxels", "world/lidar/top", "world/ground"):
        assert kinds[path] == "Clear", path


def test_truth_has_its_own_entities(log: Log) -> None:
    whole = moment()
    log.log(replace(whole, true_boxes=whole.boxes, true_occupancy=whole.occupancy, boxes=None, occupancy=None))
    assert "world/prediction/voxels" not in log.entities
    assert len(numbers(log.entities["world/truth/boxes"].centers)) == 2, "truth has no scores to be shown by"
    assert "world/cameras/front/truth" in log.entities


def test_latency_and_missing_cameras_become_plots(log: Log) -> None:
    log.log(moment())
    assert numbers(log.entities["plots/latency/total"].scalars) == [90.0]
    assert numbers(log.entities["plots/lost/missing_cameras"].scalars) == [1.0]


def test_images_larger_than_their_calibration_get_a_rig_of_their_size() -> None:
    jpeg = cv2.imencode(".jpg", np.zeros((360, 640, 3), np.uint8))[1].tobytes()
    (camera,) = fit_rig(CameraRig((PINHOLE,)), {"front": jpeg}).cameras
    assert (camera.width, camera.height) == (640, 360)
    np.testing.assert_allclose(camera.intrinsic[:2], 2 * PINHOLE.intrinsic[:2])


def test_a_saved_file_holds_the_documented_entities_on_one_time_line(tmp_path: Path) -> None:
    """Read back as the viewer reads it: docs/viewing.md names what it shows."""
    from rerun.chunk import RrdReader

    later, log = 1_700_000_000_100_000_000, MomentLog("test", ["front"])
    log.save(tmp_path / "run.rrd")
    log.log(moment())
    log.log(Moment(later))
    log.close()
    reader = RrdReader(str(tmp_path / "run.rrd"))
    assert [entry.application_id for entry in reader.blueprints()] == ["occbev"]
    chunks = [chunk for chunk in reader.stream() if not chunk.entity_path.startswith("/__")]
    fixed = {chunk.entity_path for chunk in chunks if chunk.is_static}
    assert fixed == {"/world", "/world/ego", "/world/ego/forward", "/world/grid"}
    camera, scene = "/world/cameras/front", "/world/prediction"
    moving = {chunk.entity_path for chunk in chunks if not chunk.is_static}
    assert moving == {
        *(camera + part for part in ("", "/image", "/boxes", "/voxels")),
        *(scene + part for part in ("/boxes", "/velocities", "/voxels")),
        *("/world/lidar/top", "/world/ground", "/plots/latency/total", "/plots/lost/missing_cameras", "/log"),
    }
    records = [chunk.to_record_batch() for chunk in chunks if not chunk.is_static]
    times = {stamp for record in records for stamp in record["time"].cast("int64").to_pylist()}
    assert times == {1_700_000_000_000_000_000, later}
    (pinhole,) = [chunk.to_record_batch() for chunk in chunks if chunk.entity_path == camera]
    np.testing.assert_allclose(pinhole["Transform3D:translation"].to_pylist()[0], [AHEAD[:3, 3]])
    assert (tmp_path / "run.rrd").stat().st_size > 1000


def test_box_lines_are_cut_at_the_borders_and_gone_behind() -> None:
    whole = box_lines(PINHOLE, [11, 0, 0.25, 2, 2, 1.5, 0])
    assert len(whole) == 12
    half = np.concatenate(box_lines(PINHOLE, [6, 5, 1, 4, 2, 1.5, 0]))
    assert 0 < len(half) < 24
    assert half[:, 0].min() == pytest.approx(0, abs=1e-9)
    assert box_lines(PINHOLE, [-11, 0, 0.25, 2, 2, 1.5, 0]) == []


def test_outer_voxels_are_those_with_an_open_side() -> None:
    solid = np.zeros((5, 5, 5), bool)
    solid[1:4, 1:4, 1:4] = True
    outer = {tuple(v) for v in outer_voxels(solid).tolist()}
    assert len(outer) == 26
    assert (2, 2, 2) not in outer
    assert len(outer_voxels(np.ones((3, 3, 3), bool))) == 26, "the border of the grid is open"
