"""Roots that people write themselves: own categories, T4 layout, versions, columns, tokens; right, or one line."""

from __future__ import annotations

import argparse
import codecs
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from occbev.cli.overlay import _recordings
from occbev_training.sources.categories import class_of, read_class_map
from occbev_training.sources.discovery import OpenScene, find_recordings, read_names, search_recordings
from occbev_training.sources.nuscenes import RootOptions, find_tables, open_nuscenes
from occbev_training.sources.nuscenes_writer import write_nuscenes
from occbev_training.sources.recording import RecordingError, require_beam_origin

VERSION = "v1.0-sim"


@pytest.fixture
def root(tmp_path: Path, tiny_recording: Any) -> Path:
    write_nuscenes([tiny_recording], tmp_path / "root")
    return tmp_path / "root"


def edit(root: Path, table: str, change: Callable[[list[dict[str, Any]]], Any], folder: str = VERSION) -> None:
    """Change the rows of a table in place, or return other ones."""
    path = root / folder / f"{table}.json"
    rows = json.loads(path.read_text())
    changed = change(rows)
    path.write_text(json.dumps(rows if changed is None else changed))


def rename_category(root: Path, name: str) -> None:
    edit(root, "category", lambda rows: [row | {"name": name} if row["name"] == "vehicle.car" else row for row in rows])


def as_t4(root: Path, target: Path) -> Path:
    """Write a root anew as T4 has it: tables in annotation/, files by number in data/, a cloud in base_link."""
    target.mkdir(parents=True)
    recording = open_nuscenes(root).recordings()[0]
    shutil.copytree(root / VERSION, target / "annotation")
    numbers: Counter[str] = Counter()

    def move(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            source = root / row["filename"]
            channel = source.parent.name.replace("LIDAR_TOP", "LIDAR_CONCAT")
            ending = "pcd.bin" if channel.startswith("LIDAR") else "jpg"
            row["filename"] = f"data/{channel}/{numbers[channel]}.{ending}"
            numbers[channel] += 1
            place = target / row["filename"]
            place.parent.mkdir(parents=True, exist_ok=True)
            data = source.read_bytes()
            if channel.startswith("LIDAR"):
                values = np.frombuffer(data, "<f4").reshape(-1, 5).copy()
                values[:, :3] = values[:, :3] @ recording.lidar2ego[:3, :3].T + recording.lidar2ego[:3, 3]
                values[:, 4] = -1
                data = values.tobytes()
            place.write_bytes(data)

    edit(target, "sample_data", move, "annotation")
    channels: dict[str, str] = {}

    def rename(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["channel"] = row["channel"].replace("LIDAR_TOP", "LIDAR_CONCAT")
            channels[row["token"]] = row["channel"]

    edit(target, "sensor", rename, "annotation")

    def calibrate(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            is_lidar = channels[row["sensor_token"]] == "LIDAR_CONCAT"
            row["camera_distortion"] = [] if is_lidar else [0.1, -0.02, 0.001, 0.0, 0.0]
            if is_lidar:
                row["translation"], row["rotation"] = [0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]

    edit(target, "calibrated_sensor", calibrate, "annotation")
    return target


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("car", "car"),
        ("Car", "car"),
        ("vehicle.car", "car"),
        ("vehicle.bus", "bus"),
        ("vehicle.bus.bendy", "bus"),
        ("construction vehicle", "construction_vehicle"),
        ("pedestrian.adult", "pedestrian"),
        ("police_officer", "pedestrian"),
        ("forklift", None),
        ("static_object.bicycle_rack", None),
    ],
)
def test_a_category_is_the_class_that_it_names(category: str, name: str | None) -> None:
    assert class_of(category) == name


def test_own_categories_have_the_class_that_a_file_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text("forklift: construction_vehicle\nCar: truck\nanimal: null\n")
    own = read_class_map(path)
    assert [class_of(name, own) for name in ("forklift", "Car", "animal")] == ["construction_vehicle", "truck", None]
    path.write_text("forklift: lorry\n")
    with pytest.raises(RecordingError, match=r"classes\.yaml: forklift: 'lorry' is no class; classes are"):
        read_class_map(path)


def test_boxes_are_read_by_class_and_the_others_are_counted(root: Path) -> None:
    rename_category(root, "car")
    assert (open_nuscenes(root).recordings()[0].annotations(0).boxes.label == 0).sum() == 1
    rename_category(root, "vehicle.car")
    edit(root, "category", lambda rows: [row | {"name": "forklift"} if row["name"] == "car" else row for row in rows])
    recording = open_nuscenes(root).recordings()[0]
    assert not (recording.annotations(0).boxes.label == 0).any()
    assert recording.classless == {"forklift": 4}
    mapped = open_nuscenes(root, options=RootOptions(classes=(("forklift", "car"),))).recordings()[0]
    assert (mapped.annotations(0).boxes.label == 0).sum() == 1
    assert not mapped.classless


def test_a_t4_root_is_read_as_the_same_drive(root: Path, tmp_path: Path) -> None:
    t4 = as_t4(root, tmp_path / "t4")
    (opener,) = find_recordings(t4)
    given, read = open_nuscenes(root).recordings()[0], opener()
    assert list(read.key_stamp_ns) == list(given.key_stamp_ns)
    assert read.rig.names == given.rig.names
    assert read.rig["CAM_FRONT"].distortion_model == "plumb_bob"
    assert read.frame_set(0).cameras == given.frame_set(0).cameras
    np.testing.assert_allclose(read.annotations(1).boxes.box, given.annotations(1).boxes.box, atol=1e-5)
    with pytest.raises(RecordingError, match="clouds are in base_link itself.*--lidar-origin X Y Z"):
        require_beam_origin(read)
    inside = given.sweep(3).points @ given.lidar2ego[:3, :3].T + given.lidar2ego[:3, 3]
    np.testing.assert_allclose(read.sweep(3).points, inside, atol=1e-5)
    origin = tuple(given.lidar2ego[:3, 3])
    placed = open_nuscenes(t4, options=RootOptions(lidar_origin=origin)).recordings()[0]
    np.testing.assert_allclose(placed.lidar2ego[:3, 3], origin)
    np.testing.assert_allclose(placed.sweep(3).points + np.float32(origin), inside, atol=1e-5)
    require_beam_origin(placed)
    with pytest.raises(RecordingError, match="--lidar-origin is for clouds in base_link"):
        open_nuscenes(root, options=RootOptions(lidar_origin=origin)).recordings()


def test_an_overlay_takes_t4_roots_with_and_without_a_version(root: Path, tmp_path: Path) -> None:
    t4 = as_t4(root, tmp_path / "t4")
    shutil.copytree(t4, tmp_path / "versions" / "0")
    for place in (t4, tmp_path / "versions"):
        (recording,) = _recordings(argparse.Namespace(source=place, scene=None, version=None))
        assert len(recording.key_stamp_ns) == 4


def test_rows_that_t4_marks_as_not_valid_are_missing(root: Path, tmp_path: Path) -> None:
    t4 = as_t4(root, tmp_path / "t4")

    def invalidate(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if "CAM_BACK" in row["filename"] and row["is_key_frame"])["is_valid"] = False

    edit(t4, "sample_data", invalidate, "annotation")
    recording = find_recordings(t4)[0]()
    assert sum("CAM_BACK" in recording.frame_set(key).missing for key in range(4)) == 1


def test_a_version_is_chosen_where_there_are_several(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / VERSION, root / "v1.1-sim")
    edit(root, "scene", lambda rows: [row | {"name": "other"} for row in rows], "v1.1-sim")
    with pytest.raises(RecordingError, match=r"found \['v1.0-sim', 'v1.1-sim'\]; give --version"):
        find_recordings(root)
    assert [o.name for o in find_recordings(root, root_options=RootOptions("v1.1-sim"))] == ["other"]

    for number in ("0", "1"):
        as_t4_folder = tmp_path / "t4" / number
        shutil.copytree(root / VERSION, as_t4_folder / "annotation")
    assert [place.version for place in find_tables(tmp_path / "t4")] == ["0", "1"]
    with pytest.raises(RecordingError, match="give --version"):
        open_nuscenes(tmp_path / "t4")
    assert open_nuscenes(tmp_path / "t4", "1").path == tmp_path / "t4" / "1"


def test_a_folder_of_t4_sets_is_a_list_of_drives(root: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        t4 = as_t4(root, tmp_path / "sets" / name)
        edit(t4, "scene", lambda rows, name=name: [row | {"name": name} for row in rows], "annotation")
        (t4 / "input_bag").mkdir()
        (t4 / "input_bag" / "metadata.yaml").write_text("")
    assert [opener.name for opener in find_recordings(tmp_path / "sets")] == ["one", "two"]


def test_a_place_that_cannot_be_listed_costs_no_other(root: Path, tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    as_t4(root, sets / "good")
    as_t4(root, sets / "broken")
    (sets / "broken" / "annotation" / "scene.json").write_text("[{")
    (sets / "round").symlink_to(sets)
    found, problems = search_recordings(sets)
    assert [opener.name for opener in found] == ["tiny-0"]
    assert list(problems) == [str(sets / "broken")]
    assert "scene.json: not a table" in problems[str(sets / "broken")]
    with pytest.raises(RecordingError, match=r"scene\.json: not a table"):
        find_recordings(sets)


def test_equal_calibrations_may_have_several_tokens_but_not_differ(root: Path) -> None:
    def renew(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*rows, *(row | {"token": row["token"] + "-again"} for row in rows)]

    def use(rows: list[dict[str, Any]]) -> None:
        for row in rows[::2]:
            row["calibrated_sensor_token"] += "-again"

    edit(root, "calibrated_sensor", renew)
    edit(root, "sample_data", use)
    assert len(open_nuscenes(root).recordings()[0].rig) == 3

    def move(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["token"].endswith("-again"):
                row["translation"][0] += 0.01

    edit(root, "calibrated_sensor", move)
    with pytest.raises(RecordingError, match="two calibrations"):
        open_nuscenes(root).recordings()


def test_a_token_is_there_once(root: Path) -> None:
    edit(root, "sample_annotation", lambda rows: [*rows, rows[2]])
    with pytest.raises(RecordingError, match=r"sample_annotation\.json: 1 rows repeat a token, first"):
        open_nuscenes(root)


def scan(columns: int) -> np.ndarray:
    """Points in the order of a turning sensor, with intensity, ring and time as far as there are columns."""
    azimuth = np.repeat(np.linspace(0, 2 * np.pi, 200, endpoint=False), 10)
    elevation = np.tile(np.linspace(-0.4, 0.1, 10), 200)
    reach = 12 + 3 * np.sin(3 * azimuth)
    rows = np.stack(
        [
            reach * np.cos(azimuth),
            reach * np.sin(azimuth),
            reach * np.tan(elevation),
            20 + 5 * np.cos(azimuth),
            np.tile(np.arange(10.0), 200),
            azimuth / 60,
        ],
        1,
    )
    return rows[:, :columns].astype("<f4")


@pytest.mark.parametrize("columns", [3, 4, 6])
def test_files_of_another_column_count_are_refused_and_read_when_told(root: Path, columns: int) -> None:
    for path in root.glob("s*/LIDAR_TOP/*.bin"):
        scan(columns).tofile(path)
    with pytest.raises(
        RecordingError, match=rf"LIDAR_TOP.*rows look like {columns} float32, not 5; give --lidar-columns"
    ):
        open_nuscenes(root).recordings()[0].sweep(0)
    sweep = open_nuscenes(root, options=RootOptions(lidar_columns=columns)).recordings()[0].sweep(0)
    np.testing.assert_array_equal(sweep.points, scan(columns)[:, :3])
    assert (sweep.intensity is None) == (columns == 3)


def test_files_of_five_columns_stay_so_whatever_the_fifth_is(root: Path) -> None:
    timed = scan(6)[:, [0, 1, 2, 3, 5]]
    for rows in (scan(5), timed):
        for path in root.glob("s*/LIDAR_TOP/*.bin"):
            np.ascontiguousarray(rows).tofile(path)
        np.testing.assert_array_equal(open_nuscenes(root).recordings()[0].sweep(0).points, rows[:, :3])


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b""])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, mark: bytes) -> None:
    text = "tiny-0\r\n# none\r\ntiny-1\r\n"
    (tmp_path / "scenes.txt").write_bytes(mark + text.encode("utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-8"))
    assert read_names(tmp_path / "scenes.txt") == ("tiny-0", "tiny-1")


def test_the_fingerprint_of_a_scene_covers_tables_and_files(root: Path) -> None:
    first = OpenScene(root, "tiny-0").fingerprint
    assert OpenScene(root, "tiny-0").fingerprint == first
    path = sorted(root.glob("sweeps/LIDAR_TOP/*.bin"))[0]
    values = np.fromfile(path, "<f4") + np.float32(7)
    values.tofile(path)
    second = OpenScene(root, "tiny-0").fingerprint
    text = (root / VERSION / "calibrated_sensor.json").read_text()
    (root / VERSION / "calibrated_sensor.json").write_text(text.replace("1.5", "1.4", 1))
    third = OpenScene(root, "tiny-0").fingerprint
    assert len({first, second, third}) == 3
