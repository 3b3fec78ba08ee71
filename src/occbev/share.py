"""Where the installed launch files, configurations and models are (clone, wheel or colcon workspace), and paths to type."""

from __future__ import annotations

import sys
from pathlib import Path


def share_path(relative: str) -> Path:
    """Find a file or folder of the package's share, such as "config/perception.yaml".

    Raises:
        FileNotFoundError: naming every folder that was searched.
    """
    searched = [root / relative for root in _roots()]
    for path in searched:
        if path.exists():
            return path
    raise FileNotFoundError(f"{relative} is in none of {[str(path) for path in searched]}")


def here_or_shipped(text: str | Path) -> Path:
    """Return a path as given where it exists, else the file or folder of that name that the package ships.

    So "config/training/pretrain_tiny.yaml" is found from any folder. A path that is in neither place comes back as given.
    """
    path = Path(text)
    if path.exists() or path.is_absolute():
        return path
    return next((root / path for root in _roots() if (root / path).exists()), path)


def typed_here(path: Path) -> Path:
    """Return a path as one types it in the working directory: relative where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def pip_install(requirement: str) -> str:
    """Return the command that installs a requirement into the environment of this process."""
    return f"{typed_here(Path(sys.executable))} -m pip install '{requirement}'"


def _roots() -> list[Path]:
    """A clone's root, then share/occbev beside the library the package was installed into."""
    here = Path(__file__).resolve()
    clone = [here.parents[2]] if (here.parents[2] / "package.xml").is_file() else []
    prefixes = [*here.parents[3:7], Path(sys.prefix)]
    return clone + [prefix / "share" / "occbev" for prefix in prefixes]
