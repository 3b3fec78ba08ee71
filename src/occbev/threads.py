"""Names of threads as the operating system shows them: in `top -H`, in profilers, in the live benchmark."""

from __future__ import annotations

import contextlib
import ctypes

_SET_NAME = 15
"""PR_SET_NAME of prctl(2)."""


def name_thread(name: str) -> None:
    """Name the calling thread, of which Linux shows 15 characters; other systems are left alone.

    Python 3.14 names its threads so itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_NAME, name.encode()[:15], 0, 0, 0)
