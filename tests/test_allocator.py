"""The allocator's settings, in processes of their own, since they hold from the moment of the call."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from occbev.allocator import keep_large_blocks

if {tuned} and not keep_large_blocks():
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
met = threading.Barrier(4)

def allocate():
    met.wait()  # all of them are alive at once
    for _ in range(100):
        libc.malloc(1000)
    met.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w")))
libc.fflush(None)
"""


def count_heaps(tuned: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(tuned=tuned)], capture_output=True, text=True, check=False
    )
    if done.returncode == 3 or "malloc_info" in done.stderr:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return done.stdout.count("<heap nr=")


def test_all_threads_share_one_heap() -> None:
    assert count_heaps(tuned=False) > 1
    assert count_heaps(tuned=True) == 1
