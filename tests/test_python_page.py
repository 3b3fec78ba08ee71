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


def test_a_bag_runs_through_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the files that `occbev rig` writes from the bag, as the page assumes."""
    pytest.importorskip("openvino", reason="needs a runtime")
    from tests.small_bags import Drive

    from occbev.cli import main

    monkeypatch.chdir(tmp_path)
    Drive(sets=2).write(Path("my_bag"))
    assert main(["rig", "my_bag", "--out", "vehicle"]) == 0
    capsys.readouterr()
    exec(BLOCKS[0], {})  # noqa: S102 - a page of this repository
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    stamps = [int(line[0]) for line in lines]
    assert stamps[1] - stamps[0] == 100_000_000


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
