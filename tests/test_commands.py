"""How commands take their arguments, what they say of themselves, and how they show that long work goes on."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console

from occbev import cli
from occbev.cli import progress
from occbev.share import here_or_shipped
from occbev_training import cli as training_cli


def parsed(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> Namespace:
    """Return what a command is run with."""
    found: list[Namespace] = []
    package = "occbev.cli" if program == "occbev" else "occbev_training.cli"
    module = import_module(f"{package}.{arguments[0].replace('-', '_')}")
    monkeypatch.setattr(module, "run", lambda args: found.append(args) or 0)
    assert cli.dispatch(program, package, import_module(package).COMMANDS, arguments) == 0
    return found[0]


@pytest.mark.parametrize(
    ("arguments", "inputs"),
    [
        (("pairs", "--workers", "2", "BAG", "OUT"), ["BAG", "OUT"]),
        (("pairs", "ONE", "--workers", "2", "TWO", "--out", "OUT", "THREE"), ["ONE", "TWO", "THREE"]),
        (("pairs", "OUT", "BAG", "--workers", "2"), ["OUT", "BAG"]),
        (("prepare", "--workers", "2", "BAG", "--out", "OUT", "OTHER"), ["BAG", "OTHER"]),
        (("labels", "BAG", "--out", "OUT", "OTHER"), ["BAG", "OTHER"]),
    ],
)
def test_options_may_stand_between_inputs(monkeypatch, arguments, inputs):
    pytest.importorskip("torch")
    assert [str(path) for path in parsed(monkeypatch, "occbev-train", *arguments).inputs] == inputs


@pytest.mark.parametrize(
    "order", [("W", "--model", "M", "OUT"), ("--model", "M", "W", "OUT"), ("W", "OUT", "--model", "M")]
)
def test_options_may_stand_before_the_older_last_position(monkeypatch, order):
    pytest.importorskip("torch")
    args = parsed(monkeypatch, "occbev-train", "export", *order)
    assert [str(path) for path in (args.weights, args.position, args.model)] == ["W", "OUT", "M"]


def test_what_a_command_does_not_know_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(monkeypatch, "occbev", "overlay", "BAG", "--out", "OUT", "OTHER", "--colour", "red")
    assert end.value.code == 2
    assert "unrecognized arguments: OTHER --colour red" in capsys.readouterr().err


def test_a_full_disk_is_told_with_what_was_being_written(monkeypatch, capsys):
    def fill(args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(import_module("occbev.cli.rig"), "run", fill)
    assert cli.main(["rig", "bag", "--out", "vehicle"]) == 2
    wanted = "occbev rig: [Errno 28] No space left on device while writing vehicle\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused(capsys, value):
    for program, command in (
        (cli.main, ["replay", "bag", f"--rate={value}"]),
        (training_cli.main, ["pairs", "bag", f"--window={value}"]),
    ):
        with pytest.raises(SystemExit, match="2"):
            program(command)
        assert f"argument {command[2].split('=')[0]}: {value} is no finite number" in capsys.readouterr().err


def test_unknown_options_of_a_training_command_reach_its_configuration(monkeypatch):
    pytest.importorskip("torch")
    args = parsed(monkeypatch, "occbev-train", "pretrain", "config.yaml", "--train.steps", "3")
    assert (str(args.config), args.more) == ("config.yaml", ["--train.steps", "3"])


@pytest.mark.parametrize("arguments", [["--", "overlay"], ["paint"]])
def test_a_command_must_come_first(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: occbev" in capsys.readouterr().err


PROGRAMS = {"occbev": cli, "occbev-train": training_cli}

SLOW = {"torch", "torchvision", "numba", "scipy", "openvino", "onnxruntime", "rclpy", "matplotlib", "pyarrow", "tyro"}

HELP = """
import contextlib, io, json, sys
from occbev import cli
import occbev_training.cli as training
shown = {}
for program, module in (("occbev", cli), ("occbev-train", training)):
    for command in module.COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            module.main([command, "--help"])
        shown[f"{program} {command}"] = text.getvalue()
print(json.dumps({"shown": shown, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, object]:
    """The help of every command, and which modules were imported for it."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, env=environment())
    return json.loads(done.stdout)


def environment() -> dict[str, str]:
    """The environment in which another process finds the sources."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_help_imports_nothing_slow(helped):
    assert SLOW & set(helped["modules"]) == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_every_command_shows_an_example(helped, program):
    commands = [f"{program} {name}" for name in PROGRAMS[program].COMMANDS]
    assert [c for c in commands if not re.search(rf"^ *{c}\b", helped["shown"][c], re.M)] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_alone_names_the_next_commands(capsys, program):
    assert PROGRAMS[program].main([]) == 0
    text = capsys.readouterr().out
    named = set(re.findall(rf"^ {{2}}{program} ([a-z-]+)", text, re.M))
    assert len(named) >= 3
    assert named <= set(PROGRAMS[program].COMMANDS)


def test_a_package_that_is_missing_is_one_line_with_the_remedy(monkeypatch, capsys):
    module = type(sys)("occbev_training.cli.export")
    monkeypatch.setitem(sys.modules, "torch", None)

    def run(args):
        import torch

        return torch.cuda.device_count()

    module.run = run
    monkeypatch.setitem(sys.modules, "occbev_training.cli.export", module)
    assert training_cli.main(["export", "weights", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("occbev-train export: the Python package torch is missing")
    assert "make .venv/training" in said
    assert said.count("\n") == 1


def test_the_missing_offline_package_is_one_line_with_the_remedy(monkeypatch, capsys):
    def run(args):
        raise ModuleNotFoundError("No module named 'occbev_training'", name="occbev_training")

    monkeypatch.setattr(import_module("occbev.cli.demo"), "run", run)
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert "pip install --no-deps ./training" in said
    assert said.count("\n") == 1


def test_the_demo_ends_with_commands_that_exist_and_can_be_typed_here(tmp_path, monkeypatch, capsys):
    demo = import_module("occbev.cli.demo")
    monkeypatch.setattr(demo, "CONSOLE", Console())
    monkeypatch.chdir(tmp_path)
    program = tmp_path / ".venv/robot/bin/occbev"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", "")
    demo.print_next(Path("out/demo/drive-1/bag"), Path("out/demo/run/published"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert {line.split()[1] for line in lines[2:]} <= set(cli.COMMANDS)
    assert all(line.startswith("  .venv/robot/bin/occbev ") for line in lines[2:])
    monkeypatch.setenv("PATH", str(program.parent))
    program.chmod(0o755)
    assert demo.find_program() == "occbev"


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert here_or_shipped("config/models/occbev-tiny.yaml").is_file()
    (tmp_path / "config/models").mkdir(parents=True)
    own = tmp_path / "config/models/occbev-tiny.yaml"
    own.write_text("own")
    assert here_or_shipped("config/models/occbev-tiny.yaml").read_text() == "own"
    assert here_or_shipped("no/such.yaml") == Path("no/such.yaml")


def test_long_work_prints_a_line_a_minute_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress, "PERIOD_S", 0.05)
    pipe = Console(file=io.StringIO(), force_terminal=False)
    with progress.Progress(console=pipe) as bars:
        task = bars.add_task("frames", total=4)
        bars.advance(task)
        wait_for_lines(pipe, 2)
    with progress.status(pipe, "exporting"):
        wait_for_lines(pipe, 5)
    lines = pipe.file.getvalue().splitlines()
    assert lines[0].startswith("frames: 1 of 4 after ")
    assert "exporting ..." in lines
    assert lines[-1].startswith("exporting: ")
    count = len(lines)
    time.sleep(0.2)
    assert len(pipe.file.getvalue().splitlines()) == count, "it ends with the work"
    assert progress.describe_time(185) == "3 min"


def wait_for_lines(console: Console, count: int) -> None:
    end = time.monotonic() + 20
    while len(console.file.getvalue().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
