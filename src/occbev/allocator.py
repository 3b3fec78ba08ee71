"""Memory: one heap keeps large freed blocks, so that reuse costs no page faults; what stays is not looked at again."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -3, -1, -2, -8
"""Options of glibc's mallopt."""


def keep_large_blocks(kept: int = 512 << 20) -> bool:
    """Tell glibc to keep large blocks, in one heap; False where the C library has no mallopt or refuses.

    Call it before threads start: a thread keeps the heap that it has. With a heap per thread, what one thread
    has freed does not serve another one, and each heap grows to its own largest need.

    kept: bytes of freed memory at the top of the heap that the process may hold.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((_MMAP_THRESHOLD, 256 << 20), (_TRIM_THRESHOLD, kept), (_TOP_PAD, 64 << 20), (_ARENA_MAX, 1))
    accepted = [mallopt(option, value) for option, value in options]
    return all(result == 1 for result in accepted)


def return_free_memory() -> None:
    """Return free memory to the system, such as the memory that loading a network needed. Call it once, not in a loop."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def settle_objects() -> None:
    """Let Python's garbage collector leave out all objects that there are now, until `gc.unfreeze`.

    Modules and networks are 80,000 objects: a full collection, in the middle of a frame set, takes 40 ms for them.
    """
    gc.collect()
    gc.freeze()
