"""The pairs, view and bag-check commands, from a small bag to a picture."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("numba", reason="the label kernels need numba: training environment")
pytest.importorskip("pyarrow", reason="shards need pyarrow: training environment")
pytest.importorskip("rosbags", reason="bags are read with rosbags")

from occbev.classes import OCCUPIED_STATE
from occbev.cli import main as occbev_main
from occbev.cli.view import pair_moments
from occbev.config import ImageConfig
from occbev.files import file_hash
from occbev.grid import GRIDS
from occbev.messages.bags import BagMessage, BagReader, BagWriter
from occbev.rig import CameraRig
from occbev_training.cli import main
from occbev_training.cli.inputs import split_output
from occbev_training.data.pair_samples import open_pairs
from occbev_training.data.shards import ShardReader
from occbev_training.evaluation.frames import Prediction
from occbev_training.evaluation.reconstruction import reconstruct, reconstruction_picture
from occbev_training.sources.bag_index import BagOptions
from occbev_training.sources.bag_writer import write_bag
from occbev_training.sources.clocks import ClockCorrection
from occbev_training.sources.discovery import OpenBag, Simulate, find_recordings
from occbev_training.sources.nuscenes_writer import write_nuscenes
from occbev_training.sources.recording import RecordingError


@pytest.fixture(scope="module")
def bags(tmp_path_factory) -> Path:
    from tests.training.conftest import TinyRecording

    root = tmp_path_factory.mktemp("drives")
    write_bag(TinyRecording(keys=3), root / "first")
    return root


def test_a_folder_of_bags_becomes_pairs_and_a_picture(bags, tmp_path, capsys) -> None:
    out = tmp_path / "pairs"
    # The tiny drive's clouds are noise: labels of it break the limits, which must show, not stop it here.
    arguments = [
        "pairs",
        str(out),
        str(bags),
        "--grid",
        "tiny",
        "--window",
        "0.3",
        "--min-support",
        "0.2",
        "--json",
    ]
    assert main([*arguments, "--no-gate"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["samples"] >= 2
    assert sum(record["splits"].values()) == record["samples"]
    assert record["quality"]["q7_ego_leak"]["measured"] == record["samples"]
    assert main(["view", str(out), "--pair", "0", "--picture", str(tmp_path / "pair.png")]) == 0
    assert cv2.imread(str(tmp_path / "pair.png")).shape[1] > 500
    assert main(["view", str(out), "--pair", "nothing/1", "--picture", str(tmp_path / "x.png")]) == 2
    assert main(["view", str(bags), "--picture", str(tmp_path / "x.png")]) == 2
    assert "--pair and --picture need a folder of pairs" in capsys.readouterr().err
    moments = list(pair_moments(out))
    assert len(moments) == record["samples"]
    first, sample = moments[0], ShardReader(out).sample(ShardReader(out).rows[0]["key"])
    assert first.stamp_ns == int(sample.key.split("/")[1])
    assert (first.true_occupancy.state == sample.label.state).all()
    assert not first.true_occupancy.has_classes
    assert set(first.rig.names) == set(first.images) == set(sample.images)
    assert len(list(pair_moments(out, sample.key))) == 1


def test_pairs_are_shown_by_both_commands(bags, tmp_path, capsys) -> None:
    pytest.importorskip("rerun", reason="needs the extra view")
    out = tmp_path / "pairs"
    main(["pairs", str(out), str(bags), "--grid", "tiny", "--window", "0.3", "--min-support", "0.2", "--no-gate"])
    capsys.readouterr()
    assert main(["view", str(out), "--pair", "0", "--save", str(tmp_path / "one.rrd")]) == 0
    assert "1 key times" in capsys.readouterr().err
    assert occbev_main(["view", str(out), "--save", str(tmp_path / "all.rrd")]) == 0
    data = (tmp_path / "all.rrd").read_bytes()
    assert b"world/truth/voxels" in data
    assert b"world/prediction/voxels" not in data
    assert len(data) > (tmp_path / "one.rrd").stat().st_size


def test_only_the_drives_asked_for_become_pairs_and_samples(tmp_path, make_recording, capsys) -> None:
    root, scenes = tmp_path / "root", tmp_path / "train.txt"
    write_nuscenes([make_recording("tiny-0", 1), make_recording("tiny-1", 1)], root)
    scenes.write_text("tiny-1\n")
    pairs = ["pairs", str(tmp_path / "pairs"), str(root), "--scenes", str(scenes), "--window", "0.3", "--json"]
    main([*pairs, "--min-support", "0.2", "--no-gate"])
    assert {row["drive"] for row in ShardReader(tmp_path / "pairs").rows} == {"tiny-1"}
    cache = ["prepare", str(tmp_path / "cache"), "--nuscenes", str(root), "--scenes", str(scenes)]
    assert main([*cache, "--no-labels"]) == 0
    assert [path.parent.name for path in (tmp_path / "cache").glob("*/drive.json")] == ["tiny-1"]
    samples = open_pairs(
        tmp_path / "pairs", ImageConfig(width=64, height=32), GRIDS["occ3d"], "train", kept=tmp_path / "kept"
    )
    first = samples[0]
    assert first.images.shape == (3, 32, 64, 3)
    assert first.camera_valid.all()
    assert len(first.lidar_depth) > 0
    again = samples[0]  # read back instead of decoded
    assert all(np.array_equal(getattr(first, f.name), getattr(again, f.name)) for f in fields(first))
    assert samples.moment(0).drive == samples.drive(0) == "tiny-1"
    found = reconstruct(first, Prediction(reconstruction=_saying(first.state == OCCUPIED_STATE)))
    assert found.iou == 1.0
    picture = reconstruction_picture("tiny", first, found, GRIDS["occ3d"], width=600)
    assert picture.shape[1] >= 560

    scenes.write_text("tiny-2\n")
    capsys.readouterr()
    assert main(cache) != 0
    assert "tiny-2" in capsys.readouterr().err
    assert main(pairs) != 0


def _saying(occupied: np.ndarray) -> np.ndarray:
    """Logits (2, Z, Y, X) that are surely right."""
    volume = np.swapaxes(occupied, 0, 2).astype(np.float32)
    return np.stack([1 - volume, volume])


def rewrite_bag(source: Path, target: Path, change=lambda message: message) -> None:
    """Write a bag anew with other messages; change: message -> another one, or None to leave it out."""
    with BagReader(source) as reader, BagWriter(target) as writer:
        for message in reader.messages():
            changed = change(message)
            if changed is not None:
                writer.write(changed)


TINY = ["--grid", "tiny", "--window", "0.3", "--min-support", "0.2", "--no-gate", "--json"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_input_costs_no_other(bags, tmp_path, capsys, workers: str) -> None:
    """Without poses, cut, empty or no bag at all: each is one line, whether it comes before or after a good one."""
    drives = tmp_path / "drives"
    rewrite_bag(bags / "first", drives / "b_good")
    rewrite_bag(bags / "first", drives / "c_no_poses", lambda m: None if m.topic in ("/odometry", "/tf") else m)
    (drives / "a_empty").mkdir()
    (drives / "a_empty" / "metadata.yaml").write_text("")
    whole = next((drives / "b_good").glob("*.mcap")).read_bytes()
    (drives / "d_cut.mcap").write_bytes(whole[: len(whole) // 2])
    (drives / "e_random.db3").write_bytes(np.random.default_rng(0).bytes(4096))
    arguments = ["pairs", str(drives), str(tmp_path / "nothing"), "--out", str(tmp_path / "out"), *TINY]
    assert main([*arguments, "--workers", workers]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["samples"] >= 2
    named = {name.rpartition("/")[2] for name in record["problems"]}
    assert (
        {"a_empty", "c_no_poses", "e_random", "nothing"}
        <= named
        <= {"a_empty", "c_no_poses", "d_cut", "e_random", "nothing"}
    )
    assert not any("\n" in reason for reason in record["problems"].values())
    assert {row["drive"] for row in ShardReader(tmp_path / "out").rows} >= {"b_good"}


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--validation", "1.5", "--validation 1.5: want a share of at least 0 and below 1"),
        ("--validation", "-0.1", "--validation -0.1: want a share"),
        ("--key-interval", "-1", "key interval -1 s: must be at least 0"),
    ],
)
def test_options_out_of_range_are_named(bags, tmp_path, capsys, option: str, value: str, text: str) -> None:
    assert main(["pairs", str(bags), "--out", str(tmp_path / "out"), *TINY, option, value]) != 0
    found = capsys.readouterr()
    assert text in found.out + found.err


def test_content_of_equal_size_makes_other_shards(bags, tmp_path, capsys) -> None:
    """Shifted points, or a moved sensor on /tf_static, in a bag of the same name and size."""
    from occbev.messages.bags import type_store

    store = type_store()

    def shift_points(message: BagMessage) -> BagMessage:
        if message.topic != "/lidar_top/points":
            return message
        cloud = store.deserialize_cdr(message.data, message.type)
        rows = np.array(cloud.data).reshape(-1, cloud.point_step)
        rows[:, :4] = (rows[:, :4].copy().view("<f4") + np.float32(7)).view("u1")
        cloud.data = rows.reshape(-1)
        return replace(message, data=bytes(store.serialize_cdr(cloud, message.type)))

    def move_sensors(message: BagMessage) -> BagMessage:
        if message.topic != "/tf_static":
            return message
        tree = store.deserialize_cdr(message.data, message.type)
        for transform in tree.transforms:
            transform.transform.translation.z += 0.5
        return replace(message, data=bytes(store.serialize_cdr(tree, message.type)))

    made = []
    for change in (lambda m: m, shift_points, move_sensors):
        shutil.rmtree(tmp_path / "drive", ignore_errors=True)
        rewrite_bag(bags / "first", tmp_path / "drive", change)
        assert main(["pairs", str(tmp_path / "drive"), "--out", str(tmp_path / "out"), *TINY]) == 0
        made.append({path.name: file_hash(path) for path in (tmp_path / "out").glob("*.tar")})
    assert made[0].keys() == made[1].keys() == made[2].keys()
    assert made[0] != made[1] != made[2] != made[0]


def test_the_output_is_named_or_the_first_position_that_holds_no_recording(bags, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert split_output([out, bags], None, "the pairs") == ([bags], out)
    assert split_output([bags], out, "the pairs") == ([bags], out)
    assert split_output([out], None, "the pairs", alone=True) == ([], out)
    for paths in ([bags, bags], [bags], []):
        with pytest.raises(ValueError, match="name the pairs with --out FOLDER"):
            split_output(paths, None, "the pairs", alone=True)
    assert main(["pairs", str(bags)]) == 2
    assert "name the pairs with --out" in capsys.readouterr().err


def test_gated_noise_is_refused_with_reasons(bags, tmp_path, capsys) -> None:
    arguments = [
        "pairs",
        str(tmp_path),
        str(bags),
        "--grid",
        "tiny",
        "--window",
        "0.3",
        "--min-support",
        "0.2",
    ]
    assert main([*arguments, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["samples"] == 0
    assert sum(record["refused"].values()) == 3
    assert all(name.startswith("q") for name, count in record["refused"].items() if count)
    for name, count in record["refused"].items():
        assert not count or re.search(r"first key \d: \S+, want [<>]= ", record["reasons"][name])


def test_bag_check_ends_with_one_where_a_must_fails(bags, capsys) -> None:
    assert main(["bag-check", str(bags / "first"), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    failed = [v["requirement"] for v in record["verdicts"] if v["must"] and not v["ok"]]
    assert failed.count("one pair") == 1, "clouds of noise break the limits"
    assert all(name.startswith("camera ") for name in failed if name != "one pair"), "2 Hz cameras"
    assert {row["agrees"] for row in record["cameras"]} == {"not sure"}


def test_what_is_opened_and_how_has_a_fingerprint(bags, tmp_path) -> None:
    from tests.training.conftest import TinyRecording

    bag, rig = OpenBag(bags / "first"), TinyRecording().rig
    moved = CameraRig(tuple(replace(camera, width=camera.width + 2) for camera in rig.cameras))
    others = [
        replace(bag.options, clock={"/lidar_top/points": ClockCorrection(5)}),
        replace(bag.options, rig=rig),
        replace(bag.options, rig=moved),
    ]
    prints = [OpenBag(bag.path, options).fingerprint for options in (bag.options, *others)]
    assert len(set(prints)) == 4
    write_bag(TinyRecording(keys=2), tmp_path / "first")
    assert OpenBag(tmp_path / "first").fingerprint != bag.fingerprint
    assert Simulate(3, 20).fingerprint != Simulate(3, 3).fingerprint


def test_a_bag_with_a_rig_is_opened_once(bags) -> None:
    from tests.training.conftest import TinyRecording

    options = replace(OpenBag(bags / "first").options, rig=TinyRecording().rig)
    same = replace(options, rig=TinyRecording().rig)
    assert OpenBag(bags / "first", options)() is OpenBag(bags / "first", same)()


def test_a_bag_is_named_by_its_whole_folder_and_its_parts_share_a_place(bags) -> None:
    assert OpenBag(Path("drives/2024.05.01")).name == "2024.05.01"
    assert OpenBag(Path("drives/one.mcap")).name == "one"
    assert OpenBag(Path("drives/two/bag.db3")).name == "two"
    assert OpenBag(Path("drives/one.mcap.zstd")).name == "one"
    part = OpenBag(Path("drives/one.mcap"), BagOptions(part=2))
    assert part.name == "one-part2"
    assert OpenBag(bags / "first")().location == "first"


def test_a_folder_without_masks_is_refused(bags, tmp_path, capsys) -> None:
    assert main(["pairs", str(tmp_path), str(bags), "--ego-masks", str(tmp_path)]) == 2
    assert "no CAMERA.png" in capsys.readouterr().err


def test_pictures_where_the_command_is_given_are_no_masks(tmp_path, monkeypatch) -> None:
    from occbev_training.cli import pairs
    from occbev_training.cli.arguments.pairs import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    monkeypatch.chdir(tmp_path)
    assert pairs._config(parser.parse_args(["--out", "out"])).label.ego_masks == ""


def test_recordings_are_found_by_what_a_path_holds(bags, tmp_path, make_recording) -> None:
    assert find_recordings(bags) == [OpenBag(bags / "first")]
    assert find_recordings(bags / "first")[0].name == "first"
    write_nuscenes([make_recording(keys=2)], tmp_path / "tables")
    (scene,) = find_recordings(tmp_path / "tables")
    assert scene.name == "tiny-0"
    assert scene.keys() == 2
    assert scene().name == "tiny-0"
    assert Simulate(20_000, 7).keys() == 7
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordingError, match="neither a nuScenes root"):
        find_recordings(tmp_path / "empty")


def test_learn_checks_every_bag_of_a_folder(bags, tmp_path, capsys) -> None:
    assert main(["learn", str(bags), "--out", str(tmp_path / "out"), "--key-interval", "0.5", "--plan"]) == 0
    steps = [line.split()[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("  occbev-train ")]
    checked = [path for command, path in steps if command == "bag-check"]
    assert checked == sorted(str(path) for path in bags.iterdir())
