"""Calibration is an input: whatever way a camera moves, the tables of every view transform follow it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from occbev.geometry import make_transform, rotation_from_rpy  # noqa: E402
from occbev.inference.example_inputs import ring_rig  # noqa: E402
from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.table_cache import TableCache  # noqa: E402
from occbev.rig import CameraRig  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402

ROOT = Path(__file__).parents[2]
CASES = (
    ("occbev-tiny", "bag"),
    ("occbev-tiny", "gather"),
    ("bevdepth4d_r50", "gather"),
    ("bevformer_tiny", "slots"),
    ("detr3d_r101", "projection"),
)
MODELS = {name: reduced(load_model(ROOT / "config/models" / f"{name}.yaml")) for name, _ in CASES}
ANGLE, SHIFT = st.floats(-0.5, 0.5), st.floats(-2.0, 2.0)


def moved(rig: CameraRig, index: int, move: np.ndarray) -> CameraRig:
    """The rig with one camera moved in ego."""
    cameras = list(rig.cameras)
    cameras[index] = replace(cameras[index], cam2ego=move @ cameras[index].cam2ego)
    return CameraRig(tuple(cameras))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(CASES),
    st.integers(0, 2),
    st.tuples(ANGLE, ANGLE, ANGLE),
    st.tuples(SHIFT, SHIFT, st.floats(-0.5, 0.5)),
    st.floats(0.7, 1.4),
)
def test_tables_follow_every_move_of_a_camera(
    case: tuple[str, str], index: int, angles: tuple, shift: tuple, zoom: float
) -> None:
    model, cache = MODELS[case[0]], TableCache(MODELS[case[0]], case[1])
    rig = ring_rig(model, 3)
    before = {name: table.copy() for name, table in cache.tables(rig).items()}
    other = moved(rig, index, make_transform(rotation_from_rpy(*angles), shift))
    if max(map(abs, (*angles, *shift))) > 0.2:
        assert other.hash != rig.hash
        after = cache.tables(other)
        assert any(not np.array_equal(before[name], after[name]) for name in before)
        assert {n: (t.shape, t.dtype) for n, t in after.items()} == {
            n: (t.shape, t.dtype) for n, t in before.items()
        }  # so that no graph has to change
    lens = replace(rig.cameras[index], intrinsic=rig.cameras[index].intrinsic * [[zoom], [zoom], [1]])
    zoomed = cache.tables(CameraRig((*rig.cameras[:index], lens, *rig.cameras[index + 1 :])))
    if abs(zoom - 1) > 0.1:
        assert any(not np.array_equal(before[name], zoomed[name]) for name in before)
    again = cache.tables(rig)  # and it comes back to what it was
    assert all(np.array_equal(before[name], again[name]) for name in before)
