"""Settings of the process that decide whether large images arrive: Fast DDS profile and memory allocator.

The default settings lose most large images; publishers need the same profile as the node.
"""

from __future__ import annotations

import ctypes
import os

from occbev.graph import PROFILE_VARIABLES, environment

MALLOPT = ((-3, 256 << 20), (-1, 512 << 20), (-2, 64 << 20))
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD: keep blocks of image size instead of faulting them in again."""

SETTLE_S = 1.0
"""How long both ends of a topic may take to learn of each other after one end has."""


def use_large_image_profile() -> str:
    """Choose the shipped Fast DDS profile unless another is set; must run before rclpy.init().

    Returns: the profile that is in use.
    """
    os.environ.update(environment())
    return next(os.environ[variable] for variable in PROFILE_VARIABLES if os.environ.get(variable))


def keep_large_blocks() -> bool:
    """Tell glibc to keep large blocks; False where the C library has no mallopt or refuses."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    accepted = [mallopt(option, value) for option, value in MALLOPT]
    return all(result == 1 for result in accepted)
