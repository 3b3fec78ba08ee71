"""A short run of the fuzz command's inputs, and that it sees what it looks for."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from occbev_training.benchmarks import fuzz
from occbev_training.cli import main


@pytest.mark.parametrize("kind", fuzz.COUNTS)
def test_damaged_inputs_are_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    outcome = fuzz.fuzz(kind, 120, tmp_path, seed=1)
    assert outcome.tracebacks == {}
    assert outcome.hangs == []
    assert outcome.holds
    assert outcome.slowest_s < 5


def test_tracebacks_and_hangs_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def attempt(rng: random.Random) -> None:
        if rng.random() < 0.5:
            time.sleep(5)
        raise TypeError("unhashable")

    monkeypatch.setattr(fuzz, "HANG_S", 1)
    monkeypatch.setitem(fuzz._KINDS, "rigs", lambda folder: attempt)
    assert main(["fuzz", "rigs", "--count", "3"]) == 1
    out = capsys.readouterr().out
    assert "TypeError at test_fuzz.py" in out
    assert "hangs" in out


def test_unknown_kinds_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "pickles"]) == 2
    assert "['pickles']: want kinds of ['images'," in capsys.readouterr().err
