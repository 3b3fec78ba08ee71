"""The report on every network: complete, equal to the table of docs/model-zoo.md, and its reduced forms keep every part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

torch = pytest.importorskip("torch")

from occbev.inference.families import load_model  # noqa: E402
from occbev.inference.families.lift_splat import SplatModel  # noqa: E402
from occbev_training.cli import families, main  # noqa: E402
from occbev_training.cli.families import known  # noqa: E402
from occbev_training.export.package import ExportError  # noqa: E402
from occbev_training.export.zoo import REFERENCE_NETWORKS, FamilyRow  # noqa: E402
from occbev_training.models.families import reduced  # noqa: E402


def rows(repository: Path) -> dict[str, list[str]]:
    """The table of docs/model-zoo.md: name -> cells."""
    section = (repository / "docs/model-zoo.md").read_text().split("## Networks without", 1)[1]
    lines = [line for line in section.splitlines() if line.startswith("| `") and line.count("|") == 9]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row for row in cells}


def test_every_configuration_has_its_row(repository: Path) -> None:
    configured = {path.stem for path in (repository / "config/models").glob("*.yaml")}
    assert set(REFERENCE_NETWORKS) == configured == set(known())
    assert set(rows(repository)) == configured


def test_every_network_is_exported_at_full_size_once_a_week(repository: Path) -> None:
    workflow = yaml.safe_load((repository / ".github/workflows/weekly.yaml").read_text())
    assert workflow["jobs"]["families"]["strategy"]["matrix"]["name"] == known()


def test_the_readme_says_what_the_code_knows(repository: Path) -> None:
    for name, row in rows(repository).items():
        published = REFERENCE_NETWORKS[name]
        config = load_model(repository / "config/models" / f"{name}.yaml")
        assert row[1] == config.family
        assert row[4] == (" ".join(published.fixtures) or "-")
        assert row[6] == (published.score or "-")
        assert (row[3] == "-") == (not published.table)
        if row[3] != "-":
            assert len(set(row[3].split(" of "))) == 1
        assert float(row[5].removesuffix(" (full size)")) <= 1e-4


def test_every_fixture_is_read_by_a_test(repository: Path, golden_folder: Path) -> None:
    sources = "\n".join(path.read_text() for path in (repository / "tests").rglob("test_*.py"))
    for name, published in REFERENCE_NETWORKS.items():
        for fixture in published.fixtures:
            assert (golden_folder / f"{fixture}.npz").is_file(), name
            assert fixture in sources, f"{fixture} of {name} is held by no test"
    tables = {path.name for path in golden_folder.glob("*_state_dict.json")}
    assert {f"{p.table}_state_dict.json" for p in REFERENCE_NETWORKS.values() if p.table} == tables


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_reduced_forms_keep_every_part(repository: Path, name: str) -> None:
    model = load_model(repository / "config/models" / f"{name}.yaml")
    small = reduced(model)
    assert (small.family, small.past_frames, small.bev.frame) == (
        model.family,
        model.past_frames,
        model.bev.frame,
    )
    if isinstance(model, SplatModel):
        assert (small.lift.height_bins > 1) == (model.lift.height_bins > 1)
    else:
        assert (small.query_head is None) == (model.query_head is None)
    assert small.image.width * small.image.height <= 96 * 64


def test_the_report_counts_parameters_and_keys(golden_folder: Path, capsys) -> None:
    golden = str(golden_folder)
    assert main(["families", "bevformer_tiny", "--golden", golden, "--no-export", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["keys"] == [643, 643]
    assert record["parameters"] == pytest.approx(33.52, abs=0.01)
    row = FamilyRow("bevformer_tiny", "bevformer", 33.52, (643, 643), 2e-6, ("Conv",))
    assert row.cells()[3] == "643 of 643"
    assert row.cells()[5] == "2e-06"


def test_a_graph_that_fails_is_told(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bevdet_occ_r50_4d_stereo"
    assert main(["families", name, "--no-export"]) == 0
    assert "| not measured |" in capsys.readouterr().out

    def differs(*_: object, **__: object) -> None:
        raise ExportError("ONNX Runtime: box differs")

    monkeypatch.setattr(families, "measure", differs)
    assert main(["families", name]) == 1
    captured = capsys.readouterr()
    assert "box differs" in captured.err


def test_the_table_of_a_page_is_replaced_between_its_marks(tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{families.BEGIN}\nold\n{families.END}\nafter\n")
    assert main(["families", "bevdet_r50", "--no-export", "--markdown", str(page)]) == 0
    before, *table, after = page.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert table[1:-1] == capsys.readouterr().out.splitlines()
    assert table[3].startswith("| `bevdet_r50` | bevdet | 44.25 |")
    page.write_text("no marks\n")
    assert main(["families", "bevdet_r50", "--no-export", "--markdown", str(page)]) != 0
    assert "needs the lines" in capsys.readouterr().err
    assert page.read_text() == "no marks\n"
