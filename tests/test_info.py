"""`occbev info` names every part, and for an absent one what installs it."""

from __future__ import annotations

import json

import pytest

from occbev.cli import info, main


def test_the_machine_readable_form_holds_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert set(sections) == {"machine", "versions", "runtimes", "ros", "models"}
    assert sections["runtimes"]["openvino"].startswith(("CPU", "absent: pip install"))
    assert sections["ros"]["rclpy"].startswith(("present", "absent: pip install"))


def test_tables_are_printed_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("machine", "versions", "runtimes", "ros", "models"))


def test_an_absent_module_names_its_remedy() -> None:
    assert info._importable("json", "pip install it") == "present"
    assert info._importable("no_such_module", "pip install it") == "absent: pip install it"
