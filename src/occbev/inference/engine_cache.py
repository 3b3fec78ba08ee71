"""Where engines that TensorRT builds are kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "occbev" / "tensorrt"
"""Folder of engines, of both ways to TensorRT."""
