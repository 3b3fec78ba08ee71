"""Moments as entities of Rerun: cameras with boxes and voxels, the 3D scene, latency and losses as plots.

Frames: `world` is base_link at the key time (x forward, y left, z up). Boxes and voxels are projected into the images
here, through each camera's own lens, since Rerun knows pinholes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from occbev.classes import (
    DETECTION_CLASSES,
    DETECTION_COLOURS,
    FREE,
    OCCUPANCY_CLASSES,
    OCCUPANCY_COLOURS,
    OCCUPANCY_OF_DETECTION,
    OCCUPIED_STATE,
)
from occbev.geometry import xyzw_from_rotation
from occbev.messages.image_headers import PNG_START
from occbev.reports.moments import GroundMap, Image, Moment
from occbev.reports.rendering import EGO_BOX, TRUTH, box_lines, outer_voxels, voxel_colours
from occbev.results import Boxes3D, Occupancy
from occbev.rig import Camera
from occbev.share import pip_install

APPLICATION = "occbev"

TIMELINE = "time"

VOXEL_DEPTH = 40.0
"""Metres from a camera up to which voxels are drawn over its image."""

SHOWN_SCORE = 0.3
"""Boxes below this score are not drawn."""

JPEG_QUALITY = 85

BLOCKED_COLOUR, FREE_COLOUR = (224, 49, 49, 150), (81, 207, 102, 90)

REQUIREMENT = "rerun-sdk>=0.41"
"""Distribution of the viewer."""


def import_rerun() -> Any:
    """Return the module; raises LookupError that says how to install it."""
    try:
        import rerun
    except ImportError as error:
        raise LookupError(f"the viewer is not installed here: {pip_install(REQUIREMENT)}") from error
    return rerun


class MomentLog:
    """A recording of Rerun that moments are logged to.

    cameras: names, for the layout; has_truth: whether a second 3D view shows the truth.
    """

    def __init__(self, title: str, cameras: Sequence[str], has_truth: bool = False) -> None:
        """Raises LookupError where Rerun is not installed."""
        self._rr = import_rerun()
        self._rr.set_strict_mode(True)  # else a value that it does not take is left out with a warning
        self.stream = self._rr.RecordingStream(APPLICATION)
        self.stream.send_recording_name(title)
        self._blueprint = layout(cameras, has_truth)
        self._seen: set[str] = set()

    def save(self, path: Path) -> None:
        """Write everything that is logged from here on to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stream.save(str(path), default_blueprint=self._blueprint)
        self._log_constants()

    def show(self) -> None:
        """Open the desktop viewer; raises OSError where there is no screen."""
        try:
            self.stream.spawn(default_blueprint=self._blueprint)
        except RuntimeError as error:
            raise OSError(f"the desktop viewer does not start ({error}): try --serve or --save FILE.rrd") from error
        self._log_constants()

    def serve(self, port: int) -> str:
        """Serve the viewer for a browser on a port and return its address; data come on the next port."""
        url = self.stream.serve_grpc(grpc_port=port + 1, default_blueprint=self._blueprint)
        self._rr.serve_web_viewer(web_port=port, open_browser=False, connect_to=url)
        self._log_constants()
        return f"http://localhost:{port}/?url={url}"

    def close(self) -> None:
        """Write what is still in memory."""
        self.stream.flush()
        self.stream.disconnect()

    def log(self, moment: Moment) -> None:
        """Log one key time; what it lacks is cleared, so that nothing old is shown beside it."""
        self.stream.set_time(TIMELINE, timestamp=np.datetime64(moment.stamp_ns, "ns"))
        found = dict(self._scene(moment))
        for name, image in moment.images.items():
            camera = moment.rig[name] if moment.rig is not None and name in moment.rig.names else None
            found |= self._camera(name, image, camera, moment)
        for path in self._seen - set(found):
            self.stream.log(path, self._rr.Clear(recursive=False))
        for path, entity in found.items():
            self.stream.log(path, entity)
        self._seen = set(found)
        self._plots(moment)

    def _log_constants(self) -> None:
        rr = self._rr
        names = [(label, OCCUPANCY_CLASSES[label], OCCUPANCY_COLOURS[label].tolist()) for label in range(FREE)]
        self.stream.log("world", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        self.stream.log("world", rr.AnnotationContext(names), static=True)
        box = EGO_BOX.box[0]
        ego = rr.Boxes3D(centers=[box[:3]], half_sizes=[box[3:6] / 2], colors=[(200, 200, 200)])
        self.stream.log("world/ego", ego, static=True)
        forward = rr.Arrows3D(origins=[(3.75, 0, 0.1)], vectors=[(3, 0, 0)], colors=[(220, 60, 60)])
        self.stream.log("world/ego/forward", forward, static=True)
        lines = [[(d, -50, 0), (d, 50, 0)] for d in range(-50, 51, 10)]
        lines += [[(-50, d, 0), (50, d, 0)] for d in range(-50, 51, 10)]
        grid = rr.LineStrips3D(lines, colors=[(110, 115, 125, 90)], radii=rr.Radius.ui_points(0.5))
        self.stream.log("world/grid", grid, static=True)

    def _scene(self, moment: Moment) -> Iterable[tuple[str, Any]]:
        rr = self._rr
        for name, occupancy, boxes in (
            ("prediction", moment.occupancy, _sure(moment.boxes)),
            ("truth", moment.true_occupancy, moment.true_boxes),
        ):
            if occupancy is not None:
                yield f"world/{name}/voxels", self._voxels(occupancy)
            if boxes is not None:
                yield f"world/{name}/boxes", self._boxes(boxes, name == "prediction")
                yield f"world/{name}/velocities", self._velocities(boxes)
        for name, points in moment.clouds.items():
            yield f"world/lidar/{name}", rr.Points3D(points, colors=[(215, 215, 225)], radii=rr.Radius.ui_points(1.0))
        if moment.ground is not None:
            yield "world/ground", self._ground(moment.ground)

    def _voxels(self, occupancy: Occupancy) -> Any:
        """Rows of like voxels as one box each: the viewer draws no more than 60,000 boxes."""
        first, last = voxel_rows(occupancy)
        begin, end = (occupancy.grid.centres(index) for index in (first, last))
        return self._rr.Boxes3D(
            centers=((begin + end) / 2).astype(np.float32),
            half_sizes=((end - begin + occupancy.grid.pitch) / 2).astype(np.float32),
            colors=voxel_colours(occupancy, first),
            class_ids=occupancy.label[tuple(first.T)] if occupancy.has_classes else None,
            fill_mode="solid",
            show_labels=False,
        )

    def _boxes(self, boxes: Boxes3D, scored: bool) -> Any:
        yaw = boxes.box[:, 6].astype(np.float64)
        turns = np.stack([np.zeros_like(yaw), np.zeros_like(yaw), np.sin(yaw / 2), np.cos(yaw / 2)], -1)
        names = [DETECTION_CLASSES[label].replace("_", " ") for label in boxes.label]
        labels = [f"{n} {s:.2f}" for n, s in zip(names, boxes.score, strict=True)] if scored else names
        return self._rr.Boxes3D(
            centers=boxes.box[:, :3],
            half_sizes=boxes.box[:, 3:6] / 2,
            quaternions=turns,
            colors=DETECTION_COLOURS[boxes.label],
            class_ids=np.array(OCCUPANCY_OF_DETECTION)[boxes.label],
            labels=labels,
            radii=self._rr.Radius.ui_points(1.5),
            show_labels=False,
        )

    def _velocities(self, boxes: Boxes3D) -> Any:
        """Arrows as long as a second of motion."""
        moves = np.nan_to_num(boxes.box[:, 7:9])
        chosen = np.hypot(*moves.T) > 0.5
        roofs = boxes.box[chosen, :3] + np.array([0, 0, 0.5]) * boxes.box[chosen, 5:6]
        ahead = np.pad(moves[chosen], ((0, 0), (0, 1)))
        return self._rr.Arrows3D(origins=roofs, vectors=ahead, colors=DETECTION_COLOURS[boxes.label[chosen]])

    def _ground(self, ground: GroundMap) -> Any:
        """The ground grid as a picture on the ground: red blocked, green free."""
        colours = np.zeros((*ground.cells.shape, 4), np.uint8)
        colours[ground.cells == 0], colours[ground.cells > 0] = FREE_COLOUR, BLOCKED_COLOUR
        (x0, y0), (x1, y1) = ground.bev.lo, ground.bev.hi
        return self._rr.Mesh3D(
            vertex_positions=[(x0, y0, 0.02), (x1, y0, 0.02), (x1, y1, 0.02), (x0, y1, 0.02)],
            vertex_texcoords=[(0, 0), (1, 0), (1, 1), (0, 1)],
            triangle_indices=[(0, 1, 2), (0, 2, 3)],
            albedo_texture=colours,
        )

    def _camera(self, name: str, image: Image | bytes, camera: Camera | None, moment: Moment) -> dict[str, Any]:
        rr, path, data = self._rr, camera_path(name), _encode(image)
        found = {f"{path}/image": rr.EncodedImage(contents=data, media_type=_media_type(data))}
        if camera is None:
            return found
        if not camera.lens.is_fisheye:
            resolution = [camera.width, camera.height]
            pinhole = rr.Pinhole(
                image_from_camera=camera.intrinsic,
                resolution=resolution,
                image_plane_distance=1.5,
                color=(90, 140, 220),
            )
            turn = rr.Quaternion(xyzw=xyzw_from_rotation(camera.cam2ego[:3, :3]))
            self.stream.log(path, pinhole, rr.Transform3D(translation=camera.cam2ego[:3, 3], quaternion=turn))
        shown = {
            "boxes": (_sure(moment.boxes), None),
            "truth": (moment.true_boxes, TRUTH),
        }
        for key, (boxes, colour) in shown.items():
            if boxes is not None:
                found[f"{path}/{key}"] = self._image_boxes(camera, boxes, colour)
        if moment.occupancy is not None:
            found[f"{path}/voxels"] = self._image_voxels(camera, moment.occupancy)
        return found

    def _image_boxes(self, camera: Camera, boxes: Boxes3D, colour: tuple[int, int, int] | None) -> Any:
        pieces: list[NDArray[np.float64]] = []
        colours: list[Any] = []
        for box, label in zip(boxes.box, boxes.label, strict=True):
            lines = box_lines(camera, box)
            pieces += lines
            colours += [DETECTION_COLOURS[label] if colour is None else colour] * len(lines)
        width = self._rr.Radius.ui_points(1.0)
        return self._rr.LineStrips2D(pieces, colors=colours, radii=width, draw_order=30)

    def _image_voxels(self, camera: Camera, occupancy: Occupancy) -> Any:
        """Dots in class colours, far ones first, as large as the voxels appear."""
        index = outer_voxels(occupancy.state == OCCUPIED_STATE)
        pixels, depth, inside = camera.project(occupancy.grid.centres(index))
        inside &= depth < VOXEL_DEPTH
        order = np.flatnonzero(inside)[np.argsort(-depth[inside])]
        size = 0.4 * camera.intrinsic[0, 0] * occupancy.grid.pitch[0] / np.maximum(depth[order], 1.0)
        colours = np.pad(voxel_colours(occupancy, index[order]), ((0, 0), (0, 1)), constant_values=140)
        return self._rr.Points2D(
            pixels[order].astype(np.float32), colors=colours, radii=size.astype(np.float32), draw_order=20
        )

    def _plots(self, moment: Moment) -> None:
        values = {f"plots/latency/{stage}": value for stage, value in moment.latency_ms.items()}
        values |= {f"plots/lost/{reason}": float(count) for reason, count in moment.dropped.items()}
        values["plots/lost/missing_cameras"] = float(len(moment.missing))
        for path, value in values.items():
            self.stream.log(path, self._rr.Scalars(value))
        for name, reason in moment.missing.items():
            self.stream.log("log", self._rr.TextLog(f"camera {name} is missing: {reason}", level="WARN"))


def layout(cameras: Sequence[str], has_truth: bool) -> Any:
    """Return the blueprint: cameras to the left, the 3D scene to the right (prediction above truth), plots below."""
    rrb = import_rerun().blueprint
    images = [
        rrb.Spatial2DView(
            name=name,
            origin=camera_path(name),
            contents=["$origin/**"],
            overrides={f"{camera_path(name)}/voxels": rrb.EntityBehavior(visible=False)},
        )
        for name in cameras
    ]
    eye = rrb.EyeControls3D(position=(-38.0, -10.0, 27.0), look_target=(6.0, 0.0, 0.0), eye_up=(0.0, 0.0, 1.0))
    shared = ["/world/ego/**", "/world/grid", "/world/lidar/**", "/world/ground"]
    frustums = [f"/{camera_path(name)}" for name in cameras]
    spaces = [
        rrb.Spatial3DView(
            name=name,
            origin="/world",
            contents=[*shared, *frustums, f"/world/{name.lower()}/**"],
            eye_controls=eye,
            line_grid=False,
            overrides={"/world/ground": rrb.EntityBehavior(visible=False)},
        )
        for name in (("Prediction", "Truth") if has_truth else ("Prediction",))
    ]
    plots = [
        rrb.TimeSeriesView(name="latency (ms)", origin="/plots/latency"),
        rrb.TimeSeriesView(name="lost key times, missing cameras", origin="/plots/lost"),
        rrb.TextLogView(name="log", origin="/log"),
    ]
    scene = rrb.Vertical(*spaces)
    if images:
        columns = 1 if len(images) < 3 else 2
        scene = rrb.Horizontal(rrb.Grid(*images, grid_columns=columns), scene, column_shares=[2, 3])
    return rrb.Blueprint(rrb.Vertical(scene, rrb.Horizontal(*plots), row_shares=[4, 1]), collapse_panels=True)


def voxel_rows(occupancy: Occupancy) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and the last voxels (R, 3) of the rows along x in which outer occupied voxels have one class."""
    index = outer_voxels(occupancy.state == OCCUPIED_STATE)
    index = index[np.lexsort((index[:, 0], index[:, 2], index[:, 1]))]
    label = occupancy.label[tuple(index.T)] if occupancy.has_classes else np.zeros(len(index), np.uint8)
    goes_on = (np.diff(index, axis=0) == (1, 0, 0)).all(1) & (label[1:] == label[:-1])
    breaks = np.flatnonzero(~goes_on)
    return index[np.r_[0, breaks + 1][: len(index)]], index[np.r_[breaks, len(index) - 1][: len(index)]]


def camera_path(name: str) -> str:
    """Return the entity path of a camera, whatever its name holds."""
    return f"world/cameras/{import_rerun().escape_entity_path_part(name)}"


def _sure(boxes: Boxes3D | None) -> Boxes3D | None:
    return None if boxes is None else boxes[boxes.score >= SHOWN_SCORE]


def _media_type(data: bytes) -> str:
    return "image/png" if data.startswith(PNG_START) else "image/jpeg"


def _encode(image: Image | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise ValueError(f"a picture of shape {image.shape} cannot be encoded as JPEG")
    return data.tobytes()
