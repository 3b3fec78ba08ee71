"""Pairs from a traced drive: measured, gated, stored, read back, and the same bytes when made again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")
pytest.importorskip("pyarrow", reason="shards need pyarrow: training environment")

from tests.training.traced_drive import GRID, KEY_NS, Block, TracedDrive

from occbev.files import file_hash
from occbev.results import CameraFrame, FrameSet
from occbev_training.data.shards import (
    LabelVolumes,
    ShardError,
    ShardReader,
    decode_label,
    encode_label,
)
from occbev_training.occupancy.labels import LabelConfig
from occbev_training.occupancy.pairs import (
    PairConfig,
    Unit,
    assign_splits,
    hold_out_ends,
    join_units,
    make_unit,
    my_share,
    units_of,
)
from occbev_training.sources.recording import RecordingError

CONFIG = PairConfig(LabelConfig(window=0.3, camera_spacing=0.02), GRID, segment=4, min_cameras=1, thorough_every=0)


class PicturedDrive(TracedDrive):
    """A traced drive with pictures; the second camera is late at the last key frame."""

    def frame_set(self, key: int) -> FrameSet:
        stamp = int(self.key_stamp_ns[key])
        picture = np.full((90, 160, 3), 40 * key, np.uint8)
        late = 200_000_000 if key == len(self.key_stamp_ns) - 1 else 0
        jpeg = bytes(cv2.imencode(".jpg", picture)[1])
        frames = {
            "FRONT": CameraFrame("FRONT", stamp + 7_000_000, jpeg),
            "BACK": CameraFrame("BACK", stamp + late, picture),
        }
        return FrameSet(stamp, frames)


def drive(name: str = "traced", **changes) -> PicturedDrive:
    made = PicturedDrive([Block((10.2, 0.0, 1.5), (0.4, 12.0, 3.0))], rings=24, columns=180, **changes)
    made.key_stamp_ns = KEY_NS + np.arange(-2, 3) * 300_000_000
    made.name = name
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    recording = drive()
    for unit in units_of(recording.name, 5, CONFIG.segment):
        make_unit(recording, unit, path, CONFIG)
    join_units(path, {"train": 1.0})
    return path


def test_labels_survive_packing_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    shape = (7, 5, 3)
    volumes = LabelVolumes(
        rng.integers(0, 3, shape).astype(np.uint8),
        rng.integers(0, 256, shape).astype(np.uint8),
        rng.integers(0, 65, shape).astype(np.uint8),
        rng.integers(0, 65, shape).astype(np.uint8),
        "0123456789ab",
    )
    back = decode_label(encode_label(volumes))
    for name in ("state", "camera_visible", "hit_sweeps", "pass_sweeps"):
        assert np.array_equal(getattr(back, name), getattr(volumes, name)), name
    assert back.grid_hash == volumes.grid_hash


@pytest.mark.parametrize("damage", [lambda d: d[:20], lambda d: d[:-9], lambda d: b"x" + d[1:], lambda d: d[:32]])
def test_a_damaged_label_is_refused(damage) -> None:
    empty = np.zeros((4, 4, 4), np.uint8)
    data = encode_label(LabelVolumes(empty, empty, empty, empty, GRID.hash))
    with pytest.raises(ShardError, match="somewhere"):
        decode_label(damage(data), "somewhere")


def test_a_unit_is_read_back_as_it_was_made(folder) -> None:
    reader = ShardReader(folder)
    recording = drive()
    assert len(reader) == 5
    keys = [f"traced/{stamp}" for stamp in recording.key_stamp_ns]
    assert [sample.key for sample in reader.stream()] == keys
    sample = reader.sample(keys[1])
    frames = recording.frame_set(1)
    assert sample.images["FRONT"] == frames.frames["FRONT"].image, "original bytes"
    picture = cv2.imdecode(np.frombuffer(sample.images["BACK"], np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(picture, frames.frames["BACK"].image), "raw pixels without loss"
    assert set(np.unique(sample.label.state)) == {0, 1, 2}
    assert sample.label.grid_hash == GRID.hash
    assert sample.calibration["cameras"]["FRONT"]["stamp_ns"] == frames.frames["FRONT"].stamp_ns
    moved = np.array(sample.calibration["cameras"]["FRONT"]["cam2ego_at_key"])
    assert np.isclose(moved[0, 3] - recording.rig["FRONT"].cam2ego[0, 3], 0.021, atol=1e-6)
    assert set(reader.sample(keys[4]).images) == {"FRONT"}, "a stale image is left out"
    assert 0.9 <= sample.meta["quality"]["q1_ends_in_occupied"] <= 1.0


def test_neighbours_in_time_cross_units(folder) -> None:
    reader = ShardReader(folder)
    keys = [row["key"] for row in reader.rows]
    assert [s.key for s in reader.history(keys[4], 2)] == keys[2:]
    assert [s.key for s in reader.history(keys[1], 5)] == keys[:2]
    assert len({row["shard"] for row in reader.rows}) == 2
    with pytest.raises(ShardError, match="nearest is"):
        reader.sample(keys[0] + "0")


def test_making_it_again_gives_the_same_bytes_and_finished_units_are_kept(folder, tmp_path) -> None:
    recording = drive()
    units = units_of(recording.name, 5, CONFIG.segment)
    for unit in reversed(units):
        make_unit(recording, unit, tmp_path, CONFIG)
    join_units(tmp_path, {"train": 1.0})
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert [file_hash(folder / n) for n in names] == [file_hash(tmp_path / n) for n in names]
    before = recording.reads
    assert make_unit(recording, units[0], tmp_path, CONFIG).samples == 4
    assert recording.reads == before, "nothing was read again"


def test_a_killed_unit_leaves_nothing_and_is_made_anew(folder, tmp_path) -> None:
    unit = Unit("traced", 0, 4)
    steps = iter(range(10))

    def killed() -> None:
        if next(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_unit(drive(), unit, tmp_path, CONFIG, killed)
    assert list(tmp_path.iterdir()) == []
    report = make_unit(drive(), unit, tmp_path, CONFIG)
    assert all(file_hash(folder / shard) == digest for shard, digest in report.shards.items())


def test_a_cut_shard_is_named_and_made_again(folder, tmp_path) -> None:
    recording = drive()
    unit = Unit("traced", 4, 5)
    report = make_unit(recording, unit, tmp_path, CONFIG)
    join_units(tmp_path, {"train": 1.0})
    shard = tmp_path / next(iter(report.shards))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    reader = ShardReader(tmp_path)
    with pytest.raises(ShardError, match=shard.name):
        list(reader.stream())
    with pytest.raises(ShardError, match=r"'traced-000004-0000.tar'\] are gone or changed"):
        join_units(tmp_path, {"train": 1.0})
    again = make_unit(recording, unit, tmp_path, CONFIG)
    assert again.shards == report.shards
    assert file_hash(shard) == report.shards[shard.name]


def test_refused_key_frames_are_counted_by_reason(tmp_path) -> None:
    still = drive(speed=0.0)
    config = dataclasses.replace(CONFIG, max_standing=1)
    assert make_unit(still, Unit("traced", 0, 5), tmp_path / "a", config).refused == {"standing": 3}
    few = dataclasses.replace(CONFIG, min_cameras=2)
    assert make_unit(drive(), Unit("traced", 4, 5), tmp_path / "b", few).refused["too_few_cameras"] == 1
    sparse = drive(sweeps=5)
    report = make_unit(sparse, Unit("traced", 0, 5), tmp_path / "c", CONFIG)
    assert report.refused == {"no_sweep_at_key": 4, "standing": 0}
    manifest = json.loads((tmp_path / "c" / "traced-000000.json").read_text())
    assert manifest["refused"] == dict(report.refused)


def test_a_label_that_observes_nothing_becomes_no_pair(tmp_path) -> None:
    """A LiDAR that is covered still sends sweeps; with one sweep for a key no other measure has anything to judge."""
    covered = PicturedDrive(ground=False, sweeps=1)
    config = dataclasses.replace(CONFIG, min_support=0.0)
    report = make_unit(covered, Unit("traced", 0, 1), tmp_path, config)
    assert report.samples == 0
    assert report.reasons == {"nothing_observed": "traced key 0: no beam of 1 sweeps crosses the grid"}


def test_more_cameras_than_a_rig_has_are_asked_for_in_vain(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, min_cameras=3)
    report = make_unit(drive(), Unit("traced", 2, 3), tmp_path, config)
    assert report.reasons == {"too_few_cameras": "traced key 2: 2 of 2 cameras, want 3"}


@pytest.mark.parametrize(
    "changes", [{"min_cameras": 0}, {"min_support": 1.5}, {"min_support": -0.1}, {"min_travel": -1.0}]
)
def test_settings_that_leave_nothing_or_mean_nothing_are_refused(changes) -> None:
    with pytest.raises(ValueError, match=r"min_cameras >= 1, min_support in 0\.\.1 and min_travel >= 0; got"):
        dataclasses.replace(CONFIG, **changes)


def test_another_configuration_makes_a_unit_anew(tmp_path) -> None:
    recording = drive()
    unit = Unit("traced", 4, 5)
    make_unit(recording, unit, tmp_path, CONFIG)
    before = recording.reads
    make_unit(recording, unit, tmp_path, dataclasses.replace(CONFIG, lidar=True))
    assert recording.reads > before
    join_units(tmp_path, {"train": 1.0})
    points = ShardReader(tmp_path).sample(f"traced/{recording.key_stamp_ns[4]}").lidar
    assert points.shape[1] == 3
    assert len(points) > 500


def test_another_input_makes_a_unit_anew(tmp_path) -> None:
    """The same name says nothing of what is in it: a longer drive, corrected clocks."""
    short, longer = Unit("traced", 0, 1), Unit("traced", 0, 2)
    make_unit(drive(), short, tmp_path, CONFIG, source="one")
    assert make_unit(drive(), longer, tmp_path, CONFIG, source="one").samples == 2
    recording = drive()
    make_unit(recording, longer, tmp_path, CONFIG, source="other")
    assert recording.reads
    make_unit(drive(), Unit("traced", 4, 5), tmp_path, CONFIG, source="one")
    with pytest.raises(ShardError, match="different inputs"):
        join_units(tmp_path, {"train": 1.0})


def test_units_cover_a_drive_once_over_all_tasks() -> None:
    units = units_of("d", 45, 10)
    assert [(u.first, u.last) for u in units] == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 45)]
    shares = [my_share(units, i, 3) for i in range(3)]
    assert sorted((u for share in shares for u in share), key=lambda u: u.first) == units
    with pytest.raises(ValueError, match="task index 3"):
        my_share(units, 3, 3)


def test_drives_that_share_a_place_share_a_split() -> None:
    def row(drive: str, x: int, location: str = "town") -> dict:
        return {"drive": drive, "location": location, "cell_x": x, "cell_y": 0}

    chain = [row(f"c{i}", x) for i in range(30) for x in (i, i + 1)]
    apart = [row(f"a{i}", 500 + 2 * i) for i in range(200)]
    same_cell_elsewhere = [row(f"e{i}", 0, f"town {i}") for i in range(200)]
    shares = {"train": 0.7, "validation": 0.3}
    splits = assign_splits(chain + apart + same_cell_elsewhere, shares)
    assert len({splits[f"c{i}"] for i in range(30)}) == 1
    for kind in "ae":
        train = np.mean([splits[f"{kind}{i}"] == "train" for i in range(200)])
        assert 0.55 < train < 0.85
    again = assign_splits((same_cell_elsewhere + apart + chain)[::-1], shares)
    assert again == splits


def test_of_drives_that_all_met_the_ends_are_held_out_and_no_sweep_is_shared() -> None:
    second = 1_000_000_000
    rows = [
        {"drive": d, "stamp_ns": n * second, "split": "train"}
        for d, length in (("a", 11), ("b", 21))
        for n in range(length)
    ]
    hold_out_ends(rows, share=0.25, window=1.0)
    of = {
        (row["drive"], row["split"]): [
            r["stamp_ns"] // second for r in rows if (r["drive"], r["split"]) == (row["drive"], row["split"])
        ]
        for row in rows
    }
    assert of["a", "validation"] == [8, 9, 10]
    assert of["a", "between"] == [6, 7]
    assert of["b", "validation"] == [16, 17, 18, 19, 20]
    assert max(of["b", "train"]) == 13, "a label at 13 s looks ahead to 14 s, one at 16 s back to 15 s"


def test_the_webdataset_library_reads_the_shards(folder) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    reader = ShardReader(folder)
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in reader.rows]
    first = reader.sample(reader.rows[0]["key"])
    assert samples[0]["cam0.jpg"] == first.images["FRONT"]
    volumes = decode_label(samples[0]["occ.bin"])
    assert np.array_equal(volumes.state, first.label.state)


def test_a_sample_tells_how_it_was_made(folder) -> None:
    reader, recording = ShardReader(folder), drive()
    meta = reader.sample(reader.rows[2]["key"]).meta
    assert meta["variant"] == reader.rows[2]["variant"] == "occbev"
    assert meta["label_free"] is True
    assert meta["window"] == 0.3
    assert meta["deskew"] == "compensated"
    assert meta["camera_dt"] == {"FRONT": 0.007, "BACK": 0.0}
    key = int(recording.key_stamp_ns[2])
    wanted = [int(s) for s in recording.sweep_stamp_ns if abs(int(s) - key) <= 300_000_000]
    assert meta["sweep_stamp_ns"] == wanted
    assert meta["grid"]["hash"] == GRID.hash
    assert meta["rig"] == recording.rig.hash


def test_a_folder_without_pairs_is_named(tmp_path) -> None:
    with pytest.raises(ShardError, match=r"no pairs here \(index.parquet\); 'occbev-train pairs' makes them"):
        ShardReader(tmp_path)


def test_a_folder_of_two_configurations_is_refused(tmp_path) -> None:
    recording = drive()
    make_unit(recording, Unit("traced", 0, 1), tmp_path, CONFIG)
    make_unit(recording, Unit("traced", 4, 5), tmp_path, dataclasses.replace(CONFIG, lidar=True))
    with pytest.raises(ShardError, match="2 configurations"):
        join_units(tmp_path, {"train": 1.0})


def test_the_published_recipe_can_be_stored_for_comparison(tmp_path) -> None:
    paper = dataclasses.replace(CONFIG, variant="occbev_paper")
    report = make_unit(drive(), Unit("traced", 0, 5), tmp_path, paper)
    assert report.samples == 5
    join_units(tmp_path, {"train": 1.0})
    reader = ShardReader(tmp_path)
    sample = reader.sample(reader.rows[0]["key"])
    assert sample.meta["variant"] == "occbev_paper"
    assert sample.meta["grid"]["frame"] == "lidar_forward"
    assert set(np.unique(sample.label.state)) == {1, 2}, "nothing is unobserved"


def test_an_image_that_is_cut_is_a_missing_camera(tmp_path) -> None:
    class Cut(PicturedDrive):
        def frame_set(self, key: int) -> FrameSet:
            frames = super().frame_set(key)
            whole = frames.frames["FRONT"]
            cut = dataclasses.replace(whole, image=whole.image[: len(whole.image) // 2])
            return FrameSet(frames.stamp_ns, {**frames.frames, "FRONT": cut})

    recording = Cut([Block((10.2, 0.0, 1.5), (0.4, 12.0, 3.0))], rings=24, columns=180)
    recording.key_stamp_ns = KEY_NS + np.arange(-2, 3) * 300_000_000
    make_unit(recording, Unit("traced", 1, 2), tmp_path, CONFIG)
    join_units(tmp_path, {"train": 1.0})
    reader = ShardReader(tmp_path)
    sample = reader.sample(reader.rows[0]["key"])
    assert set(sample.images) == {"BACK"}
    assert sample.meta["missing"]["FRONT"].startswith("broken image: cut off after")


def test_no_split_of_few_drives_stays_empty_and_none_changes_with_more() -> None:
    def rows(names: list[str]) -> list[dict]:
        return [{"drive": name, "location": name, "cell_x": 0, "cell_y": 0} for name in names]

    shares = {"train": 0.9, "validation": 0.1}
    for first in range(20):
        names = [f"drive-{first * 4 + i}" for i in range(4)]
        split = assign_splits(rows(names), shares)
        assert {"train", "validation"} == set(split.values())
        assert split == assign_splits(rows(names[::-1]), shares)
    many = [f"drive-{i}" for i in range(400)]
    held = [name for name, split in assign_splits(rows(many), shares).items() if split == "validation"]
    assert 20 < len(held) < 60
    more = assign_splits(rows([*many, "another"]), shares)
    assert all(more[name] == "validation" for name in held)
    assert set(assign_splits(rows(many), {"train": 1.0, "validation": 0.0}).values()) == {"train"}
    assert {assign_splits(rows([name]), shares)[name] for name in many} == {"train"}


def test_a_key_that_cannot_be_read_costs_no_other_and_is_tried_again(tmp_path) -> None:
    recording = drive()
    frame_set = recording.frame_set

    def fail(key: int) -> FrameSet:
        if key == 2:
            raise MemoryError("no room")
        return frame_set(key)

    recording.frame_set = fail
    unit = units_of(recording.name, 5, 5)[0]
    report = make_unit(recording, unit, tmp_path, CONFIG)
    assert report.samples == 4
    assert report.refused["unreadable"] == 1
    assert report.reasons["unreadable"] == "traced key 2: MemoryError: no room"
    recording.frame_set = frame_set
    assert make_unit(recording, unit, tmp_path, CONFIG).samples == 5


def test_an_error_of_the_code_is_told_from_bad_data_and_logged(tmp_path, caplog) -> None:
    recording = drive()
    frame_set = recording.frame_set
    recording.frame_set = lambda key: None.name if key == 2 else frame_set(key)
    with caplog.at_level("DEBUG", "occbev_training.occupancy.pairs"):
        report = make_unit(recording, Unit(recording.name, 0, 5), tmp_path, CONFIG)
    assert (report.samples, report.refused["unexpected_error"]) == (4, 1)
    assert report.reasons["unexpected_error"].startswith("traced key 2: AttributeError: 'NoneType' object")
    (traced,) = [record for record in caplog.records if record.exc_info and record.module == "pairs"]
    assert (traced.levelname, traced.exc_info[0]) == ("DEBUG", AttributeError)
    recording.frame_set = frame_set
    assert make_unit(recording, Unit(recording.name, 0, 5), tmp_path, CONFIG).samples == 5


def test_a_drive_whose_images_contradict_its_calibration_is_left_out(tmp_path, monkeypatch) -> None:
    from occbev_training.occupancy import pairs
    from occbev_training.occupancy.extrinsics import CameraVerdict, Evidence, RigVerdict

    wrong = CameraVerdict("CAM_FRONT", "rolled by 90 degrees", -0.9, Evidence())
    monkeypatch.setattr(pairs, "judge_rig", lambda recording, moments: RigVerdict((wrong,), "", 2))
    unit = Unit("traced", 0, 1)
    with pytest.raises(RecordingError, match=r"CAM_FRONT: wrong: .* rolled by 90 degrees .*--no-gate"):
        make_unit(drive(), unit, tmp_path, CONFIG)
    report = make_unit(drive(), unit, tmp_path, dataclasses.replace(CONFIG, gate=False, thorough_every=1))
    assert report.samples == 1
    assert report.rows[0]["q6_camera_alignment"] == 0.0
    assert report.calibration == {"CAM_FRONT": wrong.text}
