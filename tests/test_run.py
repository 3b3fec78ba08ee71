"""A node that was started by another command ends with it, also where that dies without a word."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from occbev.cli.run import PARENT_VARIABLE

PARENT = "import subprocess, sys, os; subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())])"
CHILD = """
import sys, time
from occbev.cli.run import end_with
print(end_with(int(sys.argv[1])), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses prctl")
def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"True\n"
    parent.kill()
    rest, _ = parent.communicate(timeout=30)  # until the child, which has it too, closes the pipe
    assert rest == b""


def test_a_node_whose_parent_has_died_does_not_start() -> None:
    environment = {**os.environ, PARENT_VARIABLE: "-1"}
    command = [sys.executable, "-m", "occbev", "run", "params_file:=/no/such/file"]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 0
