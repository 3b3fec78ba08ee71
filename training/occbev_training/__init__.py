"""occbev_training: the offline loop of occbev, from recordings to an exported network."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "load_network"]


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is asked for, so that the simulator needs no torch."""
    if name == "load_network":
        from occbev_training.models.load import load_network

        return load_network
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
