"""Hashes and atomic replacement of files."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest

from occbev.files import YamlError, file_hash, file_name, read_yaml, replace_file


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "data").write_bytes(data)
    assert file_hash(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def write_half(path: Path) -> None:
    with replace_file(path) as temporary:
        temporary.write_text("ne")
        raise OSError("full")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(OSError, match="full"):
        write_half(path)
    assert path.read_text() == "old"
    with replace_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"line 2: aliases \(\*a\)"),
        ("[" * 40 + "]" * 40, "nested deeper"),
        ("- 1\n" * 110_000, "more than 100000 values"),
        ("a: " + "x" * 20_000, "a value of over"),
        ("a: [1", "not YAML"),
        ("when: 2001-99-99", "not YAML"),
        ("a: \x00", "not YAML"),
    ],
)
def test_yaml_of_strangers_is_refused_in_one_line_at_once(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "file.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(YamlError, match=reason) as error:
        read_yaml(tmp_path / "file.yaml")
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../up", "a\\b", "new\nline", "x" * 300])
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="scene name"):
        file_name(name, "scene name")
    assert file_name("a #%[1] b", "scene name") == "a #%[1] b"
