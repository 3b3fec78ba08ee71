"""The code in docs/python.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = (Path(__file__).parents[1] / "docs/python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_the_page_has_three_examples() -> None:
    assert [block.count("\n") <= 10 for block in BLOCKS] == [True] * 3


def test_own_images_become_boxes_and_voxels() -> None:
    pytest.importorskip("openvino", reason="needs a runtime")
    cam2ego = np.array([[0.0, 0, 1, 1.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])
    names: dict[str, Any] = {"cam2ego": cam2ego}
    exec(BLOCKS[1], names)  # noqa: S102 - a page of this repository
    assert names["result"].occupancy.state.shape == (200, 200, 16)
    assert names["result"].boxes.cameras == ("front",)


def test_the_image_encoder_runs_in_own_code() -> None:
    pytest.importorskip("torch", reason="needs the training environment")
    names: dict[str, Any] = {}
    exec(BLOCKS[2], names)  # noqa: S102 - a page of this repository
    assert names["features"].shape == (6, 128, 8, 22)
