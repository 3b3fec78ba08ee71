"""Files: untrusted YAML, hashes, names that stay in their folder, and writes that a crash cannot leave half done."""

from __future__ import annotations

import glob
import hashlib
import os
import socket
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

MAX_ARRAY_BYTES = 4 * 2**30
"""Most bytes that the arrays of one file may unpack to."""

MAX_YAML_BYTES = 2**20
MAX_YAML_VALUES = 100_000
MAX_YAML_DEPTH = 32
MAX_YAML_TEXT = 2**14
"""Limits of a YAML file: size, keys and values together, nesting, and characters of one value."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlError(ValueError):
    """A file that cannot be read as YAML, in one line without its path."""


def read_yaml(path: Path) -> Any:
    """Read a YAML file that may come from anybody; raises YamlError, or OSError where it cannot be opened.

    Aliases are refused: ten lines of them unfold to billions of values.
    """
    size = path.stat().st_size
    if size > MAX_YAML_BYTES:
        raise YamlError(f"{size} bytes, at most {MAX_YAML_BYTES} are read")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        _check_events(text)
        return yaml.load(text, Loader=_Loader)
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise YamlError(f"not YAML: {one_line(error)}") from error


class ArraysError(ValueError):
    """A file of arrays that cannot be read, in one line that begins with its path."""


def read_arrays(path: Path, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of an .npz file that may come from anybody, all of them if `names` is None.

    Nothing is unpickled. Raises:
        ArraysError: the file is damaged, lacks one of the names, or unpacks to over `MAX_ARRAY_BYTES`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_ARRAY_BYTES:
            raise ArraysError(f"{path}: it unpacks to {size} bytes, at most {MAX_ARRAY_BYTES} are read")
        with np.load(path, allow_pickle=False) as arrays:
            wanted = list(arrays) if names is None else list(names)
            absent = [name for name in wanted if name not in arrays]
            if absent:
                raise ArraysError(f"{path}: no array {absent[0]!r}, it has {sorted(arrays)[:20]}")
            return {name: np.asarray(arrays[name]) for name in wanted}
    except ArraysError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and its header parser each raise their own
        raise ArraysError(f"{path}: not a whole .npz file: {one_line(error)}") from error


def _check_events(text: str) -> None:
    """Refuse what would take long or much memory to build; nothing is built here."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise YamlError(f"{_place(event)}: aliases (*{event.anchor}) are not read: write it out")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_YAML_TEXT:
            raise YamlError(f"{_place(event)}: a value of over {MAX_YAML_TEXT} characters")
        if depth > MAX_YAML_DEPTH or number > MAX_YAML_VALUES:
            raise YamlError(f"more than {MAX_YAML_VALUES} values, or nested deeper than {MAX_YAML_DEPTH}")


def _place(event: yaml.Event) -> str:
    return "a line" if event.start_mark is None else f"line {event.start_mark.line + 1}"


def one_line(error: BaseException) -> str:
    """Return what an error of a library says, on one line and not longer than a screen's."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def file_name(name: str, what: str) -> str:
    """Return a name from outside as the name of a file or folder; raises ValueError where it could lead elsewhere.

    what: what an error calls it, such as "camera name".
    """
    if not name or name in (".", "..") or len(name.encode()) > 200 or any(c in "/\\\0" or ord(c) < 32 for c in name):
        raise ValueError(
            f"{what} {name[:80]!r} cannot be a file name: want 1 to 200 bytes without / or \\, not . or .."
        )
    return name


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


def sync_folder(folder: Path) -> None:
    """Write the files of a folder and their names through to the disk."""
    for path in (*(entry for entry in folder.iterdir() if entry.is_file()), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Write a file's or folder's contents through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
