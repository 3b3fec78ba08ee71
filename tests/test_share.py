"""The share folder is found from a clone and from an installed tree, and a miss names the places."""

from __future__ import annotations

from pathlib import Path

import pytest

from occbev import share


def test_clone_holds_its_own_launch_and_config_files() -> None:
    assert share.share_path("package.xml").is_file()
    assert share.share_path("config").is_dir()


def test_installed_tree_is_searched_beside_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "lib/python3.10/site-packages/occbev/share.py"
    wanted = tmp_path / "share/occbev/config/perception.yaml"
    for path in (module, wanted):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(share, "__file__", str(module))
    assert share.share_path("config/perception.yaml") == wanted


def test_a_miss_names_every_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(share, "__file__", str(tmp_path / "a/b/c/d/e/f/g/h/share.py"))
    with pytest.raises(FileNotFoundError, match=r"config/nothing\.yaml is in none of"):
        share.share_path("config/nothing.yaml")
