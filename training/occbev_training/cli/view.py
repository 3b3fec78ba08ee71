"""What `occbev-train view` does: the same as `occbev view`."""

from __future__ import annotations

from occbev.cli.view import run as run
