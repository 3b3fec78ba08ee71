"""Versions are those of the running environment, and an absent package is left out."""

from __future__ import annotations

import platform

import numpy as np

import occbev
from occbev.versions import machine, versions


def test_versions_are_those_of_the_running_interpreter() -> None:
    found = versions()
    assert found["occbev"] == occbev.__version__
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__


def test_an_absent_package_is_left_out() -> None:
    assert set(versions(["numpy", "no-such-distribution"])) == {"occbev", "python", "numpy"}


def test_the_machine_says_what_timings_depend_on() -> None:
    found = machine()
    assert int(found["cores"]) >= 1
    assert all(found[key] for key in ("processor", "memory", "system"))
