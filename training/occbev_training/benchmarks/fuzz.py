"""Thousands of damaged and hostile inputs in one process: each must be read, or refused in one line, quickly.

Inputs are made here, then bytes are changed, cut, repeated or replaced by values that readers stumble over. A refusal
is an error that commands print as one line (`ValueError`, `LookupError`, `OSError`); any other is a traceback.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import yaml

from occbev.config import ImageConfig, to_record
from occbev.files import file_hash
from occbev.grid import BevGrid, VoxelGrid
from occbev.inference.backend import load_backend
from occbev.inference.families.lift_splat import LiftSplatModel
from occbev.inference.model_package import ModelPackage, write_package
from occbev.inference.preprocess import Preprocessor
from occbev.messages.bags import BagMessage, BagReader, BagWriter, type_store
from occbev.messages.readers import compressed_from_message
from occbev.results import CameraFrame
from occbev.rig import Camera, CameraRig
from occbev_training.metrics.nuscenes_results import read_results
from occbev_training.metrics.occ3d_results import read_occupancy, write_occupancy

COUNTS: Mapping[str, int] = {"images": 10_000, "rigs": 10_000, "results": 10_000, "packages": 1_000, "bags": 1_000}
"""Kind of input -> how many are tried."""

HANG_S = 10
"""An input that takes longer is a hang."""

VALUES: tuple[Any, ...] = (
    float("nan"),
    float("inf"),
    -1,
    0,
    1e300,
    10**20,
    2**31,
    "",
    "text",
    "../up",
    None,
    True,
    [],
    {},
    [[]],
    "\x00",
    "9" * 5000,
)
"""What takes the place of values in YAML and JSON."""


class HangError(BaseException):
    """An input took too long; no `except Exception` on the way catches it."""


@dataclass
class Outcome:
    """What became of the inputs of one kind. tracebacks, hangs: seed -> what happened, the first of each kind."""

    tried: int = 0
    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    tracebacks: dict[str, int] = field(default_factory=dict)
    hangs: list[int] = field(default_factory=list)
    slowest_s: float = 0.0
    grown_mb: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether every input was read or refused, and both happened."""
        return not self.tracebacks and not self.hangs and (self.tried < 100 or 0 < self.read < self.tried)


def fuzz(kind: str, count: int, folder: Path, seed: int = 0) -> Outcome:
    """Try `count` damaged inputs of a kind of COUNTS in a folder for them; input i of a seed is always the same."""
    attempt, outcome = _KINDS[kind](folder), Outcome()
    before = _resident_mb()
    for number in range(count):
        begun = time.perf_counter()
        _try(attempt, random.Random(f"{seed} {kind} {number}"), number, outcome)
        outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - begun)
    outcome.grown_mb = _resident_mb() - before
    return outcome


def _try(attempt: Callable[[random.Random], None], rng: random.Random, number: int, outcome: Outcome) -> None:
    outcome.tried += 1
    try:
        with _alarm():
            attempt(rng)
        outcome.read += 1
    except HangError:
        outcome.hangs.append(number)
    except (ValueError, LookupError, OSError) as error:
        outcome.refused[type(error).__name__] += 1
        if "\n" in str(error):
            outcome.tracebacks.setdefault(f"{type(error).__name__} of several lines: {str(error)[:200]}", number)
    except Exception as error:  # what this looks for
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        outcome.tracebacks.setdefault(f"{type(error).__name__} at {place}: {str(error)[:200]}", number)


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- damage --------------------------------------------------------------------------------------


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or append bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(0, 12)):
        changed[rng.randrange(min(len(changed), rng.choice((64, 1024, len(changed)))))] = rng.choice(
            (0, 0xFF, 0x7F, rng.randrange(256))
        )
    if rng.random() < 0.3:
        del changed[rng.randint(0, len(changed)) :]
    if rng.random() < 0.1:
        start = rng.randint(0, len(changed))
        changed[start:start] = changed[start : start + rng.randint(0, 2000)] * rng.randint(1, 50)
    if rng.random() < 0.1:
        changed += rng.randbytes(rng.randint(0, 200))
    return bytes(changed)


def damage_values(value: Any, rng: random.Random) -> Any:
    """Return plain values with some replaced by others, left out or there twice."""
    share = rng.choice((0.0, 0.02, 0.1))

    def change(entry: Any) -> Any:
        if rng.random() < share:
            return rng.choice(VALUES)
        if isinstance(entry, dict):
            return {key: change(item) for key, item in entry.items() if rng.random() >= share / 4}
        if isinstance(entry, list):
            items = [change(item) for item in entry if rng.random() >= share / 4]
            return items * (2 if rng.random() < share / 4 else 1)
        return entry

    return change(value)


def _damage_text(record: Any, dump: Callable[[Any], str], rng: random.Random) -> bytes:
    text = dump(damage_values(record, rng)).encode("utf-8", "surrogatepass")
    return damage_bytes(text, rng) if rng.random() < 0.2 else text


# --- the kinds: each makes its originals and returns what tries one ---------------------------------


def _images(folder: Path) -> Callable[[random.Random], None]:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    originals = [
        cv2.imencode(".jpg", pixels)[1].tobytes(),
        cv2.imencode(".jpg", pixels, progressive)[1].tobytes(),
        cv2.imencode(".png", pixels)[1].tobytes(),
    ]
    camera, preprocessor = _camera("A"), Preprocessor(ImageConfig(width=64, height=32))

    def attempt(rng: random.Random) -> None:
        message = SimpleNamespace(format="jpeg", data=damage_bytes(rng.choice(originals), rng))
        frame = CameraFrame("A", 0, compressed_from_message(message))
        preprocessor.decode(frame, camera)

    return attempt


def _rigs(folder: Path) -> Callable[[random.Random], None]:
    fisheye = replace(_camera("B"), distortion_model="equidistant", distortion=(0.1, 0.0, 0.0, 0.0))
    record = {"cameras": [_camera("A").as_record(), fisheye.as_record()]}
    path = folder / "rig.yaml"

    def attempt(rng: random.Random) -> None:
        path.write_bytes(_damage_text(record, _to_yaml, rng))
        CameraRig.load(path)

    return attempt


def _results(folder: Path) -> Callable[[random.Random], None]:
    box = {
        "sample_token": "a",
        "translation": [1.0, 2.0, 3.0],
        "size": [1.9, 4.5, 1.6],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 1.0],
        "detection_name": "car",
        "detection_score": 0.5,
        "attribute_name": "vehicle.moving",
    }
    record = {"meta": {"use_camera": True}, "results": {"a": [box, box], "b": []}}
    path, shape = folder / "results.json", (10, 10, 4)
    voxels = write_occupancy(folder / "voxels", "a", np.zeros(shape, np.uint8))
    whole = voxels.read_bytes()

    def attempt(rng: random.Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(_damage_text(record, json.dumps, rng))
            read_results(path)
        else:
            voxels.write_bytes(damage_bytes(whole, rng))
            read_occupancy(voxels.parent, "a", shape)

    return attempt


def _packages(folder: Path) -> Callable[[random.Random], None]:
    package = folder / "package"
    package.mkdir(parents=True)
    model = replace(
        LiftSplatModel(),
        name="fuzzed",
        image=ImageConfig(width=64, height=32),
        bev=BevGrid((-4.0, -4.0), (1.0, 1.0), (8, 8)),
        grid=VoxelGrid((-4.0, -4.0, -1.0), (1.0, 1.0, 1.0), (8, 8, 4)),
    )
    _write_graph(package, len(model.detection_classes))
    write_package(package, model, {"data": "none"}, {})
    files = {path.name: path.read_bytes() for path in package.iterdir()}
    record = yaml.safe_load(files["config.yaml"]) | {"model": to_record(model)}

    def attempt(rng: random.Random) -> None:
        shutil.rmtree(package)
        package.mkdir()
        hit = rng.choice(sorted(files))
        for name, data in files.items():
            (package / name).write_bytes(damage_bytes(data, rng) if name == hit != "config.yaml" else data)
        hashes = {name: file_hash(package / name) for name in files if name != "config.yaml"}
        own = record | {"files": hashes if rng.random() < 0.8 else record["files"]}
        text = _damage_text(own, _to_yaml, rng) if hit == "config.yaml" else _to_yaml(own).encode()
        (package / "config.yaml").write_bytes(text)
        load_backend(ModelPackage.load(package), 2, "openvino")

    return attempt


def _bags(folder: Path) -> Callable[[random.Random], None]:
    with BagWriter(folder / "whole") as writer:
        for message in _bag_messages():
            writer.write(message)
    files = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    metadata = yaml.safe_load(files["metadata.yaml"])
    bag = folder / "bag"

    def attempt(rng: random.Random) -> None:
        shutil.rmtree(bag, ignore_errors=True)
        bag.mkdir()
        hit = rng.choice(sorted(files))
        for name, data in files.items():
            (bag / name).write_bytes(damage_bytes(data, rng) if name == hit else data)
        if hit == "metadata.yaml":
            (bag / hit).write_bytes(_damage_text(metadata, _to_yaml, rng))
        with BagReader(bag) as reader:
            for message in reader.messages():
                reader.decode(message)

    return attempt


_KINDS: Mapping[str, Callable[[Path], Callable[[random.Random], None]]] = {
    "images": _images,
    "rigs": _rigs,
    "results": _results,
    "packages": _packages,
    "bags": _bags,
}


def _camera(name: str) -> Camera:
    return Camera(name, 64, 48, np.array([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]), np.eye(4))


def _to_yaml(record: Any) -> str:
    """Dump without aliases, which are refused at once."""

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return str(yaml.dump(record, Dumper=Plain, sort_keys=False))


def _write_graph(folder: Path, classes: int) -> None:
    """Write a network that answers zeros, as OpenVINO's XML and weights."""
    import openvino
    from openvino import opset13 as ops

    images = ops.parameter(openvino.PartialShape([1, -1, 3, 32, 64]), np.float32, name="images")
    table = ops.parameter([10], np.int32, name="table_cell")
    mean = ops.reduce_mean(images, np.array([1, 2, 3, 4]), keep_dims=True)  # (1, 1, 1, 1, 1)
    scalar = ops.squeeze(mean, np.array([4]))
    maps = {}
    for name, channels in (("heatmap", classes), ("box", 10)):
        weights = np.random.default_rng(0).normal(size=(1, channels, 8, 8)).astype(np.float32)
        maps[name] = ops.multiply(scalar, ops.constant(weights))
        maps[name].output(0).get_tensor().set_names({name})
    unused = ops.result(table.output(0))
    graph = openvino.Model([*map(ops.result, maps.values()), unused], [images, table], "fuzzed")
    openvino.save_model(graph, folder / "model.xml", compress_to_fp16=False)


def _bag_messages() -> Iterator[BagMessage]:
    store = type_store()
    types = store.types
    time_type, header_type = types["builtin_interfaces/msg/Time"], types["std_msgs/msg/Header"]
    jpeg = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].ravel()
    for number in range(20):
        header = header_type(time_type(1, number), "camera")
        image = types["sensor_msgs/msg/CompressedImage"](header, "jpeg", jpeg)
        text = types["std_msgs/msg/String"]("a" * number)
        for topic, message in (("/camera/image/compressed", image), ("/note", text)):
            data = store.serialize_cdr(message, message.__msgtype__)
            yield BagMessage(topic, message.__msgtype__, 1000 + number, bytes(data))
