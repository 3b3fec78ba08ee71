"""Commands as pages and help show them: each is one that the programs take, names files that are there, and short ones run."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from occbev import cli
from occbev_training import cli as training_cli

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docker/README.md",
    ROOT / "training/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = {"occbev": (cli, "occbev.cli"), "occbev-train": (training_cli, "occbev_training.cli")}
HELD_BY_CONFIG = {"pretrain", "finetune"}
"""Commands whose further options are the keys of a training config."""


def lines_of(text: str) -> Iterator[str]:
    """The commands of ours in blocks of code, continued lines joined, comments left out."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language in ("", "bash", "sh"):
            yield from commands_in(block)


def commands_in(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s+#.*| {2,}\d .*$", "", line.strip())
        command = re.sub(r"^(\.venv/\w+/bin/|srun )?", "", command)
        if re.match(r"(occbev|occbev-train) [a-z]", command) and "..." not in command:
            yield command


def parse(command: str) -> argparse.Namespace:
    """Parse a command as the program would; fails with what argparse says."""
    program, name, *words = shlex.split(command)
    module, package = PROGRAMS[program]
    assert name in module.COMMANDS, f"{command}: no such command"
    parser = argparse.ArgumentParser(prog=f"{program} {name}")
    cli._declaration(package, name).add_arguments(parser)
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        return cli._parse(parser, words)
    pytest.fail(f"{command}: {said.getvalue().splitlines()[-1]}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_taken(page: Path) -> None:
    for command in lines_of(page.read_text()):
        args = parse(command)
        name = command.split()[1]
        assert name in HELD_BY_CONFIG or not getattr(args, "more", [])


def test_pages_show_commands() -> None:
    shown = [command for page in PAGES for command in lines_of(page.read_text())]
    assert len(shown) > 30
    assert len({command.split()[1] for command in shown}) > 15


@pytest.mark.parametrize("program", PROGRAMS)
def test_examples_of_the_help_are_taken(program: str) -> None:
    module, package = PROGRAMS[program]
    for name in module.COMMANDS:
        examples = list(commands_in(cli._declaration(package, name).__doc__ or ""))
        assert examples, name
        for command in examples:
            parse(command)
    for command in commands_in(module.FIRST_STEPS):
        parse(command)


def test_options_in_running_text_are_known() -> None:
    """Text such as `pairs --lidar`: every option that stands in it belongs to the command."""
    for page in PAGES:
        for text in re.findall(r"`((?:occbev|occbev-train) [a-z][^`]*)`", page.read_text()):
            program, name, *words = shlex.split(text)
            module, package = PROGRAMS[program]
            if name not in module.COMMANDS:
                assert not name.isalpha() or name == "COMMAND", f"{page.name}: {text}"
                continue
            parser = argparse.ArgumentParser()
            cli._declaration(package, name).add_arguments(parser)
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            unknown = options - set(parser._option_string_actions)
            assert name in HELD_BY_CONFIG or not unknown, f"{page.name}: {text}"


def test_files_of_the_repository_that_pages_name_are_there() -> None:
    for page in PAGES:
        text = re.sub(r"--keep \S+", "", page.read_text())  # a file that the command writes
        for name in re.findall(r"\b((?:config|docs|docker|launch|scripts|tests)/[\w./-]+\w)", text):
            if name.endswith("/test_"):
                continue  # a pattern: tests/test_<module>.py
            assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize(
    "command",
    [
        "occbev info",
        "occbev",
        "occbev-train",
        "occbev-train fuzz rigs --count 20",
    ],
)
def test_short_commands_run(command: str, tmp_path: Path) -> None:
    program, *words = shlex.split(command)
    main = f"import sys; from {PROGRAMS[program][1]} import main; sys.exit(main(sys.argv[1:]))"
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'training'}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", main, *words], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
