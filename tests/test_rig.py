"""Cameras and rigs: projection, resizing, files and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from occbev.geometry import make_transform, rotation_from_yaw
from occbev.rig import Camera, CameraRig, RigError

OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
"""Rotation of an optical frame that looks along +x of the vehicle."""


def camera(name: str = "CAM_FRONT", yaw: float = 0.0) -> Camera:
    intrinsic = np.array([[1260.0, 0, 800], [0, 1260, 450], [0, 0, 1]])
    return Camera(name, 1600, 900, intrinsic, make_transform(rotation_from_yaw(yaw) @ OPTICAL, [1.5, 0, 1.6]))


def test_a_point_ahead_lands_in_the_front_camera_only() -> None:
    ahead = [[21.5, 1.0, 1.6]]  # 20 m before the camera, 1 m to the left
    pixels, depth, inside = camera().project(ahead)
    assert inside.all()
    assert depth[0] == pytest.approx(20.0)
    np.testing.assert_allclose(pixels[0], [800 - 1260 / 20, 450])
    assert not camera("CAM_BACK", np.pi).project(ahead)[2].any()


def test_resizing_moves_pixels_with_the_image() -> None:
    points = np.random.default_rng(0).uniform([5, -5, 0], [50, 5, 3], (100, 3))
    small = camera().resize(0.22, 0.22, (0, 70), (352, 128))
    expected = camera().project(points)[0] * 0.22 - [0, 70]
    np.testing.assert_allclose(small.project(points)[0], expected, atol=1e-9)
    assert (small.width, small.height) == (352, 128)


def test_a_rig_survives_its_file(tmp_path: Path) -> None:
    rig = CameraRig((camera(), camera("CAM_BACK", np.pi)))
    rig.save(tmp_path / "rig.yaml")
    again = CameraRig.load(tmp_path / "rig.yaml")
    assert again.names == rig.names
    for name in rig.names:
        np.testing.assert_allclose(again[name].cam2ego, rig[name].cam2ego, atol=1e-12)
        np.testing.assert_array_equal(again[name].intrinsic, rig[name].intrinsic)


def test_the_hash_follows_every_calibration_value() -> None:
    rig = CameraRig((camera(), camera("CAM_BACK", np.pi)))
    moved = rig.move_cameras([make_transform(np.eye(3), [0.01, 0, 0]), np.eye(4)])
    assert moved.hash != rig.hash
    assert rig.reorder(("CAM_BACK", "CAM_FRONT")).hash != rig.hash
    assert rig.move_cameras([np.eye(4)] * 2).hash == rig.hash
    np.testing.assert_allclose(moved["CAM_FRONT"].cam2ego[:3, 3], [1.51, 0, 1.6])


def test_bad_calibration_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RigError, match="CAM_X: intrinsic"):
        Camera("CAM_X", 10, 10, np.zeros((3, 3)), np.eye(4))
    with pytest.raises(RigError, match="not orthonormal"):
        Camera("CAM_X", 10, 10, np.eye(3), 2 * np.eye(4))
    with pytest.raises(RigError, match="fisheye62"):
        Camera("CAM_X", 10, 10, np.eye(3), np.eye(4), "fisheye62")
    with pytest.raises(RigError, match="different names"):
        CameraRig((camera(), camera()))
    with pytest.raises(RigError, match="no camera 'CAM_TOP'"):
        CameraRig((camera(),))["CAM_TOP"]
    (tmp_path / "rig.yaml").write_text("cameras: [{name: CAM_FRONT, width: 4}]")
    with pytest.raises(RigError, match=r"rig.yaml.*cam2ego.*missing"):
        CameraRig.load(tmp_path / "rig.yaml")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"intrinsic": [[float("nan"), 0, 1], [0, 1, 1], [0, 0, 1]]}, "intrinsic must be a finite 3x3"),
        ({"intrinsic": "text"}, "camera CAM_FRONT"),
        ({"width": float("inf")}, "camera CAM_FRONT"),
        ({"width": 70_000}, "size 70000x"),
        ({"distortion_model": "plumb_bob", "distortion": [float("nan")] * 5}, "distortion coefficients must be finite"),
        ({"cam2ego": {"translation": [0, 0, float("inf")], "rotation_xyzw": [0, 0, 0, 1]}}, "finite 4x4"),
        ({"cam2ego": {"translation": [0, 0, 0], "rotation_xyzw": [0, 0, 0, 0]}}, "quaternion"),
        ({"cam2ego": None}, "camera CAM_FRONT"),
    ],
)
def test_wrong_values_of_a_rig_file_are_one_line_with_file_and_camera(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    path = tmp_path / "rig.yaml"
    path.write_text(yaml.safe_dump({"cameras": [camera().as_record() | change]}))
    with pytest.raises(RigError, match=rf"rig\.yaml: .*{reason}") as error:
        CameraRig.load(path)
    assert "\n" not in str(error.value)
