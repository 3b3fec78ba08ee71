"""The live benchmark's figures follow from the player's log, the node's frame log and the threads of a process."""

from __future__ import annotations

import argparse
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from occbev.benchmarks import LiveOptions
from occbev.benchmarks.pipeline import HEADINGS, cameras_around
from occbev.benchmarks.thread_times import ThreadTimes
from occbev.cli.bench import image_size
from occbev.cli.bench_live import _node_parameters, account
from occbev.streams.parameters import parameters_from_record
from occbev.threads import name_thread

MS = 1_000_000
PERIOD = 100 * MS


def line(stamp_ns: int, outcome: str = "processed", missing: dict[str, str] | None = None) -> dict[str, Any]:
    images = {"front": stamp_ns, "left": stamp_ns + 5 * MS}
    about = {"images": images, "cameras": ["front", "left"], "missing": missing or {}, "boxes": 0}
    times = {"at_ns": stamp_ns + 40 * MS, "published_ns": stamp_ns + 40 * MS, "stages_ms": {"inference": 20.0}}
    return {"stamp_ns": stamp_ns, "outcome": outcome, **about, **times}


def log_of(sets: int, heard: dict[str, list[tuple[int, int]]]) -> Any:
    stamps = [n * PERIOD for n in range(1, sets + 1)]
    sent = {"front": {s: [s] for s in stamps}, "left": {s + 5 * MS: [s + 10 * MS] for s in stamps}}
    return SimpleNamespace(anchors=stamps, sent=sent, received=heard, lag_ns=MS)


def test_latency_is_from_the_last_image_to_the_last_of_a_sets_results() -> None:
    stamps = [n * PERIOD for n in (1, 2, 3, 4)]
    boxes = [(s, s + 50 * MS) for s in stamps[:3]]
    voxels = [(stamps[0], stamps[0] + 90 * MS), (stamps[1], stamps[1] + 60 * MS), (stamps[2], stamps[2] + 70 * MS)]
    lines = [
        line(stamps[0]),
        line(stamps[1], missing={"rear": "silent"}),
        line(stamps[2]),
        line(stamps[3], "replaced_by_newer"),
    ]
    found = account(log_of(4, {"boxes": boxes, "voxels": voxels}), lines, "front")
    assert (found["sets"], found["processed"], found["processed_share"], found["complete"]) == (4, 3, 0.75, 2)
    assert found["first_result_ms"] == 80.0, "90 ms after the first image, 80 after the second"
    assert found["latency_median_ms"] == 60.0
    assert found["latency_max_ms"] == 80.0
    assert found["latency_p95_ms"] == pytest.approx(78.0)
    assert found["stage_p50_ms"]["inference"] == 20.0


def test_no_result_is_an_error_that_says_what_became_of_the_sets() -> None:
    with pytest.raises(
        OSError, match=r"the node published no result; the outcomes of its key times are \['too_few_cameras'\]"
    ):
        account(log_of(1, {}), [line(PERIOD, "too_few_cameras")], "front")


def test_threads_without_a_name_of_their_own_count_as_the_runtimes() -> None:
    done, ready = threading.Event(), threading.Barrier(3)

    def work(name: str) -> None:
        if name:
            name_thread(name)
        ready.wait()
        began = time.thread_time()
        while time.thread_time() - began < 0.05:
            pass
        ready.wait()
        done.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("decode", "")]
    for thread in threads:
        thread.start()
    before = ThreadTimes.of(os.getpid())
    ready.wait()
    ready.wait()
    spent = ThreadTimes.of(os.getpid()).since(before)
    done.set()
    for thread in threads:
        thread.join()
    named = {name for name, _ in spent.threads.values()}
    if "decode" not in named:
        pytest.skip("this system does not name threads by prctl")
    assert spent.by_name()["decode"] == pytest.approx(50, abs=25)
    assert spent.sum_ms(of_runtime=True) >= 40
    assert spent.sum_ms(of_runtime=False) >= spent.by_name()["decode"]


@pytest.mark.parametrize(("count", "size"), [(6, (1600, 900)), (4, (640, 360)), (1, (1280, 720))])
def test_any_number_of_cameras_gets_topics_and_a_parameter_file(count: int, size: tuple[int, int]) -> None:
    rig = cameras_around(count, size)
    assert len(rig) == count
    assert {(camera.width, camera.height) for camera in rig.cameras} == {size}
    options = LiveOptions(size=size, cameras=count, threads=2)
    parameters = parameters_from_record(_node_parameters(options)["/**"]["ros__parameters"])
    assert parameters.names == rig.names
    assert parameters.threads == 2
    ahead = max(rig.cameras, key=lambda camera: camera.cam2ego[0, 2])
    assert parameters.anchor_camera == ahead.name
    assert (set(rig.names) == set(HEADINGS)) == (count == 6)


def test_options_that_make_no_load_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two image sets"):
        LiveOptions(rate=1.0, seconds=1.0)
    assert image_size("640x360") == (640, 360)
    with pytest.raises(argparse.ArgumentTypeError, match="WIDTHxHEIGHT"):
        image_size("640")
