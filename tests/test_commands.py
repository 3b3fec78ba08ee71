"""How commands take their arguments: positions and options in any order."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module

import pytest

from occbev import cli


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


def test_unknown_options_of_a_training_command_reach_its_configuration(monkeypatch):
    pytest.importorskip("torch")
    args = parsed(monkeypatch, "occbev-train", "pretrain", "config.yaml", "--train.steps", "3")
    assert (str(args.config), args.more) == ("config.yaml", ["--train.steps", "3"])


@pytest.mark.parametrize("arguments", [[], ["--", "overlay"], ["paint"]])
def test_a_command_must_come_first(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: occbev" in capsys.readouterr().err
