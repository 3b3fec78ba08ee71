"""Training pairs on disk: plain tar files in WebDataset layout, and one Parquet index over them.

The tar streams from any store; the index adds random access, neighbours in time, quality and split.
A sample's members are `<drive>/<stamp>.cam<i>.jpg`, `.calib.json`, `.meta.json` and `.occ.bin`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from occbev.files import file_hash, partial_path, replace_file

INDEX_NAME = "index.parquet"
SHARD_BYTES = 256 * 1024 * 1024
"""A shard is closed when it has grown beyond this."""

_HEADER = struct.Struct("<4sBBHHH12s8x")
_MAGIC, _VERSION = b"OCBV", 1
_JPEG = b"\xff\xd8"

LAST_BIT = 7
"""The visibility bit of the eighth camera and of all after it."""


class ShardError(ValueError):
    """A shard or index that cannot be used, naming the file and what is wrong."""


@dataclass(frozen=True)
class LabelVolumes:
    """What a stored label holds, all (X, Y, Z) uint8; see `OccupancyLabel`. grid_hash names its grid."""

    state: NDArray[np.uint8]
    camera_visible: NDArray[np.uint8]
    hit_sweeps: NDArray[np.uint8]
    pass_sweeps: NDArray[np.uint8]
    grid_hash: str


def camera_bit(number: int) -> int:
    """Return the bit of a rig's camera in `camera_visible`; those from the eighth on share the last one."""
    return min(number, LAST_BIT)


def encode_label(label: LabelVolumes) -> bytes:
    """Pack a label: 32 bytes of header, then two state planes, eight camera planes and the counts, deflated."""
    planes = [label.state & 1, label.state >> 1]
    planes += [(label.camera_visible >> bit) & 1 for bit in range(8)]
    packed = b"".join(np.packbits(plane, axis=None).tobytes() for plane in planes)
    counts = label.hit_sweeps.tobytes() + label.pass_sweeps.tobytes()
    header = _HEADER.pack(_MAGIC, _VERSION, 1, *label.state.shape, label.grid_hash.encode())
    return header + zlib.compress(packed + counts, 6)


def decode_label(data: bytes, where: str = "label") -> LabelVolumes:
    """Unpack `encode_label`; raises ShardError naming `where` and what is wrong."""
    try:
        magic, version, codec, *shape, grid_hash = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION or codec != 1:
            raise ShardError(
                f"{where}: not a version {_VERSION} label (magic {magic!r}, version {version}, codec {codec})"
            )
        size = int(np.prod(shape))
        plane = (size + 7) // 8
        expected = 10 * plane + 2 * size
        raw = zlib.decompressobj().decompress(data[_HEADER.size :], expected + 1)
    except (struct.error, zlib.error) as error:
        raise ShardError(f"{where}: {error}") from error
    if len(raw) != expected:
        raise ShardError(f"{where}: {len(raw)} bytes unpacked, a {shape} label has {expected}")
    bits = np.frombuffer(raw, np.uint8, 10 * plane).reshape(10, plane)
    planes = np.unpackbits(bits, axis=1, count=size)
    visible = np.packbits(planes[2:], axis=0, bitorder="little")[0]
    counts = np.frombuffer(raw, np.uint8, 2 * size, 10 * plane).reshape(2, size)
    state, hits, passes = planes[0] | planes[1] << 1, *counts
    return LabelVolumes(
        state.reshape(shape), visible.reshape(shape), hits.reshape(shape), passes.reshape(shape), grid_hash.decode()
    )


@dataclass(frozen=True)
class PairSample:
    """One key frame of a shard.

    images: camera name -> encoded bytes; a missing camera has no entry. calibration, meta: plain
    values, see `occupancy.pairs`. lidar: (M, 3) float32 in ego at the key time, if stored.
    """

    key: str
    images: Mapping[str, bytes]
    calibration: Mapping[str, Any]
    meta: Mapping[str, Any]
    label: LabelVolumes
    lidar: NDArray[np.float32] | None = None


def sample_members(sample: PairSample) -> dict[str, bytes]:
    """Return a sample's files by suffix, in the order in which they are written."""
    members: dict[str, bytes] = {}
    for number, name in enumerate(sample.calibration["order"]):
        if name in sample.images:
            data = sample.images[name]
            kind = "jpg" if data.startswith(_JPEG) else "png"
            members[f"cam{number}.{kind}"] = data
    members["calib.json"] = _json(sample.calibration)
    if sample.lidar is not None:
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(sample.lidar, np.float32))
        members["lidar.npy"] = buffer.getvalue()
    members["meta.json"] = _json(sample.meta)
    members["occ.bin"] = encode_label(sample.label)
    return members


def sample_from_members(key: str, members: Mapping[str, bytes], where: str) -> PairSample:
    """Turn a sample's files back; raises ShardError naming what is missing or broken."""
    try:
        calibration = json.loads(members["calib.json"])
        meta = json.loads(members["meta.json"])
        label = decode_label(members["occ.bin"], f"{where}: {key}.occ.bin")
        order = calibration["order"]
        images = {order[int(name[3:].split(".")[0])]: data for name, data in members.items() if name.startswith("cam")}
        lidar = members.get("lidar.npy")
        points = None if lidar is None else np.load(io.BytesIO(lidar), allow_pickle=False)
    except ShardError:
        raise
    except (KeyError, IndexError, ValueError) as error:
        raise ShardError(f"{where}: sample {key}: {type(error).__name__}: {error}") from error
    return PairSample(key, images, calibration, meta, label, points)


class ShardWriter:
    """Writes samples of one unit of work to tar files that appear only when they are complete."""

    def __init__(self, folder: Path, name: str, shard_bytes: int = SHARD_BYTES) -> None:
        """name: prefix of the shards; a shard holds samples of one writer only."""
        self.folder, self.name, self.shard_bytes = folder, name, shard_bytes
        self.rows: list[dict[str, Any]] = []
        self.shards: dict[str, str] = {}
        self._stream: IO[bytes] | None = None
        self._tar: tarfile.TarFile | None = None

    def add(self, sample: PairSample, row: Mapping[str, Any]) -> None:
        """Append one sample; `row` holds further columns of its index entry."""
        if self._tar is None:
            self._open()
        assert self._tar is not None
        assert self._stream is not None
        start = self._stream.tell()
        for suffix, data in sample_members(sample).items():
            info = tarfile.TarInfo(f"{sample.key}.{suffix}")
            info.size, info.mode = len(data), 0o644  # owner and time stay 0: same input, same bytes
            self._tar.addfile(info, io.BytesIO(data))
        length = self._stream.tell() - start
        place = {"key": sample.key, "shard": self._shard, "offset": start, "length": length}
        self.rows.append({**place, **row})
        if self._stream.tell() >= self.shard_bytes:
            self._close()

    def finish(self) -> None:
        """Close the last shard."""
        if self._tar is not None:
            self._close()

    def abort(self) -> None:
        """Drop the shard that is being written."""
        if self._stream is not None:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)
            self._stream = self._tar = None

    def _open(self) -> None:
        self._shard = f"{self.name}-{len(self.shards):04d}.tar"
        self._temporary = partial_path(self.folder / self._shard)
        self._stream = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def _close(self) -> None:
        assert self._tar is not None
        assert self._stream is not None
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self.shards[self._shard] = file_hash(self._temporary)
        self._temporary.replace(self.folder / self._shard)
        self._stream = self._tar = None


def write_index(folder: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Write the index of finished shards, sorted, with neighbours in time; returns the number of samples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise ShardError(f"{folder}: no finished sample to index")
    ordered = sorted((dict(row) for row in rows), key=lambda row: (row["drive"], row["stamp_ns"]))
    for number, row in enumerate(ordered):
        before, after = ordered[max(0, number - 1)], ordered[min(number + 1, len(ordered) - 1)]
        row["previous"] = before["key"] if before is not row and before["drive"] == row["drive"] else None
        row["next"] = after["key"] if after is not row and after["drive"] == row["drive"] else None
    names = list(dict.fromkeys(name for row in ordered for name in row))
    table = pa.table({name: [row.get(name) for row in ordered] for name in names})
    with replace_file(folder / INDEX_NAME) as temporary:
        pq.write_table(table, temporary)
    return len(ordered)


class ShardReader:
    """Reads a folder of shards: one sample by key, neighbours in time, or all in storage order."""

    def __init__(self, folder: Path) -> None:
        """Open the index; raises ShardError where it is absent or unreadable."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder = folder
        try:
            self.rows: list[dict[str, Any]] = pq.read_table(folder / INDEX_NAME).to_pylist()
        except FileNotFoundError as error:
            raise ShardError(f"{folder}: no pairs here ({INDEX_NAME}); 'occbev-train pairs' makes them") from error
        except (OSError, pa.ArrowInvalid) as error:
            raise ShardError(f"{folder / INDEX_NAME}: {error}") from error

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _row(self) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in self.rows}

    def row(self, key: str) -> Mapping[str, Any]:
        """Return a sample's index entry; raises ShardError, naming a near key, if there is none."""
        if key not in self._row:
            import difflib

            near = difflib.get_close_matches(key, self._row, 1)
            hint = f"; nearest is {near[0]}" if near else ""
            raise ShardError(f"{self.folder}: no sample {key!r} among {len(self.rows)}{hint}")
        return self._row[key]

    def sample(self, key: str) -> PairSample:
        """Read one sample with one seek; raises ShardError where the shard is damaged."""
        row = self.row(key)
        path = self.folder / row["shard"]
        try:
            with path.open("rb") as stream:
                stream.seek(row["offset"])
                data = stream.read(row["length"])
        except OSError as error:
            raise ShardError(f"{path}: {error}") from error
        if len(data) != row["length"]:
            raise ShardError(f"{path}: sample {key} is cut: {len(data)} of {row['length']} bytes at {row['offset']}")
        samples = list(read_tar(io.BytesIO(data), str(path)))
        if len(samples) != 1 or samples[0].key != key:
            raise ShardError(f"{path}: found {[s.key for s in samples]} where the index has {key}")
        return samples[0]

    def history(self, key: str, before: int) -> list[PairSample]:
        """Return up to `before` samples that precede `key` in its drive, oldest first, then `key` itself."""
        keys = [key]
        while len(keys) <= before and (previous := self.row(keys[0])["previous"]) is not None:
            keys.insert(0, previous)
        return [self.sample(k) for k in keys]

    def stream(self, split: str | None = None) -> Iterator[PairSample]:
        """Read every shard from front to back; `split` leaves out samples of other splits."""
        for shard in dict.fromkeys(row["shard"] for row in self.rows):
            wanted = {row["key"] for row in self.rows if row["shard"] == shard and split in (None, row["split"])}
            if wanted:
                with (self.folder / shard).open("rb") as stream:
                    for sample in read_tar(stream, str(self.folder / shard)):
                        if sample.key in wanted:
                            yield sample


def read_tar(stream: IO[bytes], where: str) -> Iterator[PairSample]:
    """Read the samples of a tar stream in order; raises ShardError where it is cut or damaged."""
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                name, _, suffix = info.name.rpartition("/")[2].partition(".")
                found = f"{info.name.rpartition('/')[0]}/{name}"
                if members and found != key:
                    yield sample_from_members(key, members, where)
                    members = {}
                key = found
                member = archive.extractfile(info)
                data = b"" if member is None else member.read()
                if len(data) != info.size:
                    raise ShardError(f"{where}: {info.name} has {len(data)} of {info.size} bytes")
                members[suffix] = data
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{where}: {error}") from error
    if members:
        yield sample_from_members(key, members, where)


def _json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
