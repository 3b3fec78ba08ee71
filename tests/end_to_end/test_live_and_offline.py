"""The real node as a process of its own over real DDS: what it publishes equals what offline replay computes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("vision_msgs", reason="built by occbev.ros.build_interfaces")

from occbev.cli import main
from occbev.messages.bags import BagReader, type_store
from occbev.streams.frame_log import read_frame_log

pytestmark = [pytest.mark.ros, pytest.mark.slow]


def published_boxes(folder: Path) -> dict[int, np.ndarray]:
    """Read stamp -> (M, 7) x, y, z, l, w, h, score of the recorded detections."""
    result = {}
    with BagReader(folder) as bag:
        for message in bag.messages(["/perception/output/objects"]):
            array = type_store().deserialize_cdr(message.data, message.type)
            rows = [
                [
                    d.bbox.center.position.x,
                    d.bbox.center.position.y,
                    d.bbox.center.position.z,
                    d.bbox.size.x,
                    d.bbox.size.y,
                    d.bbox.size.z,
                    d.results[0].hypothesis.score,
                ]
                for d in array.detections
            ]
            stamp = array.header.stamp.sec * 10**9 + array.header.stamp.nanosec
            result[stamp] = np.array(rows, float).reshape(-1, 7)
    return result


def test_the_node_publishes_what_offline_replay_computes(bag: Path, model: str, tmp_path: Path) -> None:
    common = [str(bag), "--model", model, "--json"]
    lax = ["--set", "max_waiting_sets:=10", "--set", "sync.timeout_s:=2.0"]
    assert (
        main(
            [
                "replay",
                *common,
                str(tmp_path / "live.json"),
                "--record",
                str(tmp_path / "live"),
                "--node-log",
                str(tmp_path / "node.log"),
                *lax,
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "replay",
                *common,
                str(tmp_path / "offline.json"),
                "--offline",
                "--boxes",
                str(tmp_path / "boxes"),
            ]
        )
        == 0
    )
    live, offline = (json.loads((tmp_path / f"{n}.json").read_text())["summary"] for n in ("live", "offline"))
    assert (live["frames_in"], live["frames_processed"], live["drops"]) == (5, 5, {})
    assert (offline["frames_in"], offline["frames_processed"], offline["partial"]) == (5, 5, 0)
    assert {"sync", "decode", "inference", "publish", "total"} <= set(live["latency_ms"])
    boxes, voxels = published_boxes(tmp_path / "live"), published_voxels(tmp_path / "live")
    lines = [json.loads(line) for line in (tmp_path / "boxes").read_text().splitlines()]
    assert [line["stamp_ns"] for line in lines] == sorted(boxes) == sorted(voxels)
    for line in lines:
        ours = np.array([[*b[:6], s] for b, s in zip(line["box"], line["score"], strict=True)]).reshape(-1, 7)
        for first, second in ((ours, boxes[line["stamp_ns"]]), (boxes[line["stamp_ns"]], ours)):
            assert_found(first, second)
        assert voxels[line["stamp_ns"]] == pytest.approx(line["occupied"], rel=0.002, abs=20)


def assert_found(boxes: np.ndarray, among: np.ndarray) -> None:
    """Every clear box must be among the others; runtimes may round near-ties at the threshold differently."""
    for box in boxes[boxes[:, 6] > 0.15]:
        assert np.abs(among - box).max(axis=1).min() < 0.05


def published_voxels(folder: Path) -> dict[int, int]:
    """Read stamp -> number of recorded voxels."""
    with BagReader(folder) as bag:
        clouds = [
            type_store().deserialize_cdr(m.data, m.type) for m in bag.messages(["/perception/output/occupancy/points"])
        ]
    return {c.header.stamp.sec * 10**9 + c.header.stamp.nanosec: int(c.width) for c in clouds}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_node_ends_cleanly_on_a_signal(model: str, number: signal.Signals) -> None:
    process = start_node(f"model:={model}")
    wait_for_line(process, "listening to")
    process.send_signal(number)
    assert process.wait(120) == 0
    assert process.stdout is not None
    assert "Traceback" not in process.stdout.read()


@pytest.mark.parametrize("after_s", [0.4, 1.0, 1.6, 2.4])
def test_a_signal_at_any_moment_of_the_start_ends_the_node(model: str, after_s: float) -> None:
    process = start_node(f"model:={model}")
    time.sleep(after_s)
    process.terminate()
    text, _ = process.communicate(timeout=120)
    assert "Traceback" not in text
    # Before there is a node there is nothing to close, and the signal ends Python as it does any program.
    assert process.returncode == 0 or (process.returncode == -signal.SIGTERM and "[perception]" not in text)


def test_a_signal_in_the_middle_of_a_drive_leaves_a_whole_frame_log(
    make_bag: Callable[..., Path], model: str, tmp_path: Path
) -> None:
    frame_log = tmp_path / "frame_log.jsonl"
    path = make_bag(tmp_path / "long", sets=100, period_ns=200_000_000)
    process = start_node(f"model:={model}", f"frame_log_path:={frame_log}", "use_sim_time:=true")
    wait_for_line(process, "listening to")
    command = [sys.executable, "-m", "occbev", "replay", str(path), "--no-node"]
    player = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while sum(line["outcome"] == "processed" for line in read_frame_log(frame_log)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.wait(120) == 0
    finally:
        player.terminate()
        player.wait()
    assert frame_log.read_text().endswith("\n")
    stamps = [line["stamp_ns"] for line in read_frame_log(frame_log)]
    assert len(stamps) == len(set(stamps))


def test_build_only_loads_the_model_and_ends(model: str) -> None:
    process = start_node(f"model:={model}", "build_only:=true")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "is loaded after" in text
    assert "listening to" not in text


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("threads:=-1", "threads is -1: must be between 0 and 256"),
        ("sync.timeout_s:=soon", "sync.timeout_s is 'soon': want a number"),
        ("rviz:=true", "there is no rviz2 here"),
    ],
)
def test_a_value_that_cannot_be_is_named(model: str, assignment: str, text: str) -> None:
    process = start_node(f"model:={model}", assignment)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert text in said
    assert "Traceback" not in said


def test_a_node_with_a_wrong_parameter_says_which(model: str) -> None:
    process = start_node(f"model:={model}", "occupancy.publish:=everything")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "publish 'everything': must be occupied or observed" in text


def test_an_unknown_parameter_is_reported_with_the_nearest_name(model: str) -> None:
    process = start_node(f"model:={model}", "detection.score_treshold:=0.4")
    wait_for_line(process, "did you mean detection.score_threshold?")
    process.terminate()
    process.communicate(timeout=120)


def start_node(*assignments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "occbev", "run", *assignments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """The environment of a process that imports these very sources."""
    import occbev

    source = str(Path(occbev.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    deadline, seen = time.monotonic() + 240, []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
        assert time.monotonic() < deadline
    pytest.fail(f"{text!r} never came; the node said {''.join(seen)}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses prctl and /proc")
def test_the_node_does_not_outlive_a_killed_player(bag: Path, model: str, tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    command = [
        sys.executable,
        "-m",
        "occbev",
        "replay",
        str(bag),
        "--model",
        model,
        "--node-log",
        str(log),
    ]
    player = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while "listening to" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{player.pid}/task/{player.pid}/children").read_text().split()
    player.kill()
    player.wait()
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert children


def is_running(process_id: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return " Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
