"""Fixtures of the whole suite: the shared data of a developer's machine, and a ROS graph of one's own."""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

collect_ignore = [] if importlib.util.find_spec("torch") else ["training"]
"""`colcon test` runs where a ROS distribution is, most often without torch."""

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("OCCBEV_SHARED", ROOT.parent / "shared"))


DOMAINS = range(1, 96)
"""ROS domains that test processes share out among themselves."""


def claimed_domain() -> int:
    """Return a ROS domain that no other test process of this machine has; it is ours while this process lives."""
    for attempt in range(len(DOMAINS)):
        domain = DOMAINS[(os.getpid() + attempt) % len(DOMAINS)]
        file = open(Path(tempfile.gettempdir()) / f"occbev_test_domain_{domain}", "w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        CLAIMS.append(file)
        return domain
    raise RuntimeError(f"all ROS domains of {DOMAINS} are in use by test processes")


CLAIMS: list[TextIO] = []


def pytest_configure(config: pytest.Config) -> None:
    """Keep nodes of this process apart from every other graph on the machine, and logs out of the home."""
    # Test tensors are tiny: threads that wait for each other cost more than they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["ROS_DOMAIN_ID"] = str(claimed_domain())
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_LOG_DIR"] = tempfile.mkdtemp(prefix="occbev_ros_log_")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Arrays and key tables that came out of running the published code; see their READMEs."""
    return ROOT / "tests/golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with published data, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data in {SHARED}; set OCCBEV_SHARED to its folder")
    return SHARED


@pytest.fixture(autouse=True)
def reset_log_levels() -> Iterator[None]:
    """Undo the log levels that a command sets for its process, so that no test depends on the ones before it."""
    yield
    for name in ("occbev", "occbev_training"):
        logging.getLogger(name).setLevel(logging.NOTSET)
