"""Pictures of what goes in and comes out, as (H, W, 3) uint8 RGB arrays: README, report, overlay and tests.

Drawing functions return a new picture, so that they chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from occbev.classes import (
    DETECTION_CLASSES,
    DETECTION_COLOURS,
    OCCUPANCY_CLASSES,
    OCCUPANCY_COLOURS,
    OCCUPIED_STATE,
    UNOBSERVED_STATE,
    height_colours,
)
from occbev.geometry import box_corners, make_transform, project_points, transform_points
from occbev.results import Boxes3D, Occupancy
from occbev.rig import Camera

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

PAPER: Colour = (250, 250, 248)
INK: Colour = (45, 48, 54)
FAINT: Colour = (205, 207, 210)
UNSEEN: Colour = (228, 229, 232)
TRUTH: Colour = (20, 160, 70)
ON_DARK: Colour = (255, 255, 255)

EGO_BOX = Boxes3D(
    np.array([[1.45, 0, 0.85, 4.6, 1.9, 1.7, 0, 0, 0]], np.float32),
    np.zeros(1, np.int64),
    np.ones(1, np.float32),
)
"""A car that stands for the vehicle itself."""

BOX_EDGES = (
    (0, 1),
    (1, 2),
    (2, 3),
    (3, 0),
    (4, 5),
    (5, 6),
    (6, 7),
    (7, 4),
    (0, 4),
    (1, 5),
    (2, 6),
    (3, 7),
)
FRONT_FACE = (0, 1, 2, 3)
NEAR = 0.3
"""Metres; edges are cut where they come nearer to the camera than this."""

CURVE_PIECES = 16
"""Straight pieces by which an edge is drawn through a lens that bends it."""


@dataclass(frozen=True)
class BoxStyle:
    """How boxes are drawn: in their class colours unless `colour` is given; `dashed` for ground truth."""

    colour: Colour | None = None
    dashed: bool = False
    thickness: int = 2
    labels: bool = False


PREDICTED = BoxStyle()
GROUND_TRUTH = BoxStyle(ON_DARK, dashed=True, thickness=1)


@dataclass(frozen=True)
class View:
    """A pinhole that looks from `eye` to `target`, both in ego; focal in units of the picture's width."""

    eye: tuple[float, float, float] = (-46.0, -14.0, 34.0)
    target: tuple[float, float, float] = (2.0, 0.0, 0.0)
    focal: float = 0.95

    def camera(self, width: int, height: int) -> Camera:
        """Return the camera of this view."""
        forward = np.subtract(self.target, self.eye) / np.linalg.norm(np.subtract(self.target, self.eye))
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        axes = np.stack([right, np.cross(forward, right), forward], 1)
        intrinsic = [
            [self.focal * width, 0, width / 2],
            [0, self.focal * width, height / 2],
            [0, 0, 1],
        ]
        return Camera("view", width, height, np.array(intrinsic), make_transform(axes, self.eye))


def draw_boxes(image: Picture, camera: Camera, boxes: Boxes3D, style: BoxStyle = PREDICTED) -> Picture:
    """Project boxes of base_link into an image, the face that looks forward tinted.

    camera: at the image's size; its cam2ego belongs to the ego frame of the boxes.
    """
    image = image.copy()
    corners = transform_points(camera.ego2cam, box_corners(boxes.box[:, :7]))
    far_first = np.argsort(-corners[..., 2].mean(1))
    for index in far_first:
        if camera.lens.is_fisheye or corners[index, :, 2].max() > NEAR:
            _draw_box(image, camera, corners[index], _box_colour(boxes, index, style), style)
            if style.labels:
                _label_box(image, camera, corners[index], boxes, index)
    return image


def box_lines(camera: Camera, box: ArrayLike) -> list[NDArray[np.float64]]:
    """Return the straight pieces, pixels (2, 2), by which the edges of a box (7,) of base_link show inside the image."""
    corners = transform_points(camera.ego2cam, box_corners(np.asarray(box, np.float64)[None, :7])[0])
    if not camera.lens.is_fisheye and corners[:, 2].max() <= NEAR:
        return []
    pieces = [piece for a, b in BOX_EDGES for piece in _image_segments(camera, corners[a], corners[b])]
    clipped = [_clip(piece, camera.width, camera.height) for piece in pieces]
    return [piece for piece in clipped if piece is not None]


def draw_points(
    image: Picture, camera: Camera, points: ArrayLike, limits: tuple[float, float] = (2.0, 50.0), radius: int = 2
) -> Picture:
    """Draw (M, 3) points of base_link over an image, coloured by depth on a logarithmic scale, near on top."""
    image = image.copy()
    pixels, depth, inside = camera.project(points)
    pixels, depth = pixels[inside], depth[inside]
    colours = depth_colours(depth, limits)
    for index in np.argsort(-depth):
        cv2.circle(
            image,
            _fix_view(pixels[index]),
            radius << SHIFT,
            colours[index].tolist(),
            -1,
            cv2.LINE_AA,
            SHIFT,
        )
    return image


def draw_voxels(
    image: Picture,
    camera: Camera,
    occupancy: Occupancy,
    opacity: float = 0.6,
    max_depth: float = 40.0,
) -> Picture:
    """Draw occupied voxels over an image in their class colours, far to near."""
    index = np.argwhere(occupancy.state == OCCUPIED_STATE)
    pixels, depth, inside = camera.project(occupancy.grid.centres(index))
    inside &= depth < max_depth
    index, pixels, depth = index[inside], pixels[inside], depth[inside]
    size = camera.intrinsic[0, 0] * occupancy.grid.pitch[0] / np.maximum(depth, 1.0)
    layer, colours = image.copy(), voxel_colours(occupancy, index)
    for i in np.argsort(-depth):
        low, high = pixels[i] - 0.42 * size[i], pixels[i] + 0.42 * size[i]
        colour = colours[i].tolist()
        cv2.rectangle(layer, _pixel(low), _pixel(high), colour, -1)
    return np.asarray(cv2.addWeighted(layer, opacity, image, 1 - opacity, 0), np.uint8)


def voxel_colours(occupancy: Occupancy, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return RGB (M, 3) of voxels (M, 3): of their class, or of their height where there are no classes."""
    if not occupancy.has_classes:
        return height_colours(occupancy.grid.shape[2])[index[:, 2]]
    return OCCUPANCY_COLOURS[occupancy.label[tuple(index.T)]]


def outer_voxels(shown: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the voxels (M, 3) of a volume (X, Y, Z) that have a side where the neighbour is not `shown`."""
    padded = np.pad(shown, 1)
    inner = padded[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(shown & ~inner)


def camera_mosaic(images: Mapping[str, Picture], width: int = 1600, columns: int = 3) -> Picture:
    """Lay images out in rows, in their order, each with its name; all get the size of the first.

    images: name -> picture, or of a camera that is missing a picture of any size.
    """
    tile_width = width // columns
    tiles = []
    for name, image in images.items():
        height = round(tile_width * image.shape[0] / image.shape[1])
        scaled = np.asarray(cv2.resize(image, (tile_width, height), interpolation=cv2.INTER_AREA), np.uint8)
        tiles.append(_add_caption(scaled, name))
    tallest = max(tile.shape[0] for tile in tiles)
    tiles = [_pad(tile, tile_width, tallest) for tile in tiles]
    tiles += [np.full_like(tiles[0], PAPER)] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def bev_picture(
    boxes: Boxes3D,
    truth: Boxes3D | None = None,
    occupancy: Occupancy | None = None,
    size: int = 800,
    reach: float = 52.0,
) -> Picture:
    """Draw boxes, headings and velocities from above, x up and y left; truth is dashed.

    occupancy: drawn faintly below. size: pixels of a side. reach: metres from the middle to the border.
    """
    picture = np.full((size, size, 3), PAPER, np.uint8)
    if occupancy is not None:
        _paste_plane(picture, occupancy, reach, 0.45)
    _draw_rings(picture, reach)
    _draw_ego(picture, reach)
    for layer, style in ((truth, BoxStyle(TRUTH, dashed=True)), (boxes, PREDICTED)):
        for index in range(len(layer) if layer is not None else 0):
            assert layer is not None
            _draw_box_above(picture, layer.box[index], reach, _box_colour(layer, index, style), style)
    return picture


def occupancy_from_above(occupancy: Occupancy, size: int = 800) -> Picture:
    """Draw the topmost occupied class of each column, x up and y left: brighter is higher, grey was not seen."""
    colours = _plane_colours(occupancy)
    square = np.asarray(cv2.resize(colours, (size, size), interpolation=cv2.INTER_NEAREST), np.uint8)
    reach = -occupancy.grid.lo[0]
    _draw_ego(square, reach)
    return square


def occupancy_in_3d(
    occupancy: Occupancy, width: int = 960, height: int = 600, view: View | None = None, boxes: Boxes3D | None = None
) -> Picture:
    """Draw occupied voxels in perspective, lit from the upper left, with boxes as wires over them."""
    view = view or View()
    camera = view.camera(2 * width, 2 * height)  # drawn at twice the size: area averaging smooths every edge
    canvas = np.full((2 * height, 2 * width, 3), PAPER, np.uint8)
    for corners, colour in zip(*_visible_faces(occupancy, camera, np.array(view.eye)), strict=True):
        cv2.fillConvexPoly(canvas, corners, colour)
    canvas = draw_boxes(canvas, camera, EGO_BOX, BoxStyle(INK, thickness=4))
    if boxes is not None:
        canvas = draw_boxes(canvas, camera, boxes, BoxStyle(thickness=3))
    return np.asarray(cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def legend(labels: Iterable[int], width: int) -> Picture:
    """Draw one row (or more) of colour patches with the names of occupancy classes."""
    canvas, x, y, line = np.full((400, width, 3), PAPER, np.uint8), 10, 8, 24
    for label in labels:
        name = OCCUPANCY_CLASSES[label].replace("_", " ")
        advance = 34 + _text_width(name, 0.45)
        if x + advance > width:
            x, y = 10, y + line
        cv2.rectangle(canvas, (x, y), (x + 14, y + 14), OCCUPANCY_COLOURS[label].tolist(), -1)
        _text(canvas, name, (x + 20, y + 12), 0.45, INK)
        x += advance
    return canvas[: y + line]


def beside(pictures: Mapping[str, Picture], gap: int = 12) -> Picture:
    """Put pictures side by side at the height of the first, each below its title."""
    height, columns = next(iter(pictures.values())).shape[0], []
    for title, picture in pictures.items():
        width = round(picture.shape[1] * height / picture.shape[0])
        scaled = (
            picture
            if picture.shape[0] == height
            else cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        )
        head = np.full((34, scaled.shape[1], 3), PAPER, np.uint8)
        _text(head, title, (6, 23), 0.6, INK)
        columns += [np.vstack([head, scaled]), np.full((height + 34, gap, 3), PAPER, np.uint8)]
    return np.hstack(columns[:-1])


def stack_pictures(pictures: Sequence[Picture], gap: int = 12) -> Picture:
    """Put pictures below each other on paper as wide as the widest."""
    width = max(picture.shape[1] for picture in pictures)
    rows = [_pad(picture, width, picture.shape[0] + gap) for picture in pictures]
    return np.vstack(rows)


def depth_colours(depth: ArrayLike, limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Return RGB (M, 3) of depths, near red to far blue, logarithmic between the limits."""
    near, far = np.log(limits[0]), np.log(limits[1])
    share = np.clip((np.log(np.maximum(depth, 1e-3)) - near) / (far - near), 0, 1)
    scale = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)
    return np.asarray(scale, np.uint8)[np.round(255 * (1 - share)).astype(np.uint8), 0, ::-1]


def write_picture(path: str, picture: Picture) -> None:
    """Write PNG or JPEG by the name's ending; raises OSError if it cannot."""
    if not cv2.imwrite(path, np.ascontiguousarray(picture[..., ::-1])):
        raise OSError(f"{path}: cannot write a {picture.shape} picture")


SHIFT = 3
"""Fractional bits of drawing coordinates."""


def write_moving_picture(path: str, pictures: Sequence[Picture], rate: float, width: int, quality: int = 28) -> None:
    """Write pictures of one size as an animation that repeats: .webp, .gif or .avif.

    rate: pictures per second. width: in pixels, to which they are scaled. quality: of WebP, 1 to 100.
    Raises:
        ValueError: no picture, or another ending. OSError: it cannot be written.
    """
    if not pictures or not path.endswith((".webp", ".gif", ".avif")):
        raise ValueError(f"{path}: {len(pictures)} pictures; want at least one, and a .webp, .gif or .avif")
    if not hasattr(cv2, "imwriteanimation"):
        raise ValueError(f"{path}: OpenCV {cv2.__version__} writes no animations; 4.12 and later do")
    animation = cv2.Animation()
    size = width, round(pictures[0].shape[0] * width / pictures[0].shape[1])
    animation.frames = [cv2.resize(p[..., ::-1], size, interpolation=cv2.INTER_AREA) for p in pictures]
    animation.durations = [round(1000 / rate)] * len(pictures)
    animation.loop_count = 0
    options = [cv2.IMWRITE_WEBP_QUALITY, quality] if path.endswith(".webp") else []
    if not cv2.imwriteanimation(path, animation, options):
        raise OSError(f"{path}: cannot be written")


def _fix_view(pixel: ArrayLike) -> tuple[int, int]:
    """Pixel coordinates for cv2: centres at integers, SHIFT fractional bits, clipped far outside any picture."""
    u, v = np.round((np.clip(pixel, -4000, 12000) - 0.5) * (1 << SHIFT)).astype(int).tolist()
    return u, v


def _pixel(pixel: ArrayLike) -> tuple[int, int]:
    u, v = np.floor(np.clip(pixel, -4000, 12000)).astype(int).tolist()
    return u, v


def _line(image: Picture, start: ArrayLike, end: ArrayLike, colour: Colour, style: BoxStyle) -> None:
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    if not style.dashed:
        cv2.line(image, _fix_view(start), _fix_view(end), colour, style.thickness, cv2.LINE_AA, SHIFT)
        return
    length = float(np.hypot(*(end - start)))
    dashes = min(200, max(1, int(length / (6 + 3 * style.thickness))))
    for index in range(dashes):
        first, last = (start + (end - start) * (index + share) / dashes for share in (0.0, 0.55))
        cv2.line(image, _fix_view(first), _fix_view(last), colour, style.thickness, cv2.LINE_AA, SHIFT)


def _box_colour(boxes: Boxes3D, index: int, style: BoxStyle) -> Colour:
    r, g, b = style.colour or DETECTION_COLOURS[boxes.label[index]].tolist()
    return r, g, b


def _draw_box(image: Picture, camera: Camera, corners: NDArray[np.float64], colour: Colour, style: BoxStyle) -> None:
    """Draw the edges of one box given by its (8, 3) corners in the camera frame."""
    if corners[:, 2].min() > NEAR and not style.dashed and camera.lens.is_pinhole:
        face = project_points(corners[list(FRONT_FACE)], camera.intrinsic)[0]
        tinted = image.copy()
        cv2.fillConvexPoly(tinted, np.array([_fix_view(p) for p in face]), colour, cv2.LINE_AA, SHIFT)
        cv2.addWeighted(tinted, 0.3, image, 0.7, 0, dst=image)
    for a, b in BOX_EDGES:
        for start, end in _image_segments(camera, corners[a], corners[b]):
            _line(image, start, end, colour, style)


def _image_segments(camera: Camera, a: NDArray[np.float64], b: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield the straight pieces, pixels (2, 2), by which a segment of the camera frame shows in its image."""
    if camera.lens.is_pinhole:
        segment = _cut_near(a, b)
        if segment is not None:
            yield project_points(segment, camera.intrinsic)[0]
        return
    pixels, seen = camera.lens.project(a + np.linspace(0, 1, CURVE_PIECES + 1)[:, None] * (b - a))
    for i in np.flatnonzero(seen[:-1] & seen[1:]):
        yield pixels[i : i + 2]


def _clip(piece: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64] | None:
    """Cut a piece at the borders of the image; None where it lies outside (Liang and Barsky, 1984)."""
    start, along, first, last = piece[0], piece[1] - piece[0], 0.0, 1.0
    for axis, size in enumerate((width, height)):
        for step, room in ((-along[axis], start[axis]), (along[axis], size - start[axis])):
            if step == 0 and room < 0:
                return None
            if step < 0:
                first = max(first, room / step)
            elif step > 0:
                last = min(last, room / step)
    return np.stack([start + first * along, start + last * along]) if first <= last else None


def _cut_near(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return the part of a segment in front of the near plane, or None."""
    if max(a[2], b[2]) <= NEAR:
        return None
    ends = []
    for point, other in ((a, b), (b, a)):
        share = 0.0 if point[2] >= NEAR else (NEAR - point[2]) / (other[2] - point[2])
        ends.append(point + share * (other - point))
    return np.stack(ends)


def _label_box(image: Picture, camera: Camera, corners: NDArray[np.float64], boxes: Boxes3D, index: int) -> None:
    pixels, seen = camera.lens.project(corners)
    if not seen.all() or (corners[:, 2].min() <= NEAR and not camera.lens.is_fisheye):
        return
    u, v = pixels.min(0)
    if 0 <= u < image.shape[1] and 0 <= v < image.shape[0]:
        text = f"{DETECTION_CLASSES[boxes.label[index]]} {boxes.score[index]:.2f}"
        _text(image, text, (int(u), int(v) - 3), 0.4, ON_DARK)


def _add_caption(image: Picture, name: str) -> Picture:
    image = image.copy()
    cv2.rectangle(image, (0, 0), (_text_width(name, 0.5) + 14, 22), (20, 20, 24), -1)
    _text(image, name, (7, 16), 0.5, ON_DARK)
    return image


def _pad(picture: Picture, width: int, height: int) -> Picture:
    out = np.full((height, width, 3), PAPER, np.uint8)
    out[: picture.shape[0], : picture.shape[1]] = picture
    return out


def _text(image: Picture, text: str, place: tuple[int, int], scale: float, colour: Colour) -> None:
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)


def _text_width(text: str, scale: float) -> int:
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0])


def _above(points: ArrayLike, size: int, reach: float) -> NDArray[np.float64]:
    """Map (M, 2) metres x forward, y left to pixels of a square picture, x up and y left."""
    xy = np.asarray(points, np.float64)
    return np.stack([(reach - xy[..., 1]), (reach - xy[..., 0])], -1) * (size / (2 * reach))


def _draw_rings(picture: Picture, reach: float) -> None:
    size = len(picture)
    centre = _fix_view(_above([0, 0], size, reach))
    for metres in range(10, int(reach * 1.4), 10):
        cv2.circle(
            picture,
            centre,
            round(metres * size / (2 * reach) * (1 << SHIFT)),
            FAINT,
            1,
            cv2.LINE_AA,
            SHIFT,
        )
        if metres < reach and metres % 20 == 0:
            u, v = _pixel(_above([metres, 0], size, reach))
            _text(picture, f"{metres} m", (u + 4, v - 3), 0.38, (150, 152, 156))


def _draw_ego(picture: Picture, reach: float) -> None:
    outline = _above([[3.9, 0.0], [3.2, 0.95], [-1.0, 0.95], [-1.0, -0.95], [3.2, -0.95]], len(picture), reach)
    corners = np.array([_fix_view(point) for point in outline])
    cv2.fillConvexPoly(picture, corners, INK, cv2.LINE_AA, SHIFT)


def _draw_box_above(picture: Picture, box: NDArray[np.float32], reach: float, colour: Colour, style: BoxStyle) -> None:
    corners = box_corners(box[None, :7])[0, [0, 1, 5, 4], :2]
    outline = _above(corners, len(picture), reach)
    if not style.dashed:
        tinted = picture.copy()
        cv2.fillConvexPoly(tinted, np.array([_fix_view(p) for p in outline]), colour, cv2.LINE_AA, SHIFT)
        cv2.addWeighted(tinted, 0.35, picture, 0.65, 0, dst=picture)
    for index in range(4):
        _line(picture, outline[index], outline[(index + 1) % 4], colour, style)
    front = outline[:2].mean(0)
    _line(picture, outline.mean(0), front, colour, style)
    if np.isfinite(box[7:9]).all() and np.hypot(*box[7:9]) > 0.5:
        tip = _above(corners[:2].mean(0) + box[7:9], len(picture), reach)  # where it is a second from now
        cv2.arrowedLine(picture, _pixel(front), _pixel(tip), colour, 1, cv2.LINE_AA, tipLength=0.2)


def _plane_colours(occupancy: Occupancy) -> Picture:
    """RGB (X, Y, 3) of columns seen from above, row 0 the farthest ahead, column 0 the leftmost."""
    occupied = occupancy.state == OCCUPIED_STATE
    heights = occupancy.grid.shape[2]
    top = heights - 1 - np.argmax(occupied[..., ::-1], axis=2)  # (X, Y)
    places = np.concatenate([np.indices(top.shape).reshape(2, -1), top.reshape(1, -1)]).T
    shade = 0.8 + 0.2 * (top + 1) / heights
    colours = voxel_colours(occupancy, places).reshape(*top.shape, 3) * shade[..., None]
    empty = ~occupied.any(2)
    seen = (occupancy.state != UNOBSERVED_STATE).any(2)
    colours[empty & seen] = PAPER
    colours[empty & ~seen] = UNSEEN
    return np.ascontiguousarray(colours[::-1, ::-1]).astype(np.uint8)


def _paste_plane(picture: Picture, occupancy: Occupancy, reach: float, opacity: float) -> None:
    size, grid = len(picture), occupancy.grid
    (left, top), (right, bottom) = (_pixel(_above(corner, size, reach)) for corner in (grid.hi[:2], grid.lo[:2]))
    plane = cv2.resize(_plane_colours(occupancy), (right - left, bottom - top), interpolation=cv2.INTER_NEAREST)
    rows, columns = slice(max(0, top), min(size, bottom)), slice(max(0, left), min(size, right))
    part = plane[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    picture[rows, columns] = cv2.addWeighted(part, opacity, picture[rows, columns], 1 - opacity, 0)


FACES: tuple[tuple[tuple[int, int, int], tuple[tuple[int, int, int], ...], float], ...] = (
    ((0, 0, 1), ((0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)), 1.0),
    ((1, 0, 0), ((1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)), 0.72),
    ((-1, 0, 0), ((0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1)), 0.84),
    ((0, 1, 0), ((0, 1, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1)), 0.9),
    ((0, -1, 0), ((0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1)), 0.64),
)
"""Faces of a voxel that a viewer above ground can see: normal, corners in voxels, light."""


def _visible_faces(
    occupancy: Occupancy, camera: Camera, eye: NDArray[np.float64]
) -> tuple[list[NDArray[np.int32]], list[list[int]]]:
    """Return the uncovered faces that look to the eye as pixel quads with colours, far to near."""
    grid, occupied = occupancy.grid, np.pad(occupancy.state == OCCUPIED_STATE, 1)
    inner = occupied[1:-1, 1:-1, 1:-1]
    quads, colours, distances = [], [], []
    for normal, offsets, light in FACES:
        neighbour = np.roll(occupied, [-n for n in normal], (0, 1, 2))[1:-1, 1:-1, 1:-1]
        index = np.argwhere(inner & ~neighbour)
        middle = grid.centres(index) + 0.5 * np.array(normal) * grid.pitch
        index = index[((eye - middle) @ normal) > 0]
        corners = np.asarray(grid.lo) + (index[:, None] + np.array(offsets)) * grid.pitch  # (F, 4, 3)
        points = transform_points(camera.ego2cam, corners)
        front = points[..., 2].min(1) > 1.0
        quads.append(project_points(points[front], camera.intrinsic)[0])
        distances.append(np.linalg.norm(grid.centres(index[front]) - eye, axis=1) + 0.01 * (1 - light))
        colours.append(_lit(occupancy, index[front], light, distances[-1]))
    order = np.argsort(-np.concatenate(distances))
    pixels = np.round(np.concatenate(quads)[order]).clip(-4000, 12000).astype(np.int32)
    return list(pixels), np.concatenate(colours)[order].tolist()


def _lit(
    occupancy: Occupancy, index: NDArray[np.int64], light: float, distance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Colour faces: darker near the ground, a little uneven so that single voxels show, paler far away."""
    base = voxel_colours(occupancy, index).astype(np.float64)
    height = (index[:, 2] + 1) / occupancy.grid.shape[2]
    checker = 0.97 + 0.03 * (index.sum(1) % 2)
    shaded = base * (light * (0.8 + 0.2 * np.sqrt(height)) * checker)[:, None]
    haze = np.clip((distance - 40) / 90, 0, 0.45)[:, None]
    return shaded * (1 - haze) + np.array(PAPER) * haze
