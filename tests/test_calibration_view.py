"""The node's warning of a camera that looks past every voxel, as one in the body frame does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from occbev.geometry import make_transform, rotation_from_rpy
from occbev.messages.tf import Buffer
from occbev.rig import CameraRig
from occbev.streams import calibration
from occbev.streams.calibration import Calibration, fallback_camera

CAMERA = fallback_camera("CAM_FRONT")


@pytest.mark.parametrize(
    ("rpy", "warns"),
    [
        ((0, 0, 0), False),
        ((0, 0.5, 0), False),  # tilted down by 29 degrees, the road is in sight
        ((0, np.pi / 2, 0), True),  # down
        ((0, -np.pi / 2, 0), True),  # up
    ],
)
def test_a_camera_that_sees_no_voxel_is_not_good(tmp_path, rpy, warns) -> None:
    turned = replace(CAMERA, cam2ego=CAMERA.cam2ego.copy())
    rotation = rotation_from_rpy(*rpy) @ CAMERA.cam2ego[:3, :3]
    turned = replace(turned, cam2ego=make_transform(rotation, CAMERA.cam2ego[:3, 3]))
    CameraRig((turned,)).save(tmp_path / "rig.yaml")
    parameters = SimpleNamespace(
        rig=str(tmp_path / "rig.yaml"), names=["CAM_FRONT"], cameras={"CAM_FRONT": SimpleNamespace(frame_id="")}
    )
    text = Calibration(parameters, Buffer()).describe_view("CAM_FRONT")
    assert ("meet no voxel" in text) == warns


def test_a_camera_in_the_body_frame_looks_up() -> None:
    """base_link's own axes as those of a camera: z, the optical axis, points up."""
    from occbev.streams.calibration import _reaches_the_road

    assert _reaches_the_road(CAMERA)
    assert not _reaches_the_road(replace(CAMERA, cam2ego=make_transform(np.eye(3), (1.0, 0.0, 1.5))))


def test_a_camera_is_looked_at_once(tmp_path, monkeypatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(calibration, "_reaches_the_road", lambda camera: bool(looked.append(camera.name)))
    CameraRig((CAMERA,)).save(tmp_path / "rig.yaml")
    of_one = SimpleNamespace(
        rig=str(tmp_path / "rig.yaml"), names=["CAM_FRONT"], cameras={"CAM_FRONT": SimpleNamespace(frame_id="")}
    )
    known = Calibration(of_one, Buffer())
    assert all("meet no voxel" in known.describe_view("CAM_FRONT") for _ in range(2))
    assert looked == ["CAM_FRONT"]
