"""Files that others rely on: their hash, and writing them so that a crash leaves the old or the new one, never half of it."""

from __future__ import annotations

import glob
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def partial_path(path: Path) -> Path:
    """Return where this process writes a file before it replaces `path`; no other process writes there."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove the partial files of `prefix...` that processes of this machine left when they were killed."""
    for path in folder.glob(f".{glob.escape(prefix)}*.{socket.gethostname()}-*.partial"):
        process = path.name.removesuffix(".partial").rpartition("-")[2]
        if process.isdecimal() and not _is_alive(int(process)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there is on disk and named `path` at the end.

    If the block raises, the temporary file is removed and `path` stays as it was.
    """
    temporary = partial_path(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Write a file's or folder's contents through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
