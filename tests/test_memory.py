"""What a network remembers: state from frame to frame, and when it is forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from occbev.config import ConfigError, ImageConfig, LiftConfig, ModelConfig
from occbev.geometry import make_transform, rotation_from_yaw, transform_points
from occbev.grid import BevGrid, VoxelGrid
from occbev.inference.families import family_of
from occbev.inference.families.bevformer import BevFormerConfig, BevFormerModel
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.families.record import Moment
from occbev.inference.memory import MAX_GAP_S, Memory
from occbev.inference.model_package import ModelPackage
from occbev.inference.pipeline import Pipeline, key_pose, motion_to_key
from occbev.inference.postprocess import OutputError
from occbev.inference.reference_points import warp_table
from occbev.results import CameraFrame, FrameSet
from occbev.rig import Camera, CameraRig

BEV = BevGrid((-8.0, -8.0), (1.0, 1.0), (16, 16))
LIFT = replace(
    LiftSplatModel(),
    image=ImageConfig(width=64, height=32),
    lift=LiftConfig(channels=3, max_points=2048),
    bev=BEV,
    grid=VoxelGrid((-4.0, -4.0, -1.0), (0.5, 0.5, 1.0), (16, 16, 2)),
    memory=2,
)
FORMER = BevFormerModel(image=LIFT.image, bev=BEV, grid=LIFT.grid, bevformer=BevFormerConfig(channels=8, heads=2))
SECOND = 1_000_000_000


def camera(name: str) -> Camera:
    forward = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    optics = np.array([[60.0, 0, 32], [0, 60, 16], [0, 0, 1]])
    return Camera(name, 64, 32, optics, make_transform(forward, [1, 0, 1.5]))


RIG = CameraRig((camera("a"), camera("b")))


def pose(x: float, yaw: float = 0.0) -> np.ndarray:
    return make_transform(rotation_from_yaw(yaw), (x, 3.0, 0.0))


def state(model: ModelConfig, value: float = 1.0) -> dict[str, np.ndarray]:
    channels = 6 if model.family == "lss" else 8
    return {"state_out_bev": np.full((1, channels, 16, 16), value, np.float32)}


@pytest.mark.parametrize("model", [LIFT, FORMER])
def test_state_is_carried_to_the_next_frame(model: ModelConfig) -> None:
    memory = Memory(model)
    first = memory.inputs(0, pose(0), RIG)
    assert first["state_known"] == 0
    assert not first["state_in_bev"].any()
    memory.keep(state(model), 0, pose(0), RIG)
    second = memory.inputs(SECOND // 2, pose(4), RIG)
    assert second["state_known"] == 1
    np.testing.assert_array_equal(second["state_in_bev"], state(model)["state_out_bev"])


def test_a_buffer_that_the_runtime_reuses_is_copied() -> None:
    memory, outputs = Memory(LIFT), state(LIFT)
    memory.keep(outputs, 0, pose(0), RIG)
    outputs["state_out_bev"][:] = 9
    assert memory.inputs(SECOND, pose(1), RIG)["state_in_bev"].max() == 1


@pytest.mark.parametrize(
    ("stamp_ns", "where"),
    [
        (SECOND, None),  # no pose is known
        (0, pose(0)),  # the same frame again
        (-SECOND, pose(0)),  # a bag that began anew
        (int((MAX_GAP_S + 0.1) * SECOND), pose(0)),  # too long ago
        (SECOND, pose(200)),  # a jump
    ],
)
def test_a_past_that_cannot_be_trusted_is_forgotten(stamp_ns: int, where: np.ndarray | None) -> None:
    memory = Memory(LIFT)
    memory.keep(state(LIFT), 0, pose(0), RIG)
    assert memory.filled
    inputs = memory.inputs(stamp_ns, where, RIG)
    assert inputs["state_known"] == 0
    assert not inputs["state_in_bev"].any()
    assert not memory.filled


def test_networks_without_a_memory_get_no_state() -> None:
    memory = Memory(replace(LIFT, memory=0))
    memory.keep({}, 0, pose(0), RIG)
    assert not memory.active
    assert memory.inputs(SECOND, pose(1), RIG) == {}
    with pytest.raises(ConfigError, match="memory -1"):
        replace(LIFT, memory=-1)


@pytest.mark.parametrize("frame", ["base_link", "lidar"])
def test_a_landmark_is_read_where_it_was(frame: str) -> None:
    from occbev.geometry import frame2ego, invert_transform

    model = replace(LIFT, bev=replace(BEV, frame=frame))
    before, now = pose(10, 0.2), pose(12, 0.5)
    table = family_of(model).motion(model, Moment(1, now, RIG), Moment(0, before, RIG))["table_warp"][0]
    ego2frame = invert_transform(frame2ego(frame))
    landmark = np.array([[11.5, 4.5, 0.0]])  # in global axes
    seen = [transform_points(ego2frame @ invert_transform(p), landmark)[0, :2] for p in (now, before)]
    cell_now, cell_before = (model.bev.map_coordinates(s) - 0.5 for s in seen)
    place = (table + 1) / 2 * 15  # (Y, X, 2), in cells of the frame before
    column, row = np.floor(cell_now).astype(int)
    share = cell_now - (column, row)
    corners = place[row : row + 2, column : column + 2]
    across = corners[:, 0] * (1 - share[0]) + corners[:, 1] * share[0]
    np.testing.assert_allclose(across[0] * (1 - share[1]) + across[1] * share[1], cell_before, atol=1e-4)


def test_standing_still_moves_nothing() -> None:
    table = warp_table(np.eye(4), BEV)
    x, y = np.meshgrid(np.linspace(-1, 1, 16), np.linspace(-1, 1, 16))
    np.testing.assert_allclose(table, np.stack([x, y], -1), atol=1e-6)


# --- through the pipeline --------------------------------------------------------------------


class Counter:
    """A backend whose state counts the frames that it has seen."""

    name, form, device, kept_outputs, at_once = "counter", "bag", "none", 2, 1

    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        self.inputs = {name: array.copy() for name, array in inputs.items()}
        logits = np.zeros((1, 18, 2, 16, 16), np.float32)
        known = inputs["state_known"][0] * inputs["state_in_bev"].max()
        return {
            "occupancy_logits": logits,
            "state_out_bev": np.full((1, 6, 16, 16), known + 1, np.float32),
        }


def frame_set(stamp_ns: int, where: np.ndarray | None) -> FrameSet:
    image = np.zeros((32, 64, 3), np.uint8)
    frames = {n: CameraFrame(n, stamp_ns, image, where) for n in ("a", "b")}
    return FrameSet(stamp_ns, frames)


def test_the_pipeline_carries_state_and_forgets_it() -> None:
    backend = Counter()
    rig = CameraRig((camera("a"), camera("b")))
    line = Pipeline(ModelPackage(Path(), LIFT), rig, backend)
    line.warm_up()
    assert not line.remembers

    def seen(stamp_ns: int, where: np.ndarray | None) -> float:
        line.run(frame_set(stamp_ns, where))
        return float(backend.inputs["state_in_bev"].max() * backend.inputs["state_known"][0])

    assert [seen(i * SECOND // 2, pose(2 * i)) for i in range(3)] == [0, 1, 2]
    moved = line._tables.tables(line.rig)  # geometry stays what it was
    assert set(moved) <= set(backend.inputs)
    assert seen(2 * SECOND, None) == 0  # a set without poses
    assert not line.remembers
    assert seen(3 * SECOND, pose(6)) == 0
    assert seen(3 * SECOND + 1, pose(6)) == 1
    assert line.remembers
    line.forget()
    assert seen(3 * SECOND + 2, pose(6)) == 0
    line.set_rig(CameraRig((camera("a"),)))  # another rig looks at the same world
    line.run(FrameSet(4 * SECOND, {"a": frame_set(4 * SECOND, pose(7)).frames["a"]}))
    assert backend.inputs["state_known"] == 1
    line.close()


def test_a_frame_that_cannot_be_decoded_leaves_nothing_behind() -> None:
    """Values that are not finite would otherwise live on in the state, from frame to frame."""
    backend = Counter()
    line = Pipeline(ModelPackage(Path(), LIFT), CameraRig((camera("a"), camera("b"))), backend)
    sound, broken = backend.run, np.full((1, 18, 2, 16, 16), np.nan, np.float32)
    line.run(frame_set(0, pose(0)))
    backend.run = lambda inputs: {**sound(inputs), "occupancy_logits": broken}  # type: ignore[method-assign]
    with pytest.raises(OutputError, match="finite"):
        line.run(frame_set(SECOND // 2, pose(1)))
    assert not line.remembers
    backend.run = sound  # type: ignore[method-assign]
    line.run(frame_set(SECOND, pose(2)))
    assert backend.inputs["state_known"] == 0
    line.close()


def test_the_key_pose_is_the_exposures_pose_moved_to_the_key_time() -> None:
    key = pose(5, 0.3)
    frames = {
        "a": CameraFrame("a", 1, b"", pose(4.8, 0.28)),
        "b": CameraFrame("b", 2, b"", pose(5.1, 0.31)),
    }
    some = FrameSet(3, frames)
    np.testing.assert_allclose(key_pose(some, motion_to_key(some, key)), key, atol=1e-12)
    np.testing.assert_array_equal(key_pose(some, None), frames["a"].ego2global)
    assert key_pose(FrameSet(3, {"a": CameraFrame("a", 1, b"")}), None) is None
