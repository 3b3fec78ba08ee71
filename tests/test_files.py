"""Hashes and atomic replacement of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from occbev.files import file_hash, replace_file


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
