"""Fixtures of the whole suite: the shared data of a developer's machine, and a ROS graph of one's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("OCCBEV_SHARED", ROOT.parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Keep nodes of this process apart from every other graph on the machine, and logs out of the home."""
    # Test tensors are tiny: threads that wait for each other cost more than they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_LOG_DIR"] = tempfile.mkdtemp(prefix="occbev_ros_log_")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with golden arrays and published data, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data in {SHARED}; set OCCBEV_SHARED to its folder")
    return SHARED
