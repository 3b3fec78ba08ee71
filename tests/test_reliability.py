"""Every test that the README's reliability table names exists."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_tests_named_in_the_readme_exist(repository: Path) -> None:
    section = (repository / "README.md").read_text().split("## Reliability", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"`(test_\w+)`", section))
    defined = {
        name
        for path in (repository / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 15
    assert named <= defined, sorted(named - defined)
