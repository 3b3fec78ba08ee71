"""The pages of docs/: every link leads to a file, every named test is there, tables are as the code has them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from occbev.cli import COMMANDS as ROBOT_COMMANDS
from occbev.geometry import rotation_from_xyzw
from occbev.inference.model_package import ModelPackage
from occbev.rig import Camera
from occbev.streams import reference
from occbev_training.cli import COMMANDS as TRAINING_COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "training/README.md",
    ROOT / "docker/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "config/models/occbev-tiny/README.md"]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page.name} links to {link}"


def test_the_tables_of_topics_and_parameters_are_made_from_the_code() -> None:
    page = (ROOT / "docs/topics-and-parameters.md").read_text()
    assert reference.fill(page) == page, "run make docs"


def test_every_test_of_a_fault_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/faults.md").read_text()))
    written = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named
    assert named - written == set()


def test_every_file_that_the_architecture_names_is_there() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "docs/architecture.md").read_text())
    folders = (ROOT, ROOT / "src/occbev", ROOT / "training/occbev_training")
    assert len(named) > 20
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []


def test_scores_of_the_shipped_weights_are_those_of_their_package() -> None:
    metrics = ModelPackage.load(ROOT / "config/models/occbev-tiny").metrics
    scores, means = metrics["network"], metrics["training_set_means"]
    keys = ("car_AP_2m_30m", "car_AP_2m_50m", "mAP", "occupancy_iou", "occupancy_miou")
    row = " | ".join(f"{scores[key]:.3f}" for key in keys)
    assert f"simulated drives | {row} |" in (ROOT / "docs/model-zoo.md").read_text()
    car, iou = (f"{scores[key]:.2f}" for key in ("car_AP_2m_30m", "occupancy_iou"))
    guess = f"{means['car_AP_2m_30m']:.2f}, {means['occupancy_iou']:.2f}"
    readme = (ROOT / "README.md").read_text()
    assert f"car AP at 2 m within 30 m {car}, occupancy IoU {iou} (mean of the training drives: {guess})" in readme


def test_every_page_is_reached_from_the_readme() -> None:
    reached = "".join(page.read_text() for page in PAGES[:1])
    assert [page.name for page in PAGES if page.parent == ROOT / "docs" and page.name not in reached] == []


def test_the_readme_is_short_and_begins_with_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 9000
    assert readme.index("make demo") < readme.index("make test") < 1500


def test_every_command_has_a_place_in_a_page() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    commands = [*(f"occbev {name}" for name in ROBOT_COMMANDS), *(f"occbev-train {name}" for name in TRAINING_COMMANDS)]
    assert [command for command in commands if command not in pages] == []


def test_cameras_of_the_rig_page_look_where_it_says_and_stand_upright() -> None:
    page = (ROOT / "docs/rig-file.md").read_text()
    example = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.S)[1])["cameras"][0]
    rows = dict(re.findall(r"^\| (ahead|left|back|right) \| `(\[.*\])` \|$", page, re.M))
    found = {look: rotation_from_xyzw(np.array(yaml.safe_load(text))) for look, text in rows.items()}
    found["tail"] = Camera.from_record(example).cam2ego[:3, :3]
    wanted = {"ahead": [1, 0, 0], "left": [0, 1, 0], "back": [-1, 0, 0], "right": [0, -1, 0], "tail": [-1, 0, 0]}
    for look, direction in wanted.items():
        np.testing.assert_allclose(found[look][:, 2], direction, atol=1e-6, err_msg=look)
        np.testing.assert_allclose(found[look][:, 1], [0, 0, -1], atol=1e-6, err_msg=look)  # image down is down
