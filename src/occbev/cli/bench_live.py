"""The node as it runs on a vehicle: simulated cameras in real time from one process, over DDS, to the node in another.

The playing process takes both stamps of a latency on one clock: when it published the last image of a set, and when it
received the last result of that set. The images are simulated once and stay in the user's cache folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console

from occbev import graph
from occbev.benchmarks import LiveOptions, Options, Report
from occbev.benchmarks.paced_bag import PacedBag
from occbev.benchmarks.pipeline import cameras_around
from occbev.benchmarks.thread_times import ThreadTimes
from occbev.cli.replay import drain, perception_process
from occbev.messages.bags import BagReader
from occbev.reports.soak import sample
from occbev.reports.summaries import PROCESSED, frames_of, percentiles
from occbev.streams.frame_log import read_frame_log
from occbev.streams.parameters import PerceptionParameters, read_parameters
from occbev.versions import vector_instructions

if TYPE_CHECKING:
    from occbev.ros.player_node import PlayerLog

SEED, KEYS, KEY_RATE = 20_000, 6, 10.0
"""The simulated drive, of the test range; how many image sets are rendered, and their rate."""

JPEG_QUALITY = 80
"""Files of 1600x900 are then as large as those of nuScenes, 130 kB."""

READY_S = 90.0
"""How long the node may take to load its network."""


def run(options: Options) -> Report:
    """Play and measure.

    Raises:
        ValueError: options of another benchmark. OSError: the node ended, or the simulator is not installed.
    """
    if not isinstance(options, LiveOptions):
        raise ValueError("the live benchmark wants LiveOptions")
    os.environ.update(graph.own_domain())
    with tempfile.TemporaryDirectory(prefix="occbev_live_") as folder:
        path = Path(folder) / "perception.yaml"
        path.write_text(yaml.safe_dump(_node_parameters(options), sort_keys=False))
        values = _measure(options, path, read_parameters(path), _keep_pictures(options))
    width, height = options.size
    sizes = f"{options.cameras} cameras of {width}x{height}"
    setting = (
        f"--rate {options.rate:g} --size {width}x{height} --cameras {options.cameras} --seconds {options.seconds:g}"
    )
    model = "" if options.model == LiveOptions().model else f" --model {options.model}"
    return Report(
        "live",
        values,
        heading=f"live: {sizes} at {options.rate:g} Hz" + (f", {options.model}" if model else ""),
        command=f"occbev bench live {setting}{model}",
    )


def _keep_pictures(options: LiveOptions) -> Path:
    """Return the bag of pictures, which is simulated where it is not kept yet."""
    try:
        from occbev_training.simulator.drive import DriveConfig
        from occbev_training.simulator.drive_cache import keep_pictures
    except ImportError as error:
        raise OSError(
            f"occbev bench live needs the simulator for its pictures: pip install ./training ({error})"
        ) from error
    rig = cameras_around(options.cameras, options.size)
    config = DriveConfig(keys=KEYS, key_rate=KEY_RATE, rig=rig, jpeg_quality=JPEG_QUALITY)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "occbev" / "live"
    console = Console(stderr=True)

    def report(_: str, done: int, total: int) -> None:
        console.print(f"simulated {done} of {total} image sets, once")

    return keep_pictures(cache, SEED, config, os.cpu_count() or 1, report)


def _node_parameters(options: LiveOptions) -> dict[str, Any]:
    """Return the node's parameters as a file holds them: the defaults, with the topics of the bag."""
    names = cameras_around(options.cameras, options.size).names
    topics = {
        name: {
            "topic": f"/{name.lower()}/image/compressed",
            "info_topic": f"/{name.lower()}/camera_info",
        }
        for name in names
    }
    values: dict[str, Any] = {
        "cameras": {"names": list(names), **topics},
        "ego_motion": {"odometry_topic": "/odometry"},
    }
    if options.threads:
        values["threads"] = options.threads
    return {"/**": {"ros__parameters": values}}


def _measure(options: LiveOptions, path: Path, parameters: PerceptionParameters, pictures: Path) -> dict[str, Any]:
    from occbev.allocator import keep_large_blocks
    from occbev.ros import player_node
    from occbev.ros.transport import use_large_image_profile

    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(BagReader(pictures))
        bag = PacedBag(reader, options.rate, round(options.rate * options.seconds))
        use_large_image_profile()
        keep_large_blocks()
        frame_log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="occbev_live_"))) / "node.jsonl"
        node_log = frame_log.with_name("node.log")
        asked = argparse.Namespace(model=options.model, backend="", namespace="", set=[], node_log=node_log)
        node = stack.enter_context(perception_process(asked, path, frame_log))
        context = player_node.start_context()
        stack.callback(context.try_shutdown)
        player = player_node.PlayerNode(bag, player_node.plan(bag, parameters), parameters, context=context)
        stack.callback(player.destroy_node)
        stack.enter_context(player_node.Spinner(player))
        try:
            player.wait_for_perception(READY_S, lambda: node.poll() is None)
            before = ThreadTimes.of(node.pid)
            player.play(lambda _: None, lambda: node.poll() is None)
            drain(player, frame_log)
            spent, memory_mb = ThreadTimes.of(node.pid).since(before), sample(node.pid).rss_mb
        except (ChildProcessError, TimeoutError) as error:
            raise OSError(f"{error}; the node said: {node_log.read_text()[-2000:]}") from error
        lines = read_frame_log(frame_log)
        size_kb = np.mean([len(m.data) for m in bag.messages() if m.type == graph.COMPRESSED]) / 1e3
        return {
            **account(player.log, lines, parameters.anchor_camera),
            **_costs(spent, sum(line["outcome"] == PROCESSED for line in lines)),
            "resident_mb": round(memory_mb, 1),
            "images": f"{options.cameras} JPEG of {options.size[0]}x{options.size[1]}, {size_kb:.0f} kB each",
            "rate_hz": options.rate,
            "instructions": vector_instructions(),
        }


def account(log: PlayerLog, lines: Sequence[Mapping[str, Any]], anchor: str) -> dict[str, Any]:
    """Return the outcome of each set and the latency of each result, from the player's log and the node's frame log.

    log: of one pass of a bag. anchor: the camera whose images are the key times.
    """
    frames = frames_of(log.anchors, log.sent, lines, anchor)
    done = [line for line in lines if line["outcome"] == PROCESSED]
    heard: dict[int, int] = {}
    for results in log.received.values():
        for stamp_ns, at_ns in results:
            heard[stamp_ns] = max(at_ns, heard.get(stamp_ns, 0))
    latency = [
        (heard[line["stamp_ns"]] - max(log.sent[camera][stamp][0] for camera, stamp in line["images"].items())) / 1e6
        for line in sorted(done, key=lambda line: line["stamp_ns"])
        if line["stamp_ns"] in heard
    ]
    if not latency:
        raise OSError(
            f"the node published no result; the outcomes of its key times are {sorted({line['outcome'] for line in lines})}"
        )
    outcomes = [frame["outcome"] for frame in frames]
    return {
        "sets": len(frames),
        "processed": outcomes.count(PROCESSED),
        "processed_share": round(outcomes.count(PROCESSED) / len(frames), 4),
        "complete": sum(not line["missing"] for line in done),
        "latency_median_ms": round(float(np.median(latency)), 1),
        "latency_p95_ms": round(float(np.percentile(latency, 95)), 1),
        "latency_max_ms": round(max(latency), 1),
        "first_result_ms": round(latency[0], 1),
        "player_lag_ms": round(log.lag_ns / 1e6, 1),
        "stage_p50_ms": {name: both["p50"] for name, both in percentiles([line["stages_ms"] for line in done]).items()},
    }


def _costs(spent: ThreadTimes, sets: int) -> dict[str, Any]:
    """Return the node's processor time for a set, the network's own apart."""
    return {
        "cpu_ms_per_set": round(spent.sum_ms(of_runtime=False) / sets, 2),
        "network_cpu_ms_per_set": round(spent.sum_ms(of_runtime=True) / sets, 2),
        "threads_cpu_ms_per_set": {name: round(ms / sets, 2) for name, ms in spent.by_name().items()},
    }
