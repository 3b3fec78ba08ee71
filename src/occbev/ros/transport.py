"""Settings of the process that decide whether large images arrive.

The default settings lose most large images; publishers need the same profile as the node.
"""

from __future__ import annotations

import os

from occbev.graph import PROFILE_VARIABLES, environment

SETTLE_S = 1.0
"""How long both ends of a topic may take to learn of each other after one end has."""


def use_large_image_profile(receives: bool = False) -> str:
    """Choose the shipped Fast DDS profile unless another is set; must run before rclpy.init().

    receives: of a process that receives images and sends none.
    Returns: the profile that is in use.
    """
    os.environ.update(environment(receives))
    return next(os.environ[variable] for variable in PROFILE_VARIABLES if os.environ.get(variable))
