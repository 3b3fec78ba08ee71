"""Versions of everything in use, for `occbev info`, reports and bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from occbev import __version__

PACKAGES = (
    "numpy",
    "opencv-python-headless",
    "openvino",
    "onnxruntime",
    "tensorrt",
    "torch",
    "rosbags",
    "rclpy",
    "ros-fastdds",
    "embreex",
)
"""Distributions that change what a run does, by the names that pip knows."""


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return name -> version of occbev, Python and each installed package; absent ones are left out."""
    found = {"occbev": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Return what the numbers of a run depend on: processor, usable cores, memory, system."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()}",
    }


VECTOR_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")
"""Flags of a CPU that decide how fast a network runs on it."""


def vector_instructions() -> str:
    """Return the CPU's instructions that decide how fast a network runs on it, and whether AMX is among them."""
    lines = [line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0].split(":", 1)[1].split()) if lines else set()
    found = [name for name in VECTOR_INSTRUCTIONS if name in flags]
    return " ".join(found) + ("" if any(name.startswith("amx") for name in found) else ", no amx")


def _processor() -> str:
    text = _read(Path("/proc/cpuinfo"))
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    total = [line.split()[1] for line in _read(Path("/proc/meminfo")).splitlines() if line.startswith("MemTotal")]
    return f"{int(total[0]) / 2**20:.0f} GiB" if total else "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
