"""The C library's memory allocator: blocks of image size are kept in the process, not faulted in again."""

from __future__ import annotations

import contextlib
import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
"""Options of glibc's mallopt."""


def keep_large_blocks(kept: int = 512 << 20) -> bool:
    """Tell glibc to keep large blocks; False where the C library has no mallopt or refuses.

    kept: bytes of freed memory at the top of the heap that the process may hold.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((_MMAP_THRESHOLD, 256 << 20), (_TRIM_THRESHOLD, kept), (_TOP_PAD, 64 << 20))
    accepted = [mallopt(option, value) for option, value in options]
    return all(result == 1 for result in accepted)


def return_free_memory() -> None:
    """Give the system back what is free, such as what loading a network has left; it is wanted once, not in a loop."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
