"""The README names every command, topic and parameter as the code has them, and every file it links is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from occbev import graph
from occbev.cli import COMMANDS
from occbev.streams.parameters import CameraParameters, Leaf, PerceptionParameters, leaves

PARAMETERS = [*leaves(PerceptionParameters), *leaves(CameraParameters, "cameras.<name>.")]
TOPICS = [*graph.OUTPUT_TOPICS.values(), *graph.FRAME_INPUTS, graph.ODOMETRY, graph.DIAGNOSTICS]


@pytest.fixture(scope="module")
def readme() -> str:
    return (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("leaf", PARAMETERS, ids=lambda leaf: leaf.name)
def test_every_parameter_is_described_with_its_default(readme: str, leaf: Leaf) -> None:
    default = str(leaf.default).lower() if isinstance(leaf.default, bool) else leaf.default
    shown = "" if default in ("", ()) else f"`{default}`"
    assert f"| `{leaf.name}` | {shown} | {leaf.text}" in readme


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_every_topic_is_described_with_its_type(readme: str, topic: graph.Topic) -> None:
    assert f"| `{topic.name}` | `{topic.type.replace('/msg', '')}` |" in readme


def test_every_command_is_named(readme: str) -> None:
    for command in COMMANDS:
        assert f"`occbev {command}" in readme


def test_no_parameter_is_described_that_is_gone(readme: str) -> None:
    section = readme.split("## Parameters", 1)[1].split("\n## ", 1)[0]
    described = re.findall(r"^\| `([^`]+)` \|", section, re.M)
    assert set(described) == {leaf.name for leaf in PARAMETERS} | {"cameras.names"}


def test_links_lead_to_files(readme: str, repository: Path) -> None:
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in target]
    assert links
    assert [target for target in links if not (repository / target).is_file()] == []


def test_the_first_screen_is_a_sentence_and_two_commands(readme: str) -> None:
    first = readme.split("\n## ", 1)[0]
    assert first.index("make demo") < first.index("make test")
    assert len(first) < 1500
